"""The engine under everything at once: tiny pools, unlike requests, cancels and new weights at random moments."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import pytest
import torch

from model_cases import tiny_config
from tiny import tiny_tokenizer
from turbos.common.errors import UserError
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
    # Some lengths come often, so that equal prompts meet.
    length = draw.choice([1, len(start) // 2, draw.randrange(1, len(start)), len(start) - 20])
    prompt = [*start[:length], *prompt_of(draw.choice([0, 0, 20]))]
    if draw.random() < 0.3:
        prompt += [ASSISTANT, *draw.choice([[], [OPEN], [OPEN, 77, 78]])]
    room = longest - len(prompt)
    prompt, room = (prompt, room) if room > 1 else (prompt[-longest // 2 :], longest // 2)
    params = SamplingParams(
        max_new_tokens=draw.randrange(1, min(room, 100) + 1),
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
        slots, pages = self.draw.choice([2, 5, 9]), self.draw.choice([2, 3, 4, 6]) if "A" in layers else 0
        self.layers = layers
        self.engine = tight_engine(layers, slots, pages, self.draw.choice([0.0, 0.34, 0.7]))
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
            for _ in range(draw.choice([0, 0, 0, 1, 9])):
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
                assert told[-1].finish == got.finish and "".join(delta.text for delta in told) == got.text
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


CROWDS = (("MFAD", 134), ("MFAD", 139), ("MFAFMD", 137), ("MFAFMD", 139), ("ADAD", 133), ("ADAD", 140), ("MDMD", 124))
"""Of 160 that were tried, those with the most preemptions, one with a single page, one with a single slot."""


@pytest.mark.parametrize(("layers", "seed"), CROWDS)
def test_everything_at_once(layers: str, seed: int) -> None:
    crowd = Crowd(layers, seed)
    crowd.run(10)
    assert crowd.check() <= 1
    assert crowd.engine.metrics().preemptions > 0 or (layers, seed) in (("ADAD", 140), ("MDMD", 124))
    at_rest(crowd.engine)
    at_rest(crowd.alone)


def within(seconds: float, work: Callable[[], object]) -> None:
    """Run in a thread that may hang without the tests hanging with it."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "it hangs"


def once(model: LanguageModel, call: int, action: Callable[[], object]) -> None:
    """Do something in the midst of the model's call number `call` from now, when all but the last sublayer are done."""
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(1)
        if len(calls) == call:
            action()

    model.sublayers[-1].register_forward_pre_hook(hook)


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_sink_that_fails_costs_nobody_else_anything() -> None:
    engine, params = engine_of(), plain(9, temperature=1.0, n=3)
    want = engine_of().generate([prompt_of(20)], params)
    deltas: list[Delta] = []

    def sink(delta: Delta) -> None:
        if delta.index == 0 and len(deltas) == 6:
            raise OSError("nobody listens")
        deltas.append(delta)

    answers = engine.submit(prompt_of(20), params, sink=sink)
    with pytest.raises(OSError, match="nobody listens"):
        drive(engine)
    drive(engine)
    assert [answer.completion().ids for answer in answers] == [one.ids for one in want]
    for place in (1, 2):
        assert tuple(id for delta in deltas if delta.index == place for id in delta.ids) == want[place].ids
    at_rest(engine)


@pytest.mark.parametrize("stop_after", (1, 4))
def test_a_sink_may_cancel_the_siblings(stop_after: int) -> None:
    engine, deltas = engine_of(), list[Delta]()

    def sink(delta: Delta) -> None:
        deltas.append(delta)
        if delta.index == 1 and sum(one.index == 1 for one in deltas) == stop_after:
            for answer in answers:
                engine.cancel(answer)

    answers = engine.submit(prompt_of(20), plain(9, n=3), sink=sink)
    drive(engine)
    assert [sum(one.finish == "cancelled" for one in deltas if one.index == place) for place in range(3)] == [1, 1, 1]
    assert all(sum(len(one.ids) for one in deltas if one.index == place) <= stop_after + 1 for place in range(3))
    for answer in answers:
        told = [delta for delta in deltas if delta.index == answer.writer.place]
        assert told[-1].finish == "cancelled" and sum(len(one.ids) for one in told) == len(answer.completion().ids)
    at_rest(engine)


@pytest.mark.parametrize("call", (1, 2, 3, 5))
def test_an_interrupted_step_leaves_no_half_written_state(call: int) -> None:
    engine, params = engine_of("MDMFAD", path="torch"), plain(8, temperature=1.0)
    (want,) = engine_of("MDMFAD", path="torch").generate([prompt_of(90)], params)
    once(engine.model, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([prompt_of(90)], params)
    (got,) = engine.generate([prompt_of(90)], params)
    assert got.ids == want.ids and got.logprobs == pytest.approx(want.logprobs, abs=1e-5)
    at_rest(engine)


@pytest.mark.parametrize("call", (1, 2, 4, 6))
def test_answers_go_on_after_a_failed_step(call: int) -> None:
    engine, params = engine_of("MDMFAD", path="torch"), plain(8, temperature=1.0, cache=False)
    want = engine_of("MDMFAD", path="torch").generate([prompt_of(40), prompt_of(50, 1)], params)
    answers = [answer for prompt in (prompt_of(40), prompt_of(50, 1)) for answer in engine.submit(prompt, params)]
    once(engine.model, call, interrupt)
    with pytest.raises(KeyboardInterrupt):
        drive(engine)
    drive(engine)
    assert [answer.completion().ids for answer in answers] == [one.ids for one in want]
    at_rest(engine)


def test_cancelling_in_the_midst_of_a_step_waits_for_its_end() -> None:
    engine = engine_of(path="torch")
    deltas: list[Delta] = []
    answers = engine.submit(prompt_of(20), plain(9, n=2), sink=deltas.append)
    # As a stream does that is collected as garbage, or a signal's handler.
    once(engine.model, 4, lambda: engine.cancel(answers[0]))
    drive(engine)
    assert [answer.finish for answer in answers] == ["cancelled", "length"]
    assert [delta.finish for delta in deltas if delta.index == 0][-1] == "cancelled"
    at_rest(engine)


def test_new_weights_do_not_wait_for_what_was_cancelled() -> None:
    engine = engine_of()

    def sink(delta: Delta) -> None:
        if delta.finish is None:
            within(20, lambda: engine.cancel(answer))

    (answer,) = engine.submit(prompt_of(20), plain(60))
    answer.sink = sink
    engine.step()
    answer.cancelled = False
    engine.load_weights(model_of("MFAD", 1).state_dict().items(), version=1)
    assert answer.finish == "cancelled" and len(answer.writer.ids) < 5
    at_rest(engine)


def test_age_is_the_place_in_the_line_whichever_thread_came_first() -> None:
    engine = tight_engine("MFAD", slots=2, pages=3)
    submitted = [engine.submit(prompt_of(20, seed), plain(100, cache=False))[0] for seed in range(3)]
    # As two threads may leave it that ask at the same time.
    engine._inbox[1], engine._inbox[2] = engine._inbox[2], engine._inbox[1]
    while not engine.metrics().preemptions:
        assert engine.step(), "memory was to be short"
    within(60, lambda: engine.load_weights(model_of("MFAD", 1).state_dict().items(), version=1))
    drive(engine)
    assert sorted(answer.completion().weights_version for answer in submitted) == [0, 0, 1]
    at_rest(engine)


def test_new_weights_of_the_same_version_are_other_weights(tmp_path: Path) -> None:
    engine, path = engine_of(), tmp_path / "session"
    engine.generate([prompt_of(20)], plain(4))
    engine.save_session(path, prompt_of(20))
    engine.load_weights(model_of("MFAD", 1).state_dict().items(), version=0)
    with pytest.raises(UserError, match="other weights"):
        engine.load_session(path)


def test_a_session_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    engine, path = engine_of(), tmp_path / "session"
    engine.generate([prompt_of(20)], plain(4))
    engine.save_session(path, prompt_of(20))
    layout = engine.pool.layout
    memory = beside("MFAD", 1) + layout.state_bytes + 4 * layout.page_bytes
    small = engine_of(memory=memory, max_running=1, context=8192)
    with pytest.raises(UserError, match=r"session: a state takes .* more memory"):
        small.load_session(path)
    at_rest(small)


def test_routes_of_an_answer_outlive_new_weights() -> None:
    engine = engine_of(max_running=1)
    params = plain(5, n=2, routes=True, temperature=1.0)
    (want, _) = engine_of(max_running=1).generate([prompt_of(20)], params)
    first, second = engine.submit(prompt_of(20), params)
    while first.finish is None:
        engine.step()
    engine.load_weights(model_of("MFAD", 1).state_dict().items(), version=1)
    drive(engine)
    got = first.completion()
    assert got.routes is not None and want.routes is not None and torch.equal(got.routes, want.routes)
    assert second.completion().weights_version == 1
    at_rest(engine)


def test_only_requests_that_read_alike_share_a_prompt() -> None:
    engine, prompt = engine_of(), prompt_of(90)
    engine.generate([prompt[:20]], plain(1))
    kinds = [(cached, marks) for cached in (True, False) for marks in ((), (37,))]
    requests = [engine.submit(prompt, plain(2, cache=cached), marks=marks) for cached, marks in kinds]
    drive(engine)
    # The second finds what the first has kept of the whole prompt by then; those without the cache read it all.
    assert [answer.completion().cached_tokens for (answer,) in requests] == [20, 90, 0, 0]
    at_rest(engine)


def test_a_request_that_waits_is_not_looked_up_again_and_again() -> None:
    engine = tight_engine("MFAD", slots=4, pages=3)
    for seed in range(3):
        engine.submit(prompt_of(60, seed), plain(60))
    drive(engine)
    cache = engine.metrics().cache
    assert cache.hits + cache.misses <= 3 + 3 * engine.metrics().preemptions
    at_rest(engine)


def test_what_an_engine_cannot_be() -> None:
    with pytest.raises(UserError, match=r"end token 999 lies outside vocab_size 384"):
        Engine(model_of("MFAD"), eos_ids={0, 999})
    for device in ("cuda:7", "nowhere"):
        with pytest.raises(UserError, match=f"device '{device}' is not here"):
            engine_of(path="torch", device=device)  # type: ignore[arg-type]
