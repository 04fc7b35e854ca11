"""Rows of `turbos bench decode` about the engine itself: what it adds to the fused step, and what it is for.

`engine int8 b<batch> t<threads>` is the rate of whole answers, sampling and bookkeeping included; its ratio to
`fused step` is a share, below 1 by what the engine costs. `engine fork` is the time from a prompt to the first tokens
of eight answers; its ratio to `prefills` says how many times longer eight prompts take. `engine 64 requests` are of
unlike lengths and come at once: the value is the longest time to finish over the median, large where some starve.

    rows = engine_rows(EngineBench.of(model, threads=2), prompt_ids, 32, {1: sessions}, rounds=7)
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from turbos.bench.peers import interleave_timed, seconds_of
from turbos.bench.prefill import prompt
from turbos.bench.rows import Row
from turbos.bench.sessions import Sessions
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.sequence import Delta
from turbos.model.lm import LanguageModel

MEMORY, CONTEXT = 3 * 2**30, 2048
FORK = 8
REQUESTS, SHORTEST, LONGEST, ANSWER = 64, 8, 96, 32


@dataclass(frozen=True)
class EngineBench:
    """An engine with a copy of the model in int8."""

    engine: Engine
    threads: int

    @classmethod
    def of(cls, model: LanguageModel, threads: int) -> EngineBench:
        """Within `MEMORY`, so that every machine has the same plan."""
        config = EngineConfig(memory=MEMORY, context=CONTEXT, precision="int8", threads=threads)
        return cls(Engine(copy.deepcopy(model), config=config), threads)

    def decode_seconds(self, tokens: Sequence[int], steps: int, batch: int) -> float:
        """Seconds of `steps` tokens for each of `batch` answers to one prompt, from the last one's first token on."""
        moments: list[list[float]] = [[] for _ in range(batch)]
        params = SamplingParams(max_new_tokens=steps + 1, n=batch)

        def note(delta: Delta) -> None:
            moments[delta.index].append(time.perf_counter())

        self._run([(tokens, params)], note)
        start, end = max(own[0] for own in moments), max(own[-1] for own in moments)
        counted = sum(moment > start for own in moments for moment in own)
        return (end - start) * steps * batch / counted

    def first_tokens_seconds(self, tokens: Sequence[int], prompts: int, answers: int) -> float:
        """Seconds until each of `prompts` unlike requests has the first token of `answers` answers."""
        params = SamplingParams(max_new_tokens=1, n=answers, cache=False)
        requests = [([*tokens[place:], *tokens[:place]], params) for place in range(prompts)]
        return seconds_of(lambda: self._run(requests, lambda delta: None))

    def finish_times(self) -> Sequence[float]:
        """Seconds from the moment when all requests come to the end of each."""
        ids = prompt(self.engine.model.config.vocab_size, REQUESTS + LONGEST)
        lengths = [SHORTEST + place * (LONGEST - SHORTEST) // REQUESTS for place in range(REQUESTS)]
        ended: list[float] = []

        def note(delta: Delta) -> None:
            if delta.finish:
                ended.append(time.perf_counter())

        start = time.perf_counter()
        params = SamplingParams(max_new_tokens=ANSWER, cache=False)
        # The longest and the shortest come in turn.
        order = sorted(range(REQUESTS), key=lambda place: (place % 7, place))
        self._run([(ids[place : place + lengths[place]], params) for place in order], note)
        return [moment - start for moment in ended]

    def _run(self, requests: Sequence[tuple[Sequence[int], SamplingParams]], sink: Callable[[Delta], None]) -> None:
        for tokens, params in requests:
            self.engine.submit(tokens, params, sink=sink)
        while self.engine.step():
            pass


def engine_rows(
    bench: EngineBench, tokens: Sequence[int], steps: int, sessions: Mapping[int, Sessions], rounds: int
) -> Iterator[Row]:
    """All rows; `sessions` by batch are the fused step's, after the same prompt."""
    for batch, bare in sessions.items():
        work = {
            "engine": partial(bench.decode_seconds, tokens, steps, batch),
            "fused step": partial(bare.seconds, steps),
        }
        times = interleave_timed(work, rounds)
        name = f"engine int8 b{batch} t{bench.threads}"
        rate = batch * steps / times.median("engine")
        yield Row(name, rate, "tok/s", {"fused step": times.ratio("engine", "fused step")})
    fork = {
        "fork": partial(bench.first_tokens_seconds, tokens, 1, FORK),
        "prefills": partial(bench.first_tokens_seconds, tokens, FORK, 1),
    }
    times = interleave_timed(fork, max(1, rounds // 2))
    ratios = {"prefills": times.ratio("fork", "prefills")}
    yield Row(f"engine fork {FORK} of {len(tokens)}", 1000 * times.median("fork"), "ms", ratios)
    finished = bench.finish_times()
    yield Row(f"engine {REQUESTS} requests", max(finished) / statistics.median(finished), "longest / median")
