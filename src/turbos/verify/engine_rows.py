"""Checks of the engine against the model: what is written in a crowd, from kept states and with rounded weights.

For this project's own implementation only. Each row names the path that it asks: the plain torch step, or the fused
step over fp32, bf16 or int8 weights. A path's first row compares with the model that holds the same numbers; the others
compare bits, since the fused step promises them whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.common.records import Completion
from turbos.engine.fused.support import refusal
from turbos.engine.metrics import EngineMetrics
from turbos.model.lm import LanguageModel
from turbos.verify.answers import Ask, Crowd, EnginePath, answered, crowd_of, crowded, engine_of, one_by_one
from turbos.verify.implementation import OurModel
from turbos.verify.kept import kept_is_fresh
from turbos.verify.readings import RESIDUAL, Place
from turbos.verify.report import Check
from turbos.verify.same import Pair, first_unlike
from turbos.verify.subject import Job, Subject
from turbos.verify.written import SLACK, compared, divergence, named

STEPS = {"int8": 0.5 / 127, "bf16": 2.0**-8, "fp32": 0.0}
"""Half a step of each precision, relative to a row's largest number."""
MODEL, ALONE, KEPT = "engine == model", "alone == crowd", "kept state == fresh"
PATHS = (
    EnginePath("torch", "fp32"),
    EnginePath("fused", "fp32"),
    EnginePath("fused", "bf16"),
    EnginePath("fused", "int8"),
)
ONLY_IN_FULL = (
    f"{KEPT} (torch fp32)",
    *(f"{row} (fused fp32)" for row in (ALONE, KEPT)),
    *(f"{row} (fused bf16)" for row in (MODEL, ALONE, KEPT)),
)
"""Rows that a quick certificate leaves out: it asks the step that runs by default, int8, for all of them."""
NEVER_ROUNDED = ("router_weight", "conv_weight", "A_log")


def engine_rows(subject: Subject, ours: OurModel) -> tuple[list[Job], list[str]]:
    """Rows of every path that can run, and a line for each that cannot."""
    reason = refusal(subject.config, "cpu", ours.model.embed_weight.dtype)
    rows: list[Job] = []
    skipped: list[str] = []
    left_out = [] if reason is None else [f"engine (fused), alone == crowd: {reason}"]
    for path in PATHS if reason is None else PATHS[:1]:
        party = Party(subject, ours, path)
        checks = [(MODEL, partial(engine_is_model, party)), (KEPT, partial(kept_is_fresh, subject, ours, path))]
        if path.step == "fused":
            checks.insert(1, (ALONE, partial(alone_is_crowd, party)))
        for name, check in checks:
            full = f"{name} ({path.label})"
            if full in ONLY_IN_FULL and subject.plan.quick and reason is None:
                skipped.append(full)
            else:
                rows.append((full, partial(taken, check)))
    return rows, left_out + ([f"{', '.join(skipped)}: not in --quick"] if skipped else [])


def taken(check: Callable[[], Check]) -> Check:
    """A check's result; what the engine refuses has failed, and its reason says where."""
    try:
        return check()
    except UserError as error:
        return Check(False, float("nan"), 0.0, str(error), "an engine must take what it is asked here")


@dataclass(frozen=True)
class Written:
    """Answers of a crowd, the model with the numbers that the engine held, and what the engine counted."""

    answers: list[Completion]
    metrics: EngineMetrics


def write_in_crowd(ours: OurModel, path: EnginePath, crowd: Crowd) -> tuple[Written, OurModel]:
    """Let an engine answer all requests of a crowd at once; also the model with the numbers that it held."""
    engine = engine_of(ours.model, path, crowd.slots)
    with crowded(engine, crowd.pages):
        answers = answered(engine, crowd.asks)
    return Written(answers, engine.metrics()), OurModel(engine.model, ours.family)


@dataclass
class Party:
    """A crowd on one path; what was written is remembered for all rows that look at it, the engine's model is not."""

    subject: Subject
    ours: OurModel
    path: EnginePath
    last: Written | None = None

    @cached_property
    def crowd(self) -> Crowd:
        """Who asks."""
        return crowd_of(self.subject)

    @cached_property
    def asks(self) -> list[Ask]:
        """One request for each answer."""
        return [one for ask in self.crowd.asks for one in ask.alone()]

    def write(self) -> tuple[Written, OurModel]:
        """Let an engine write; also the model with the numbers that it held."""
        self.last, model = write_in_crowd(self.ours, self.path, self.crowd)
        return self.last, model

    @property
    def written(self) -> Written:
        """What an engine wrote."""
        return self.last or self.write()[0]


def engine_is_model(party: Party) -> Check:
    """Log-probabilities and choices of a crowd's answers against the model that reads each text in one call."""
    path, (written, model) = party.path, party.write()
    why = "one token at a time against chunks, matrix products of another height; twice the rounding of a logit"
    if path.step == "fused":
        why += "; the fused step's sums run in an order of its own"
    if path.precision != "fp32":
        why += f"; the model holds the numbers that {path.precision} weights stand for"
    tolerance = SLACK * party.subject.rounding
    wrong = wrongly_rounded(party.ours.model, model.model, path)
    if wrong:
        return Check(False, float("nan"), tolerance, wrong, why)
    verdict = compared(party.subject, model, written.answers, party.asks)
    where = verdict.where
    if not verdict.ok:
        where += f"; {first_wrong_sublayer(party)}"
    note = "; ".join(filter(None, (_counted(written), _divergence(party, model), verdict.note)))
    return Check(verdict.ok, verdict.error, tolerance, where, why, note)


def _counted(written: Written) -> str:
    tokens = sum(len(answer.ids) for answer in written.answers)
    words = f"{tokens} tokens of {len(written.answers)} answers"
    if written.metrics.preemptions:
        words += f", {written.metrics.preemptions} preemptions, {written.metrics.replayed_tokens} tokens read again"
    return words


def _divergence(party: Party, model: OurModel) -> str:
    """How far rounded weights lead from the checkpoint's."""
    if party.path.precision == "fp32":
        return ""
    # Siblings read nearly the same.
    several = {answer.prompt_ids: answer for answer in party.written.answers}
    nats = divergence(party.ours, model, list(several.values()))
    return f"KL to the checkpoint's own weights {nats:.1e} nats a token (random text)"


def wrongly_rounded(before: LanguageModel, after: LanguageModel, path: EnginePath) -> str:
    """The first tensor that an engine changed by more than its precision allows; empty where there is none."""
    changed = after.state_dict()
    for name, tensor in before.state_dict().items():
        allowed = 0.0 if tensor.ndim < 2 or name.endswith(NEVER_ROUNDED) else STEPS[path.precision]
        off = _off(tensor, changed[name])
        if not off <= allowed * 1.001:
            return f"{name} was changed by {off:.1e} of its row's largest number, {path.precision} allows {allowed:.1e}"
    return ""


def _off(before: Tensor, after: Tensor) -> float:
    largest = before.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return float(((after - before).abs() / largest).max())


def first_wrong_sublayer(party: Party) -> str:
    """Where it goes wrong: the shortest stack whose engine and model differ, found by halving."""
    low, high = 0, len(party.subject.config.layers)
    if not _agrees(party, 0):
        return "a stack without sublayers differs too: embedding, head, sampling or the order of tokens"
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _agrees(party, middle) else (low, middle)
    place = party.subject.names.of_place(Place(high - 1, RESIDUAL))
    return f"a stack that ends with {place} differs, one that ends before it does not"


def _agrees(party: Party, count: int) -> bool:
    model = OurModel(shortened(party.ours.model, count), party.ours.family)
    written, held = write_in_crowd(model, party.path, party.crowd)
    return compared(replace(party.subject, implementation=model), held, written.answers, party.asks).ok


def shortened(model: LanguageModel, count: int) -> LanguageModel:
    """The model's first sublayers between its embedding and its head; without any, one that adds nothing."""
    config = model.config
    cut = replace(config, layers=config.layers[:count]) if count else replace(config, layers="D", ffn_size=1)
    short = LanguageModel(cut).to(model.embed_weight.dtype)
    with torch.no_grad():
        for tensor in short.parameters():
            tensor.zero_()
    own = {name: tensor for name, tensor in model.state_dict().items() if count or not name.startswith("sublayers.")}
    short.load_state_dict(own, strict=False)
    return short


def alone_is_crowd(party: Party) -> Check:
    """The same answers when nothing else runs: the same tokens, the same bits of their log-probabilities."""
    engine = engine_of(party.ours.model, party.path, running=1)
    alone = one_by_one(engine, party.crowd.asks)
    why = "bits are compared: sums of a row are added in one order, whatever else is in the batch"
    sides = zip(party.asks, party.written.answers, alone, strict=True)
    pairs = [Pair(named(number, ask), got, want) for number, (ask, got, want) in enumerate(sides)]
    return first_unlike(pairs, "in the crowd", "alone", why, _counted(party.written))
