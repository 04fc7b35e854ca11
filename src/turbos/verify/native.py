"""Checks against programs that load the same files: transformers here; llama.cpp and vLLM in `verify.servers`.

transformers reads the checkpoint as it lies on the disk and as this project would write it again. Where its own code
for a family is known to compute something else than the family means (`peer.UNCLAMPED`), the deciding comparison uses a
temporary config, and a row that does not decide says what the shipped config gives.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from turbos.model.checkpoint import save_model
from turbos.model.families import NATIVE
from turbos.verify.implementation import OurModel
from turbos.verify.peer import UNCLAMPED, load_peer, transformers_version, unclamped_copy
from turbos.verify.report import Check
from turbos.verify.subject import Job, Subject, judge, separate

WHY = "fp32 on both sides, the same equations in another order of sums"


def native_rows(subject: Subject, ours: OurModel) -> tuple[list[Job], list[str]]:
    """Comparisons with transformers that can run, and a line for what is left out."""
    version = transformers_version()
    if subject.family is NATIVE:
        return [], ["native (transformers): family turbos is loaded by this project only"]
    if version is None:
        return [], ["native (transformers): not installed (pip install 'turbos[export]')"]
    rows: list[Job] = [
        ("checkpoint == native (transformers)", lambda: checkpoint_is_native(subject, ours)),
        ("export == native (transformers)", lambda: export_is_native(subject, ours)),
    ]
    if subject.family.name in UNCLAMPED:
        rows.append(("native as shipped (transformers)", lambda: native_as_shipped(subject, ours)))
    return rows, []


def checkpoint_is_native(subject: Subject, ours: OurModel) -> Check:
    """Our logits against transformers' of the directory itself."""
    directory = unclamped_copy(subject.directory, subject.folder("unclamped"))
    return _against(subject, ours, directory)


def export_is_native(subject: Subject, ours: OurModel) -> Check:
    """Our logits against transformers' of the files that we write."""
    exported = subject.folder("exported")
    save_model(ours.model, exported, family=subject.family)
    return _against(subject, ours, unclamped_copy(exported, subject.folder("exported-unclamped")))


def native_as_shipped(subject: Subject, ours: OurModel) -> Check:
    """Our logits against transformers' under the shipped config: a clamp of dt is reported, it does not decide."""
    check = _against(subject, ours, subject.directory)
    clamp = ", ".join(UNCLAMPED[subject.family.name])
    note = "" if check.ok else f"the shipped {clamp} makes transformers clamp dt in prefill; write 1e-30"
    return replace(check, note="; ".join(filter(None, (check.note, note))), decides=False)


def _against(subject: Subject, ours: OurModel, directory: Path) -> Check:
    peer = load_peer(directory, subject.config, subject.family)
    if peer.misplaced():
        return Check(False, float("nan"), subject.rounding, peer.misplaced()[0], WHY)
    texts = subject.texts(subject.plan.packed, seed=17)
    got, want = separate(ours, texts), separate(peer, texts)
    why = f"{WHY} (transformers {transformers_version()})"
    return judge(subject, got, want, subject.rounding, why)
