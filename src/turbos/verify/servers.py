"""Checks against llama.cpp and vLLM, where they are installed: our logits against what they tell of the same files.

Such a program tells no logits, only its greedy continuation and log-probabilities of a few candidates. The error is the
larger of two: how far these log-probabilities lie from ours, and how far, in our own log-probabilities, each token that
it chose lies below our best (0 where it chose as we do; next to nothing at a tie).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbos.model.families import NATIVE
from turbos.model.package import TOKENIZER_FILE
from turbos.text.tokenizer import Tokenizer
from turbos.verify.elsewhere import MODULES
from turbos.verify.implementation import OurModel
from turbos.verify.readings import LOGITS
from turbos.verify.report import Check
from turbos.verify.subject import Job, Subject

TOLERANCES = {
    "llama.cpp": (5e-5, "fp32 weights, cache and attention; its exponentials are polynomials, its sums run in blocks"),
    "vllm": (5e-5, "fp32, with kernels that sum in other orders"),
}
LONGEST_RUN = 1800
"""Seconds after which another program has failed."""


def server_rows(subject: Subject, ours: OurModel) -> tuple[list[Job], list[str]]:
    """Comparisons that can run, and a line for each that is left out."""
    rows: list[Job] = []
    left_out = []
    for program, obstacle, check in (
        ("llama.cpp", llama_cpp_obstacle, llama_cpp_is_native),
        ("vllm", vllm_obstacle, vllm_is_native),
    ):
        reason = obstacle(subject)
        if reason:
            left_out.append(f"native ({program}): {reason}")
        else:
            rows.append((f"export == native ({program})", partial(check, subject, ours)))
    return rows, left_out


def llama_cpp_obstacle(subject: Subject) -> str:
    """Why llama.cpp cannot be asked; empty if it can."""
    missing = [module for module in (MODULES["llama.cpp"], "gguf") if importlib.util.find_spec(module) is None]
    if missing:
        return f"not installed (pip install {' '.join(missing)})"
    from turbos.model.gguf import gguf_obstacles

    for obstacle in gguf_obstacles(subject.config):
        return obstacle
    if not (subject.directory / TOKENIZER_FILE).is_file():
        return f"a GGUF file needs the checkpoint's {TOKENIZER_FILE}"
    return ""


def vllm_obstacle(subject: Subject) -> str:
    """Why vLLM cannot be asked; empty if it can."""
    if subject.family is NATIVE:
        return "family turbos is loaded by this project only"
    return "" if importlib.util.find_spec(MODULES["vllm"]) is not None else "not installed"


def llama_cpp_is_native(subject: Subject, ours: OurModel) -> Check:
    """Our logits against llama.cpp's of an fp32 GGUF file."""
    from turbos.model.gguf import write_gguf

    tokenizer = Tokenizer.load(subject.directory)
    path = subject.folder("gguf") / "model.gguf"
    write_gguf(ours.model, tokenizer, path, "f32")
    return told_is_ours(subject, ours, "llama.cpp", path, tokenizer.vocab_size)


def vllm_is_native(subject: Subject, ours: OurModel) -> Check:
    """Our logits against vLLM's of the directory itself."""
    return told_is_ours(subject, ours, "vllm", subject.directory, subject.config.vocab_size)


def told_is_ours(subject: Subject, ours: OurModel, program: str, path: Path, vocabulary: int) -> Check:
    """Ask a program in a process of its own and compare what it tells."""
    tolerance, why = TOLERANCES[program]
    prompts = [text % vocabulary for text in subject.texts(subject.plan.prompts, seed=18)]
    asked = {"prompts": [prompt.tolist() for prompt in prompts], "steps": subject.plan.steps}
    told, complaint = ask(program, path, asked, subject.folder(f"asked-{MODULES[program]}"))
    if complaint:
        return Check(False, float("nan"), tolerance, complaint, why)
    worst, largest, where = 0.0, 0.0, ""
    for number, (prompt, answer) in enumerate(zip(prompts, told, strict=True)):
        tokens = torch.tensor(answer["tokens"], dtype=torch.int64)
        logits_TV = ours.read([torch.cat([prompt, tokens])], None)[LOGITS].double()
        largest = max(largest, float(logits_TV.abs().max()))
        error, place = _furthest(torch.log_softmax(logits_TV[len(prompt) - 1 :], -1), answer)
        if error > worst:
            worst, where = error, f"document {number} ({len(prompt)} tokens): {place}"
    ok = worst <= tolerance * largest
    note = f"{sum(len(answer['tokens']) for answer in told)} greedy tokens after {len(told)} prompts"
    return Check(ok, worst / largest, tolerance, "" if ok else where, why, note)


def _furthest(logprobs_TV: Tensor, answer: Any) -> tuple[float, str]:
    """The largest error of one answer and where it is."""
    worst, place = 0.0, ""
    for token, logprob in answer["likeliest"]:
        mine = float(logprobs_TV[0, token])
        if abs(mine - logprob) > worst:
            worst = abs(mine - logprob)
            place = f"token {token} has log-probability {logprob:.4f} there and {mine:.4f} here"
    for step, token in enumerate(answer["tokens"]):
        best = int(logprobs_TV[step].argmax())
        below = float(logprobs_TV[step, best] - logprobs_TV[step, token])
        if below > worst:
            worst, place = below, f"step {step} chose token {token} there and {best} here, {below:.4f} nats apart"
    return worst, place


def ask(program: str, path: Path, asked: dict[str, Any], folder: Path) -> tuple[Sequence[Any], str]:
    """What the program tells, or why it tells nothing."""
    question, answer = folder / "asked.json", folder / "told.json"
    question.write_text(json.dumps(asked), encoding="utf-8")
    words = [sys.executable, "-m", "turbos.verify.elsewhere", program, str(path), str(question), str(answer)]
    try:
        run = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=LONGEST_RUN, check=False)
    except subprocess.TimeoutExpired:
        return [], f"{program} told nothing in {LONGEST_RUN} s"
    if run.returncode or not answer.is_file():
        lines = run.stderr.strip().splitlines() or ["no reason given"]
        # The program's own first word on it says more than the end of a traceback.
        complaint = next((line for line in lines if " E " in line), lines[-1])
        return [], f"{program} ended with code {run.returncode}: {complaint}"
    return json.loads(answer.read_text(encoding="utf-8")), ""
