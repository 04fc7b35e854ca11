"""Runs the checks of one checkpoint and gathers the certificate.

report = verify(Path("runs/demo/final"), quick=True)
report.ok, [check.where for check in report.checks if not check.ok]
"""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from turbos.common.errors import UserError
from turbos.model.checkpoint import load_model, read_family
from turbos.model.families import NATIVE
from turbos.model.package import TOKENIZER_FILE, check_vocabulary
from turbos.text.tokenizer import Tokenizer
from turbos.verify.checks import CHECKS, packed_is_separate
from turbos.verify.compare import Routers
from turbos.verify.engine_rows import engine_rows
from turbos.verify.implementation import Implementation, OurModel
from turbos.verify.native import native_rows
from turbos.verify.peer import load_peer
from turbos.verify.report import Check, Report
from turbos.verify.servers import server_rows
from turbos.verify.subject import Job, Subject, plan_of
from turbos.verify.truth import Truth

ImplementationName = Literal["turbos", "transformers"]
FAULTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


def verify(
    directory: Path,
    quick: bool = False,
    implementation: ImplementationName = "turbos",
    on_check: Callable[[Check], None] = lambda check: None,
) -> Report:
    """Check a checkpoint directory; `on_check` hears of each result as it comes.

    A directory that cannot be loaded raises `UserError`.
    """
    started = time.perf_counter()
    family, _ = read_family(directory)
    if (directory / TOKENIZER_FILE).is_file():
        check_vocabulary(directory, Tokenizer.load(directory))
    ours = OurModel(load_model(directory), family)
    with tempfile.TemporaryDirectory(prefix="turbos-verify-") as scratch:
        subject = subject_of(directory, Path(scratch), ours, quick, implementation)
        jobs, left_out = jobs_of(subject, ours)
        checks = []
        for name, job in jobs:
            check = run_check(name, job)
            if check is not None:
                checks.append(check)
                on_check(check)
    seconds = time.perf_counter() - started
    return Report(str(directory), implementation, family.name, tuple(checks), tuple(left_out), seconds)


def subject_of(directory: Path, scratch: Path, ours: OurModel, quick: bool, implementation: str) -> Subject:
    """What the checks need to know of a loaded checkpoint."""
    config = ours.config
    if implementation == "transformers" and ours.family is NATIVE:
        raise UserError(f"{directory}: family turbos has no code in transformers; use --implementation turbos")
    model: Implementation[Any] = ours if implementation == "turbos" else load_peer(directory, config, ours.family)
    tensors = ours.tensors()
    biases = {index: tensors[name] for index in range(len(config.layers)) if (name := _bias_name(index)) in tensors}
    truth, routers = Truth(config, tensors), Routers(config, biases)
    return Subject(directory, scratch, model, truth, routers, plan_of(config, quick), ours.family)


def _bias_name(index: int) -> str:
    return f"sublayers.{index}.mixer.selection_bias"


def jobs_of(subject: Subject, ours: OurModel) -> tuple[list[Job], list[str]]:
    """Every check that can run, by name, and a line for what is left out."""
    jobs: list[Job] = []
    for packing in subject.implementation.packings:
        name = "packed == separate" + (f" ({packing})" if packing else "")
        jobs.append((name, partial(packed_is_separate, subject, packing)))
    jobs += [(name, partial(check, subject)) for name, check in CHECKS]
    if subject.implementation is not ours:
        return jobs, ["engine: it runs this project's own model only"]
    left_out = []
    for rows_of in (engine_rows, native_rows, server_rows):
        rows, lines = rows_of(subject, ours)
        jobs += rows
        left_out += lines
    return jobs, left_out


def run_check(name: str, job: Callable[[], Check | None]) -> Check | None:
    """A check's result with its time; a model that breaks down under it has failed it."""
    started = time.perf_counter()
    try:
        check = job()
    except FAULTS as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(frame.filename).name}:{frame.lineno}: {' '.join(str(error).split())}"
        check = Check(False, float("nan"), 0.0, where, "a model must not break down")
    return None if check is None else replace(check, name=name, seconds=time.perf_counter() - started)
