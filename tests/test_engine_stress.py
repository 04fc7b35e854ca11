"""The engine under everything at once: tiny pools, unlike requests, cancels and new weights at random moments."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch

from model_cases import tiny_config
from tiny import tiny_tokenizer
from turbos.common.records import Completion
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import Grammar, SamplingParams
from turbos.engine.sequence import Delta, Sequence
from turbos.model.lm import LanguageModel

PADDED = 384
OPEN, CLOSE, ASSISTANT = (tiny_tokenizer().special(name) for name in ("<think>", "</think>", "<|assistant|>"))
GRAMMARS = (Grammar("regex", "[a-c]{3,40}"), Grammar.choice(["yes", "no", "perhaps"]), Grammar("json"))
PATIENCE = 4000
"""Steps after which what has not ended never will."""


def model_of(layers: str, seed: int = 0) -> LanguageModel:
    return LanguageModel(tiny_config(layers, vocab_size=PADDED)).init_weights(seed)


def engine_of(layers: str = "MFAD", memory: int = 1 << 27, path: str = "fused", **options: int) -> Engine:
    """With a tokenizer, in fp32 on one thread; `memory` is beside weights and working memory if it is small."""
    settings = EngineConfig(memory=memory, precision="fp32", path=path, threads=1, segment=32, snapshot_every=48)  # type: ignore[arg-type]
    return Engine(model_of(layers), tiny_tokenizer(), replace(settings, **options), eos_ids={0})


@cache
def beside(layers: str, slots: int) -> int:
    """Bytes of weights and working memory of such an engine."""
    roomy = engine_of(layers, max_running=slots)
    return roomy.weights.nbytes + roomy.plan.working_bytes


def tight_engine(layers: str, slots: int, pages: int, kept: float = 0.34) -> Engine:
    """An engine with memory for so many slots and pages, and a part more for kept states."""
    layout = engine_of(layers, max_running=slots).pool.layout
    memory = int((slots * layout.state_bytes + pages * layout.page_bytes) * (1 + kept)) + 3
    return engine_of(layers, memory=beside(layers, slots) + memory, max_running=slots, context=64)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(40, 300) for _ in range(length)]


def plain(count: int, **options: object) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": count, "stop_ids": frozenset(), **options})  # type: ignore[arg-type]


def drive(engine: Engine) -> None:
    """Until nothing is left to do."""
    for _ in range(PATIENCE):
        if not engine.step():
            return
    raise AssertionError(f"it does not end: {engine.metrics()}")


def at_rest(engine: Engine) -> None:
    """Nothing runs, and all memory comes back once nothing is kept."""
    assert not engine.busy and not engine.scheduler._groups
    engine.cache.clear()
    assert engine.pool.free_slots == engine.pool.num_slots
    assert engine.pool.allocator.free == engine.pool.allocator.num_pages


@dataclass
class Request:
    """What was asked, and what came of it."""

    prompt: list[int]
    params: SamplingParams
    marks: list[int]
    answers: list[Sequence] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)


def random_request(draw: random.Random, longest: int, prefixes: list[list[int]]) -> Request:
    start = draw.choice(prefixes)
    prompt = [*start[: draw.randrange(1, len(start))], *prompt_of(draw.randrange(0, 20), draw.randrange(3))]
    if draw.random() < 0.3:
        prompt += [ASSISTANT, *draw.choice([[], [OPEN], [OPEN, 77, 78]])]
    room = longest - len(prompt)
    prompt, room = (prompt, room) if room > 1 else (prompt[-longest // 2 :], longest // 2)
    params = SamplingParams(
        max_new_tokens=draw.randrange(1, min(room, 70) + 1),
        temperature=draw.choice([0.0, 1.0, 1.0]),
        seed=draw.randrange(5),
        n=draw.choice([1, 1, 2, 4]),
        stop_ids=draw.choice([None, frozenset()]),
        grammar=draw.choice([None, None, *GRAMMARS]),
        thinking_budget=draw.choice([None, None, 0, 3, 20]),
        routes=draw.random() < 0.2,
        cache=draw.random() < 0.5,
    )
    marks = sorted({draw.randrange(1, len(prompt) + 1) for _ in range(draw.choice([0, 0, 3]))})
    return Request(prompt, params, marks)


class Crowd:
    """Requests at random moments in a tight engine, and the same ones alone in a roomy engine."""

    def __init__(self, layers: str, seed: int) -> None:
        self.draw = random.Random(f"{layers} {seed}")
        slots, pages = self.draw.choice([1, 2, 5, 9]), self.draw.choice([2, 3, 5, 9]) if "A" in layers else 0
        self.layers = layers
        self.engine = tight_engine(layers, slots, pages, self.draw.choice([0.0, 0.3, 2.0]))
        self.requests: list[Request] = []
        self.longest = min(self.engine.longest or 300, 300)
        self.prefixes = [prompt_of(self.longest, seed) for seed in range(2)]
        self.alone = engine_of(layers)

    def run(self, count: int) -> None:
        """Ask `count` requests while steps go on, then drive to the end."""
        engine, draw = self.engine, self.draw
        while len(self.requests) < count:
            request = random_request(draw, self.longest, self.prefixes)
            request.answers = engine.submit(
                request.prompt, request.params, marks=request.marks, sink=request.deltas.append
            )
            self.requests.append(request)
            for _ in range(draw.choice([0, 0, 1, 5, 30])):
                engine.step()
            running = [answer for request in self.requests for answer in request.answers if answer.finish is None]
            if running and draw.random() < 0.25:
                engine.cancel(draw.choice(running))
            if draw.random() < 0.1:
                version = engine.weights_version + 1
                engine.load_weights(model_of(self.layers, seed=version % 2).state_dict().items(), version)
        drive(engine)

    def check(self) -> int:
        """All has ended, and everything written is what it is alone; returns how many texts went another way."""
        differing = 0
        for request in self.requests:
            for place, answer in enumerate(request.answers):
                got = answer.completion()
                assert got.finish is not None
                told = [delta for delta in request.deltas if delta.index == place]
                assert tuple(id for delta in told for id in delta.ids) == got.ids
                assert [delta.finish for delta in told if delta.finish is not None] == [got.finish]
                assert told[-1].finish == got.finish and "".join(delta.text for delta in told) == got.text or got.finish == "cancelled"
                check_budget(request, got)
                differing += self.differs(request, place, got)
        return differing

    def differs(self, request: Request, place: int, got: Completion) -> bool:
        """Whether an answer is another than alone, where rounding decided; an error if it was not that."""
        if self.alone.weights_version % 2 != got.weights_version % 2:
            weights = model_of(self.layers, seed=got.weights_version % 2)
            self.alone.load_weights(weights.state_dict().items(), got.weights_version)
        params = replace(request.params, n=1, seed=request.params.seed + place, cache=False)
        (answer,) = self.alone.submit(request.prompt, params, marks=request.marks)
        drive(self.alone)
        want = answer.completion()
        cut = len(got.ids) if got.finish == "cancelled" else None
        assert got.finish in (want.finish, "cancelled") or request.params.cache, (got, want)
        if got.ids == want.ids[:cut]:
            assert got.logprobs == pytest.approx(want.logprobs[:cut], abs=1e-4)
            if not request.params.cache:
                assert got.logprobs == want.logprobs[:cut], "without kept states it is the same to the last bit"
            if got.finish != "cancelled" and want.routes is not None:
                assert got.routes is not None and got.routes.shape == want.routes.shape
                if not request.params.cache:
                    assert torch.equal(got.routes, want.routes)
            return False
        assert request.params.cache, (got, want)
        return True


def check_budget(request: Request, got: Completion) -> None:
    budget = request.params.thinking_budget
    if budget is None or OPEN not in [*request.prompt, *got.ids] or ASSISTANT not in request.prompt:
        return
    ids = [*request.prompt, *got.ids]
    turn = ids[len(request.prompt) - request.prompt[::-1].index(ASSISTANT) :]
    if turn[:1] == [OPEN]:
        used = turn.index(CLOSE) - 1 if CLOSE in turn else len(turn) - 1
        given = len(request.prompt) - (len(ids) - len(turn)) - 1
        assert used <= max(budget, given)


@pytest.mark.parametrize("layers", ("MFAD", "ADAD", "MDMD"))
@pytest.mark.parametrize("seed", range(3))
def test_everything_at_once(layers: str, seed: int) -> None:
    crowd = Crowd(layers, seed)
    crowd.run(16)
    assert crowd.check() <= 1
    at_rest(crowd.engine)
    at_rest(crowd.alone)
