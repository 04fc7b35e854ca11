"""What a server asks of the engine beyond plain streams: whole answers in the last delta, single ends, checks."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from tiny import tiny_model, tiny_tokenizer
from turbos.common.errors import UserError
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.grammar import GrammarCompiler
from turbos.engine.sampling_params import Grammar, SamplingParams
from turbos.engine.sequence import Delta
from turbos.engine.stream import AsyncEngine
from turbos.text.parse import chat_tokens
from turbos.text.stream import TurnStream

TOKENIZER = tiny_tokenizer()
TAGS = chat_tokens(TOKENIZER)
PROMPT = [TAGS.roles["user"], *TOKENIZER.encode("gcd of 12 and 18?"), TAGS.end, TAGS.roles["assistant"]]
PATIENCE = 60.0


def engine_of(**options: Any) -> Engine:
    settings = {"memory": 1 << 26, "precision": "fp32", "path": "torch", "threads": 1, **options}
    return Engine(tiny_model(), TOKENIZER, EngineConfig(**settings))


def sampled(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 12, "temperature": 1.0, "seed": 3, "stop_ids": frozenset(), **changes})


def test_the_last_delta_has_the_whole_answer() -> None:
    params = sampled(n=2, logprobs=3)
    expected = engine_of().generate([PROMPT], params)
    deltas: list[list[Delta]] = [[], []]
    for delta in engine_of().stream(PROMPT, params):
        deltas[delta.index].append(delta)
    for its, completion in zip(deltas, expected, strict=True):
        assert [delta.completion is None for delta in its] == [True] * 11 + [False]
        assert its[-1].completion is not None and its[-1].completion.ids == completion.ids
        assert tuple(id for delta in its for id in delta.ids) == completion.ids
        assert tuple(top for delta in its for top in delta.tops) == completion.top_logprobs


def test_deltas_without_logprobs_have_no_tops() -> None:
    assert all(delta.tops == () for delta in engine_of().stream(PROMPT, sampled()))


@pytest.mark.parametrize(
    ("prompt", "params"),
    [
        ([], sampled()),
        ([10**6], sampled()),
        (PROMPT, sampled(max_new_tokens=10**8)),
        (PROMPT, sampled(grammar=Grammar("regex", "[0-9"))),
        (PROMPT, sampled(logit_bias={10**6: 1.0})),
    ],
)
def test_a_check_refuses_what_a_request_would(prompt: list[int], params: SamplingParams) -> None:
    engine = engine_of()
    with pytest.raises(UserError) as checked:
        engine.check(prompt, params)
    with pytest.raises(UserError) as submitted:
        engine.submit(prompt, params)
    assert str(checked.value) == str(submitted.value) and not engine.busy
    engine.check(PROMPT, sampled(grammar=Grammar("regex", "[0-9]+")))
    assert not engine.busy


def test_one_answer_of_several_is_ended_and_the_others_go_on() -> None:
    params = sampled(n=3, max_new_tokens=60)
    alone = engine_of().generate([PROMPT], params)

    async def run() -> list[Delta]:
        last: dict[int, Delta] = {}
        async with AsyncEngine(engine_of()) as running:
            with running.open(PROMPT, params) as stream:
                while len(last) < 3:
                    for delta in await stream.get_all():
                        if delta.finish is not None:
                            last[delta.index] = delta
                        elif delta.index == 1:
                            stream.cancel(1)
        return [last[index] for index in range(3)]

    ends = asyncio.run(run())
    assert [end.finish for end in ends] == ["length", "cancelled", "length"]
    for index in (0, 2):
        completion = ends[index].completion
        assert completion is not None and completion.ids == alone[index].ids


def test_leaving_a_request_cancels_it_and_a_late_reader_gets_many_at_once() -> None:
    engine = engine_of()

    async def run() -> int:
        async with AsyncEngine(engine) as running:
            with running.open(PROMPT, sampled(max_new_tokens=2000)) as stream:
                await stream.get_all()
                before = engine.metrics().written_tokens
                while engine.metrics().written_tokens < before + 20:
                    await asyncio.sleep(0.01)
                count = len(await stream.get_all())
            end = time.monotonic() + PATIENCE
            while engine.busy and time.monotonic() < end:
                await asyncio.sleep(0.01)
            assert not engine.busy and not running.failed
            return count

    assert asyncio.run(run()) >= 15


def test_only_special_tokens_that_a_grammar_names_are_let_in() -> None:
    text = f"start: <[{TAGS.call}]> /[0-9]+/ <[{TAGS.call_end}]>"
    compiler = GrammarCompiler(TOKENIZER)
    allowed = compiler.constraint(Grammar("lark", text, frozenset({TAGS.call, TAGS.call_end}))).allowed()
    assert allowed.nonzero()[0].tolist() == [TAGS.call]
    with pytest.raises(UserError, match="no token may begin it"):
        compiler.constraint(Grammar("lark", text))


def test_a_grammar_that_is_kept_does_not_wait_for_one_that_is_compiled() -> None:
    compiler, known = GrammarCompiler(TOKENIZER), Grammar("regex", "[0-9]+")
    compiler.constraint(known)
    with compiler._compiling:
        found = threading.Thread(target=compiler.constraint, args=(known,))
        found.start()
        found.join(PATIENCE)
        assert not found.is_alive()


def test_a_turn_says_where_its_next_token_stands() -> None:
    stream = TurnStream(TOKENIZER, PROMPT)
    assert stream.place == "start"
    for id, place in (
        (TAGS.think, "thinking"),
        (TOKENIZER.encode("6")[0], "thinking"),
        (TAGS.think_end, "content"),
        (TOKENIZER.encode("6")[0], "content"),
        (TAGS.call, "call"),
        (TAGS.call_end, "content"),
    ):
        stream.feed([id])
        assert stream.place == place
