"""What the certificate asks of engines: on which path, which answers, and how many may be written at once.

Engines work on copies of the model: they may round its weights. Nothing is judged here.

>>> EnginePath("fused", "int8").label
'fused int8'
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from turbos.common.records import Completion
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.pages import PAGE
from turbos.engine.sampling_params import SamplingParams
from turbos.model.lm import LanguageModel
from turbos.verify.subject import Subject

SEGMENT = 32
"""Tokens of a prompt that the engines read in one call: small, so that short prompts have borders too."""
KEPT_EVERY = 64
PATIENCE = 1000
"""Steps for each answer after which an engine that has not ended never will."""


@dataclass(frozen=True)
class EnginePath:
    """A way of writing: the plain torch step, or the fused step over weights in some precision."""

    step: Literal["torch", "fused"]
    precision: Literal["fp32", "bf16", "int8"]

    @property
    def label(self) -> str:
        """Its name in the rows of the certificate."""
        return f"{self.step} {self.precision}"


@dataclass(frozen=True)
class Ask:
    """A request: prompt, sampling, and the lengths after which the prompt's state is kept."""

    prompt: tuple[int, ...]
    params: SamplingParams
    marks: tuple[int, ...] = ()

    def alone(self) -> list[Ask]:
        """The same answers as requests of their own: answer k samples with seed + k."""
        return [
            replace(self, params=replace(self.params, n=1, seed=self.params.seed + place, routes=False))
            for place in range(self.params.n)
        ]


@dataclass(frozen=True)
class Crowd:
    """Requests that are made at once, with fewer slots and pages than they would like."""

    asks: tuple[Ask, ...]
    slots: int
    pages: int


def engine_of(model: LanguageModel, path: EnginePath, running: int) -> Engine:
    """An engine over a copy of a model, which writes so many answers at once."""
    config = EngineConfig(
        context=8 * PAGE,
        max_running=running,
        precision=path.precision,
        path=path.step,
        segment=SEGMENT,
        snapshot_every=KEPT_EVERY,
    )
    return Engine(copy.deepcopy(model), config=config)


def crowd_of(subject: Subject) -> Crowd:
    """Prompts of unlike lengths and answers of unlike lengths, some greedy; four siblings at the brink of a page.

    The siblings share the page that they are about to write on, and want another two tokens later: pages are so few
    that the youngest must step back. Slots are fewer than answers, so that they are used again.
    """
    steps, room = subject.plan.steps, max(subject.config.max_positions, 8)
    longest = room - steps
    sizes = (min(PAGE - 2, longest), 1, min(3, longest), min(37, longest), min(2 * PAGE + 7, longest))
    ids = [tuple(text.tolist()) for text in subject.texts(sizes, seed=20)]
    asks = (
        Ask(ids[0], _params(steps, seed=30, n=4)),
        Ask(ids[1], _params(steps, seed=40, greedy=True)),
        Ask(ids[2], _params(max(1, steps // 2), seed=50)),
        Ask(ids[3], _params(steps, seed=60, greedy=True)),
        Ask(ids[4], _params(steps, seed=70, n=2)),
    )
    needs = -(-(sizes[4] + steps) // PAGE)
    return Crowd(asks, slots=5, pages=max(5, needs + 2))


def _params(tokens: int, seed: int, n: int = 1, greedy: bool = False) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=tokens,
        temperature=0.0 if greedy else 1.0,
        seed=seed,
        n=n,
        stop_ids=frozenset(),
        routes=True,
        cache=False,
    )


@contextmanager
def crowded(engine: Engine, pages: int) -> Iterator[None]:
    """Inside, no more than so many of the engine's pages are free."""
    allocator = engine.pool.allocator
    taken = [allocator.alloc() for _ in range(allocator.free - pages)] if engine.pool.pages_matter else []
    try:
        yield
    finally:
        for page in taken:
            if page is not None:
                allocator.release(page)


def answered(engine: Engine, asks: Sequence[Ask]) -> list[Completion]:
    """All answers, in the order of the requests, which are made at once. RuntimeError where they never end."""
    running = [one for ask in asks for one in engine.submit(ask.prompt, ask.params, marks=ask.marks)]
    for _ in range(PATIENCE * len(running)):
        if all(one.finish for one in running):
            return [one.completion() for one in running]
        engine.step()
    raise RuntimeError(f"{sum(one.finish is None for one in running)} of {len(running)} answers never ended")


def one_by_one(engine: Engine, asks: Sequence[Ask]) -> list[Completion]:
    """Each answer when nothing else runs."""
    return [answered(engine, [one])[0] for ask in asks for one in ask.alone()]


def ids_of(text: Tensor) -> tuple[int, ...]:
    """A text as a prompt."""
    return tuple(text.tolist())
