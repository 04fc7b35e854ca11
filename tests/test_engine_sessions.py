"""Sessions beside a busy engine: whoever saves or loads gets a turn, and what an answer leaves is there to be saved."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from serve_cases import tiny_engine
from turbos.common.errors import UserError
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.stream import AsyncEngine
from turbos.model.lm import LanguageModel

PROMPT = tuple(range(40, 140))
LONG = SamplingParams(max_new_tokens=800, stop_ids=frozenset())


def test_kept_is_the_longest_beginning() -> None:
    engine = tiny_engine()
    assert engine.kept(PROMPT) == 0
    (answer,) = engine.generate([PROMPT], SamplingParams(max_new_tokens=5, stop_ids=frozenset()))
    metrics = engine.metrics().cache
    ids = (*PROMPT, *answer.ids)
    assert engine.kept(ids) == engine.kept((*ids, 9, 9)) == 104 and engine.kept(PROMPT) == 100
    assert engine.kept((*PROMPT, answer.ids[0] ^ 1)) == 100 and engine.kept((9, *PROMPT)) == 0
    # To look is not to use.
    assert engine.metrics().cache == metrics
    engine.cache.clear()
    assert engine.kept(ids) == 0


def test_whoever_asks_gets_a_turn_beside_a_busy_driver(tmp_path: Path) -> None:
    """At the next step, where a plain lock lets a driver that hardly ever lets go have forty first."""
    engine = tiny_engine(path="fused")
    engine.generate([PROMPT], SamplingParams(max_new_tokens=2))

    def work() -> list[int]:
        waits = []
        for _ in range(60):
            before = engine.metrics().steps
            engine.kept(PROMPT)
            waits.append(engine.metrics().steps - before)
            time.sleep(0.002)
        for number in range(3):
            assert engine.save_session(tmp_path / f"{number}", PROMPT) == len(PROMPT)
            assert engine.load_session(tmp_path / f"{number}") == PROMPT
        return waits

    async def run() -> tuple[list[int], bool]:
        async with AsyncEngine(engine) as running:
            with running.open(PROMPT[:50], LONG) as stream:
                await stream.get_all()
                waits = await asyncio.to_thread(work)
                return waits, stream.answers[0].finish is None

    waits, still_runs = asyncio.run(run())
    assert still_runs and max(waits) <= 1, waits


def test_a_session_saved_beside_others_is_the_same_to_the_bit(tmp_path: Path) -> None:
    """Pages that a saved state holds are not written by whoever goes on from them."""
    params = SamplingParams(max_new_tokens=30, stop_ids=frozenset())
    engine = tiny_engine()
    engine.generate([PROMPT], SamplingParams(max_new_tokens=1))
    engine.save_session(tmp_path / "alone", PROMPT)

    async def run() -> None:
        async with AsyncEngine(engine) as running:
            with running.open(PROMPT, LONG) as stream:
                await stream.get_all()
                for number in range(5):
                    await asyncio.to_thread(engine.save_session, tmp_path / f"{number}", PROMPT)

    asyncio.run(run())
    wanted = load_file(tmp_path / "alone")
    for number in range(5):
        found = load_file(tmp_path / f"{number}")
        assert set(found) == set(wanted) and all(torch.equal(found[name], wanted[name]) for name in wanted)
    fresh = tiny_engine()
    fresh.load_session(tmp_path / "4")
    (answer,), (again,) = engine.generate([PROMPT], params), fresh.generate([PROMPT], params)
    assert answer.ids == again.ids and answer.logprobs == again.logprobs and again.cached_tokens == len(PROMPT)


def test_an_answer_that_was_stopped_leaves_its_state() -> None:
    engine = tiny_engine()
    (answer,) = engine.submit(PROMPT, LONG)
    for _ in range(20):
        engine.step()
    engine.cancel(answer)
    engine.step()
    assert answer.finish == "cancelled"
    written = answer.completion().ids
    assert len(written) > 10 and engine.kept((*PROMPT, *written)) == len(PROMPT) + len(written) - 1
    (first,) = engine.generate([(*PROMPT, *written)], SamplingParams(max_new_tokens=5))
    (alone,) = tiny_engine().generate([(*PROMPT, *written)], SamplingParams(max_new_tokens=5))
    assert first.ids == alone.ids and first.cached_tokens == len(PROMPT) + len(written) - 1


def test_an_answer_stopped_while_its_prompt_is_read_leaves_what_was_read() -> None:
    engine = tiny_engine(segment=10)
    (answer,) = engine.submit(PROMPT, LONG)
    engine.step()
    engine.cancel(answer)
    engine.step()
    assert answer.finish == "cancelled" and engine.kept(PROMPT) == 10
    (again,) = engine.generate([PROMPT], LONG)
    (alone,) = tiny_engine(segment=10).generate([PROMPT], LONG)
    assert again.cached_tokens == 10 and again.ids == alone.ids


def test_an_answer_stopped_before_anything_was_read_leaves_nothing() -> None:
    engine = tiny_engine()
    (answer,) = engine.submit(PROMPT, LONG)
    engine.cancel(answer)
    assert answer.finish == "cancelled" and engine.kept(PROMPT) == 0 and engine.metrics().cache.snapshots == 0


def test_weights_that_change_while_a_session_is_read_refuse_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine()
    engine.generate([PROMPT], SamplingParams(max_new_tokens=2))
    engine.save_session(tmp_path / "a", PROMPT)
    own: LanguageModel = engine.model
    named = {**dict(own.named_parameters()), **dict(own.named_buffers())}

    import turbos.engine.engine as engine_module

    read = engine_module.read_session

    def late(*args: object) -> object:
        tensors = read(*args)  # type: ignore[arg-type]
        engine.load_weights({name: tensor.clone() for name, tensor in named.items()}.items(), version=2)
        return tensors

    monkeypatch.setattr(engine_module, "read_session", late)
    with pytest.raises(UserError, match="weights became others"):
        engine.load_session(tmp_path / "a")
    assert engine.kept(PROMPT) == 0
