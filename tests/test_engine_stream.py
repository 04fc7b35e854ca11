"""The engine under asyncio: many streams, and every way of not waiting for the end of one."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import torch

from model_cases import tiny_config
from turbos.common.errors import UserError
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.sequence import Delta
from turbos.engine.stream import AsyncEngine
from turbos.model.lm import LanguageModel

PATIENCE = 60.0
"""Seconds after which something that should have ended hangs."""
LONG = SamplingParams(max_new_tokens=4000, temperature=1.0, stop_ids=frozenset())


def model_of(seed: int = 0) -> LanguageModel:
    return LanguageModel(tiny_config("MFAD")).init_weights(seed)


def engine_of(path: str = "torch", **options: Any) -> Engine:
    settings = {"memory": 1 << 26, "precision": "fp32", "path": path, "threads": 1, **options}
    return Engine(model_of(), config=EngineConfig(**settings))


def prompts_of(count: int) -> list[list[int]]:
    draw = random.Random(0)
    return [[draw.randrange(61) for _ in range(3 + 5 * place % 70)] for place in range(count)]


def short(seed: int, **changes: Any) -> SamplingParams:
    return SamplingParams(
        **{"max_new_tokens": 12, "temperature": 1.0, "seed": seed, "stop_ids": frozenset(), **changes}
    )


async def gathered(deltas: AsyncIterator[Delta]) -> dict[int, list[Delta]]:
    """All deltas of a request, by answer."""
    found: dict[int, list[Delta]] = {}
    async for delta in deltas:
        found.setdefault(delta.index, []).append(delta)
    return found


def ids_of(deltas: list[Delta]) -> tuple[int, ...]:
    return tuple(id for delta in deltas for id in delta.ids)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end, or fail: nothing here may hang."""
    return asyncio.run(asyncio.wait_for(work, PATIENCE))


async def until(reached: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + PATIENCE / 2
    while not reached():
        assert time.monotonic() < end, "it never came"
        await asyncio.sleep(0.002)


def nothing_is_taken(engine: Engine) -> bool:
    """Every slot is free, and every page that no kept state holds."""
    metrics = engine.metrics()
    running = metrics.waiting + metrics.reading + metrics.writing
    return not engine.busy and running == 0 and metrics.free_slots == engine.pool.num_slots


def all_memory_comes_back(engine: Engine) -> bool:
    engine.cache.clear()
    return nothing_is_taken(engine) and engine.pool.allocator.free == engine.pool.allocator.num_pages


@pytest.mark.parametrize("path", ("torch", "fused"))
def test_many_streams_at_once_are_the_answers_of_generate(path: str) -> None:
    prompts, params = prompts_of(40), [short(place, n=1 + place % 3) for place in range(40)]
    want = iter(engine_of(path).generate(prompts, params))

    async def work() -> list[dict[int, list[Delta]]]:
        async with AsyncEngine(engine_of(path)) as running:
            streams = [gathered(running.stream(*each)) for each in zip(prompts, params, strict=True)]
            return list(await asyncio.gather(*streams))

    differing = 0
    for deltas, its in zip(run(work()), params, strict=True):
        assert sorted(deltas) == list(range(its.n))
        for index in sorted(deltas):
            assert [delta.finish for delta in deltas[index][:-1]] == [None] * (len(deltas[index]) - 1)
            assert deltas[index][-1].finish == "length"
            differing += ids_of(deltas[index]) != next(want).ids
    # In the plain step a crowd's shape decides how sums are rounded: a tie may fall the other way.
    assert differing <= (0 if path == "fused" else 1)


def test_leaving_the_loop_early_frees_the_row_and_leaves_the_others() -> None:
    engine, (prompt, other) = engine_of(), prompts_of(2)
    want = engine_of().generate([other], short(1))[0].ids

    async def work() -> None:
        async with AsyncEngine(engine) as running:
            beside = asyncio.create_task(gathered(running.stream(other, short(1))))
            seen = 0
            async for _ in running.stream(prompt, LONG):
                seen += 1
                if seen == 3:
                    break
            assert ids_of((await beside)[0]) == want
            await until(lambda: nothing_is_taken(engine))

    run(work())
    assert engine.metrics().written_tokens < 200
    assert all_memory_comes_back(engine)


def test_a_stream_that_nobody_begins_asks_nothing() -> None:
    engine = engine_of()

    async def work() -> None:
        async with AsyncEngine(engine) as running:
            running.stream(prompts_of(1)[0], LONG)
            await asyncio.sleep(0.05)

    run(work())
    assert engine.metrics().read_tokens == 0


@pytest.mark.parametrize("moment", range(0, 30, 3))
def test_a_task_cancelled_at_any_moment_frees_its_rows(moment: int) -> None:
    engine = engine_of(segment=8)
    long_prompt = list(range(61)) * 3

    async def work() -> None:
        async with AsyncEngine(engine) as running:
            task = asyncio.create_task(gathered(running.stream(long_prompt, LONG.__class__(max_new_tokens=4000, n=2))))
            await asyncio.sleep(0)
            await until(lambda: engine.metrics().steps >= moment)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: nothing_is_taken(engine))

    run(work())
    assert all_memory_comes_back(engine)


def test_closing_ends_open_streams_as_cancelled() -> None:
    engine = engine_of()

    async def work() -> list[dict[int, list[Delta]]]:
        running = AsyncEngine(engine).start()
        tasks = [asyncio.create_task(gathered(running.stream(prompt, LONG))) for prompt in prompts_of(70)]
        await until(lambda: engine.metrics().written_tokens > 100)
        await asyncio.to_thread(running.close)
        with pytest.raises(UserError, match="closed"):
            await gathered(running.stream([1], LONG))
        with pytest.raises(UserError, match="closed"):
            running.start()
        running.close()
        return list(await asyncio.gather(*tasks))

    for deltas in run(work()):
        assert deltas[0][-1].finish == "cancelled"
    assert all_memory_comes_back(engine)


def test_no_stream_slips_in_behind_the_last_step() -> None:
    engine = engine_of()

    async def work(running: AsyncEngine, delay: float) -> int:
        async def ask() -> None:
            # Opened before, while or after it closes: it ends in any case.
            try:
                await gathered(running.stream([1, 2, 3], LONG))
            except UserError as error:
                assert "closed" in str(error)

        closing = asyncio.create_task(asyncio.to_thread(running.close))
        tasks = []
        while not closing.done():
            tasks.append(asyncio.create_task(ask()))
            await asyncio.sleep(delay)
        tasks.append(asyncio.create_task(ask()))
        await asyncio.gather(*tasks)
        return len(tasks)

    asked = sum(run(work(AsyncEngine(engine).start(), delay)) for delay in [0.0] * 30 + [1e-4] * 10)
    assert asked >= 80 and all_memory_comes_back(engine)


def test_an_engine_that_closes_while_a_request_is_filed_lets_it_go() -> None:
    engine = engine_of()
    running, file = AsyncEngine(engine).start(), engine.submit

    def file_late(*args: Any, **options: Any) -> Any:
        running.close()
        return file(*args, **options)

    engine.submit = file_late  # type: ignore[method-assign]
    with pytest.raises(UserError, match="closed"):
        run(gathered(running.stream([1, 2, 3], LONG)))
    assert all_memory_comes_back(engine)


def fail_after(engine: Engine, tokens: int) -> None:
    """Let the model break down once it has read so many tokens."""
    seen = 0

    def count(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal seen
        seen += len(args[0])
        if seen > tokens:
            raise ArithmeticError("planted")

    engine.weights.model.sublayers[0].register_forward_pre_hook(count)


def test_a_failure_reaches_every_stream_in_every_event_loop() -> None:
    engine = engine_of()
    fail_after(engine, 800)
    running = AsyncEngine(engine).start()
    heard: list[BaseException] = []

    async def listen(prompt: list[int]) -> None:
        with pytest.raises(RuntimeError, match="the engine has failed") as caught:
            await gathered(running.stream(prompt, LONG))
        assert isinstance(caught.value.__cause__, ArithmeticError)
        heard.append(caught.value)

    async def work() -> None:
        await asyncio.gather(*(listen(prompt) for prompt in prompts_of(6)))

    threads = [threading.Thread(target=run, args=(work(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(heard) == 12
    run(listen([1, 2]))
    # Who waited has heard of it: closing adds nothing.
    running.close()
    assert nothing_is_taken(engine)


def test_a_failure_that_no_stream_heard_of_is_told_on_closing() -> None:
    engine = engine_of()
    fail_after(engine, 0)
    running = AsyncEngine(engine).start()
    engine.submit([1, 2, 3])
    running._wake.set()
    with pytest.raises(RuntimeError, match="failed"):
        running.close() if _ended(running) else None
    running.close()


def _ended(running: AsyncEngine) -> bool:
    assert running._thread is not None
    running._thread.join(PATIENCE)
    return not running._thread.is_alive()


def test_streams_from_two_event_loops() -> None:
    engine, prompts = engine_of(), prompts_of(8)
    want = [engine_of().generate([prompt], short(place))[0].ids for place, prompt in enumerate(prompts)]
    got: dict[int, tuple[int, ...]] = {}
    with_loops = AsyncEngine(engine).start()

    async def work(places: list[int]) -> None:
        found = await asyncio.gather(*(gathered(with_loops.stream(prompts[at], short(at))) for at in places))
        got.update({at: ids_of(deltas[0]) for at, deltas in zip(places, found, strict=True)})

    threads = [threading.Thread(target=run, args=(work(list(range(side, 8, 2))),)) for side in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    with_loops.close()
    assert sum(got[place] != want[place] for place in range(8)) <= 1
    assert all_memory_comes_back(engine)


def test_an_event_loop_closed_under_its_stream_leaves_no_row_taken() -> None:
    engine = engine_of()
    running = AsyncEngine(engine).start()
    loop = asyncio.new_event_loop()
    streams = [running.stream(prompt, LONG) for prompt in prompts_of(3)]
    for stream in streams:
        assert loop.run_until_complete(anext(stream)).ids
    loop.close()
    # Others go on meanwhile.
    (deltas,) = run(gathered(running.stream([5, 6], short(0)))).values()
    assert deltas[-1].finish == "length"
    run(until(lambda: nothing_is_taken(engine)))
    running.close()
    del streams, stream
    gc.collect()
    assert all_memory_comes_back(engine)


def test_two_hundred_vanishing_consumers_leave_no_row_taken() -> None:
    engine = engine_of(max_running=8)
    draw = random.Random(1)

    async def consume(running: AsyncEngine, place: int) -> None:
        stream = running.stream(prompts_of(9)[place % 9], LONG)
        patience = draw.randrange(4)
        async for _ in stream:
            if patience == 0:
                return  # the generator is left to the garbage collector
            patience -= 1

    async def vanish(running: AsyncEngine, place: int) -> None:
        task = asyncio.create_task(consume(running, place))
        await asyncio.sleep(draw.random() * 0.05)
        if place % 2:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def work() -> None:
        async with AsyncEngine(engine) as running:
            await asyncio.gather(*(vanish(running, place) for place in range(200)))
            await until(lambda: nothing_is_taken(engine))
            assert not running._streams
            (deltas,) = (await gathered(running.stream([7], short(0)))).values()
            assert deltas[-1].finish == "length"

    run(work())
    assert all_memory_comes_back(engine)


def test_new_weights_come_in_while_streams_run() -> None:
    engine, other = engine_of(), model_of(seed=1)
    wrong = {name: tensor for name, tensor in other.state_dict().items() if name != "norm_weight"}

    async def endless(running: AsyncEngine) -> None:
        for seed in range(10**6):
            await gathered(running.stream([1, 2, 3], short(seed)))

    async def work() -> dict[int, list[Delta]]:
        async with AsyncEngine(engine) as running:
            busy = [asyncio.create_task(endless(running)) for _ in range(4)]
            await until(lambda: engine.metrics().written_tokens > 50)
            with pytest.raises(UserError, match="norm_weight is missing"):
                await running.load_weights(wrong.items(), version=1)
            assert engine.metrics().weights_version == 0
            await running.load_weights(other.state_dict().items(), version=2)
            assert engine.metrics().weights_version == 2
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
            return await gathered(running.stream([9, 8, 7], short(0, temperature=0.0)))

    got = run(work())
    want = Engine(model_of(seed=1), config=engine.config).generate([[9, 8, 7]], short(0, temperature=0.0))
    assert ids_of(got[0]) == want[0].ids


def test_weights_for_a_closed_engine_are_refused() -> None:
    running = AsyncEngine(engine_of())
    with pytest.raises(UserError, match="not running"):
        run(running.load_weights([], 1))
    running.start().close()
    with pytest.raises(UserError, match="closed"):
        run(running.load_weights([], 1))


def test_what_cannot_be_asked_leaves_nothing_open() -> None:
    engine = engine_of()

    async def work() -> None:
        with pytest.raises(UserError, match="not running"):
            await gathered(AsyncEngine(engine).stream([1], LONG))
        async with AsyncEngine(engine) as running:
            for prompt, params in (([], LONG), ([10**6], LONG), ([1], SamplingParams(stop=("x",)))):
                with pytest.raises(UserError):
                    await gathered(running.stream(prompt, params))
            assert not running._streams and not engine.busy
            assert (await gathered(running.stream([1], short(0))))[0][-1].finish == "length"

    run(work())
