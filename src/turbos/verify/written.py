"""Answers of an engine beside what the model says of the same tokens in one call.

Compared are the log-probability of each token that was written, and the choice itself: with the noise of (seed,
position) the model's own best token must be the one that was written, or lie next to nothing below it. Experts that the
engine chose are compared with the model's, so that router ties are set aside as everywhere. Errors are relative to the
largest logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from turbos.common.records import Completion
from turbos.model.config import ModelConfig
from turbos.ops.sampling import gumbel_noise
from turbos.verify.answers import Ask
from turbos.verify.compare import LEAST_KEPT, router_ties, tie_note
from turbos.verify.implementation import OurModel
from turbos.verify.readings import GATES, LOGITS, Place, Reading, Rows, row_ranges
from turbos.verify.subject import Subject, unsteady_rows
from turbos.verify.truth import Truth

SLACK = 2
"""A log-probability is a difference of two numbers, each of which may be off by rounding."""


@dataclass(frozen=True)
class Said:
    """The model's word on answers: readings that begin with log-probabilities `[T, 1]`, 0 where a prompt is read.

    `below_T` says how far each written token lies below the model's choice, `choice_T` what that is; `scale` is the
    largest logit.
    """

    reading: Reading
    below_T: Tensor
    choice_T: Tensor
    scale: float


@dataclass(frozen=True)
class Verdict:
    """How far answers lie from the model, the first token beyond the tolerance in words, and what was set aside."""

    ok: bool
    error: float
    where: str
    note: str


def text_of(answer: Completion) -> Tensor:
    """All tokens that were read for an answer: its last one never is."""
    return torch.tensor([*answer.prompt_ids, *answer.ids[:-1]])


def written_rows(answers: Sequence[Completion]) -> Tensor:
    """Which rows of the texts, laid end to end, tell of a written token: `[T]` bool."""
    rows = [torch.arange(len(text_of(answer))) >= len(answer.prompt_ids) - 1 for answer in answers]
    return torch.cat(rows)


def told(answers: Sequence[Completion], config: ModelConfig) -> Reading:
    """What the engine told: log-probabilities, and which experts each token went to (1 in place of the gate)."""
    reading = Reading(len(answers))
    experts = [index for index, kind in enumerate(config.layers) if kind == "F"]
    for number, answer in enumerate(answers):
        rows: Rows = {LOGITS: _column(answer, torch.tensor(answer.logprobs))}
        if answer.routes is not None:
            for index, chosen_TK in zip(experts, answer.routes.unbind(1), strict=True):
                gates_TE = torch.zeros(len(chosen_TK), config.num_experts)
                rows[Place(index, GATES)] = gates_TE.scatter_(1, chosen_TK.long(), 1.0)
        reading.add([number], [len(text_of(answer))], rows)
    return reading


def _column(answer: Completion, values: Tensor) -> Tensor:
    """`[T, 1]`: values of the written tokens after zeros."""
    return F.pad(values.double(), (len(answer.prompt_ids) - 1, 0))[:, None]


def say(model: OurModel, answers: Sequence[Completion], asks: Sequence[Ask], everything: bool = False) -> Said:
    """Let the model read each answer with its prompt in one call; `asks` has one request for each answer."""
    reading = Reading(len(answers))
    below, choices, largest = [], [], 0.0
    for number, (answer, ask) in enumerate(zip(answers, asks, strict=True)):
        rows = model.read([text_of(answer)], None, everything)
        logits_NV = rows[LOGITS][len(answer.prompt_ids) - 1 :].double()
        logprobs_NV = torch.log_softmax(logits_NV, -1)
        ids_N1 = torch.tensor(answer.ids)[:, None]
        scores_NV = logprobs_NV + _noise(ask, answer, logits_NV.shape[1])
        below.append(_column(answer, scores_NV.amax(1) - scores_NV.gather(1, ids_N1)[:, 0])[:, 0])
        choices.append(_column(answer, scores_NV.argmax(1))[:, 0].long())
        largest = max(largest, float(logits_NV.abs().max()))
        logprob_T1 = _column(answer, logprobs_NV.gather(1, ids_N1)[:, 0])
        reading.add([number], [len(logprob_T1)], {**rows, LOGITS: logprob_T1})
    return Said(reading, torch.cat(below), torch.cat(choices), largest)


def _noise(ask: Ask, answer: Completion, vocabulary: int) -> Tensor:
    """What sampling adds to log-probabilities, `[N, V]`; nothing where it is greedy."""
    count = len(answer.ids)
    if ask.params.temperature == 0.0:
        return torch.zeros(count, vocabulary)
    positions_N = torch.arange(count) + len(answer.prompt_ids)
    return gumbel_noise(torch.full((count,), ask.params.seed), positions_N, vocabulary)


def divergence(model: OurModel, other: OurModel, answers: Sequence[Completion]) -> float:
    """Mean KL divergence of another model's next-token distributions from a model's, nats a written token."""
    found = []
    for answer in answers:
        sides = [side.read([text_of(answer)], None)[LOGITS][len(answer.prompt_ids) - 1 :] for side in (model, other)]
        true_NV, other_NV = (torch.log_softmax(side.double(), -1) for side in sides)
        found.append((true_NV.exp() * (true_NV - other_NV)).sum(1))
    return float(torch.cat(found).mean())


def compared(subject: Subject, model: OurModel, answers: Sequence[Completion], asks: Sequence[Ask]) -> Verdict:
    """Answers beside the model that the engine held; rows where rounding alone decides are set aside."""
    cut = next(filter(None, map(_cut_short, range(len(asks)), answers, asks)), "")
    if cut:
        return Verdict(False, float("nan"), cut, "")
    tolerance, got, said = SLACK * subject.rounding, told(answers, model.config), say(model, answers, asks)
    ties = router_ties(got, said.reading, subject.routers, tolerance)
    kept_T = written_rows(answers)
    written = int(kept_T.sum())
    for tie in ties:
        stop = next(rows.stop for rows in row_ranges(got.starts) if tie.row in rows)
        kept_T[tie.row : stop] = False
    note = tie_note(ties, written - int(kept_T.sum()), written)
    errors_T = _errors(got, said)
    if not (errors_T[kept_T] <= tolerance).all():
        unsteady_T = _unsteady(subject, model, answers, asks, tolerance) & kept_T
        if unsteady_T.any():
            words = f"{int(unsteady_T.sum())} of {written} rows set aside: plain fp32 misses float64 there too"
            note, kept_T = "; ".join(filter(None, (note, words))), kept_T & ~unsteady_T
    if kept_T.sum() < LEAST_KEPT * written:
        return Verdict(False, float("nan"), f"too few rows are left to judge: {note}", "")
    errors_T = errors_T.masked_fill(~kept_T, 0.0)
    error = float(errors_T.max())
    ok = error <= tolerance
    return Verdict(ok, error, "" if ok else _where(got, said, answers, asks, ~(errors_T <= tolerance)), note)


def _cut_short(number: int, answer: Completion, ask: Ask) -> str:
    """How an answer ended that has not the length it was asked for; empty for others."""
    if answer.finish == "length" and len(answer.ids) == ask.params.max_new_tokens:
        return ""
    reason = f" ({answer.reason})" if answer.reason else ""
    return f"{named(number, ask)} ended after {len(answer.ids)} tokens as {answer.finish!r}{reason}"


def _errors(got: Reading, said: Said) -> Tensor:
    """Of each row the larger of both errors; NaN stays NaN."""
    off_T = (got.rows(LOGITS) - said.reading.rows(LOGITS))[:, 0].abs()
    return torch.maximum(off_T, said.below_T) / max(said.scale, 1e-300)


def _unsteady(
    subject: Subject, model: OurModel, answers: Sequence[Completion], asks: Sequence[Ask], tolerance: float
) -> Tensor:
    truth = Truth(model.config, model.tensors())
    reading = say(model, answers, asks, everything=True).reading
    return unsteady_rows(replace(subject, implementation=model, truth=truth), reading, tolerance)


def _where(got: Reading, said: Said, answers: Sequence[Completion], asks: Sequence[Ask], beyond_T: Tensor) -> str:
    """The first written token that lies beyond the tolerance, in which answer, and how many others do."""
    row = int(torch.nonzero(beyond_T)[0, 0])
    number, rows = next((n, rows) for n, rows in enumerate(row_ranges(got.starts)) if row in rows)
    answer, step = answers[number], row - rows.start - len(answers[number].prompt_ids) + 1
    ours, theirs = (float(side.rows(LOGITS)[row, 0]) for side in (got, said.reading))
    words = f"log-probability {ours:.5f} in the engine, {theirs:.5f} in the model"
    if said.below_T[row] > abs(ours - theirs):
        words = (
            f"token {answer.ids[step]} was written, the model chooses {int(said.choice_T[row])}, "
            f"{float(said.below_T[row]):.1e} above it"
        )
    return f"{named(number, asks[number])}, token {step} first: {words} ({int(beyond_T.sum())} tokens are wrong)"


def named(number: int, ask: Ask) -> str:
    """An answer in words."""
    return f"answer {number} (prompt of {len(ask.prompt)} tokens, seed {ask.params.seed})"
