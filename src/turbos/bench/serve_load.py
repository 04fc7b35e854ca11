"""Many chats at once: the rate of all together, the first token, the time between tokens, and whether some starve.

In each round the engine alone, the server and llama-server are given the same requests, one program after the other in
an order that rotates; every round has other requests, so that none finds what an earlier one left. The server gets
chats; llama-server gets the tokens that these chats become, so that nothing of its templates is measured.

    figures = measure_load(contestants, plan)
    rows = load_rows(figures, plan.streams)
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from turbos.bench.peers import Times, interleave_timed
from turbos.bench.rows import Row
from turbos.bench.serve_client import Address, Streamed, ask_all
from turbos.bench.serve_plan import ServePlan, say
from turbos.bench.serve_processes import NAME, Child

OURS, ENGINE, PEER = "serve", "engine", "llama-server"
PERCENTILES = (50, 90, 99)


@dataclass
class Heard:
    """What the client heard of one program in all rounds, in seconds; `spread` is the longest over the median."""

    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)

    def add(self, answers: Sequence[Streamed]) -> None:
        """A round more."""
        self.firsts += [answer.first for answer in answers]
        self.gaps += [gap for answer in answers for gap in answer.gaps]
        ends = [answer.end for answer in answers]
        self.spread.append(max(ends) / statistics.median(ends))


@dataclass(frozen=True)
class Load:
    """Figures of all programs: tokens of a round, seconds of each round, what was heard."""

    tokens: int
    times: Times
    heard: Mapping[str, Heard]


@dataclass(frozen=True)
class Contestants:
    """Who is measured; without llama-server the peer is None."""

    engine: Child
    server: Address
    peer: Address | None


def measure_load(who: Contestants, plan: ServePlan) -> Load:
    """Run all rounds."""
    heard = {OURS: Heard(), ENGINE: Heard(), **({PEER: Heard()} if who.peer is not None else {})}
    prompts: dict[int, Sequence[Sequence[int]]] = {}

    def engine(number: int) -> float:
        answer = who.engine.ask({"texts": plan.requests(number), "answer": plan.answer})
        _require_tokens(ENGINE, answer["tokens"], plan)
        prompts[number] = answer["prompts"]
        if number:
            heard[ENGINE].firsts += answer["firsts"]
        return float(answer["seconds"])

    def server(number: int) -> float:
        bodies = [chat_body(text, plan.answer) for text in plan.requests(number)]
        return _hear(OURS, who.server, "/v1/chat/completions", bodies, number)

    def peer(number: int) -> float:
        assert who.peer is not None
        if number not in prompts:
            prompts[number] = who.engine.ask({"texts": plan.requests(number), "answer": 1})["prompts"]
        bodies = [text_body(ids, plan.answer) for ids in prompts[number]]
        return _hear(PEER, who.peer, "/v1/completions", bodies, number)

    def _hear(name: str, address: Address, path: str, bodies: Sequence[object], number: int) -> float:
        answers = asyncio.run(ask_all(address, path, bodies))
        _require_tokens(name, sum(answer.tokens for answer in answers), plan)
        if number:
            heard[name].add(answers)
        return max(answer.end for answer in answers)

    work = {OURS: server, ENGINE: engine, **({PEER: peer} if who.peer is not None else {})}
    say(f"{plan.streams} chats at once, {plan.answer} tokens each, {plan.rounds} rounds: {', '.join(work)}")
    times = interleave_timed({name: _numbered(run) for name, run in work.items()}, plan.rounds)
    return Load(plan.streams * plan.answer, times, heard)


def _numbered(run: Callable[[int], float]) -> Callable[[], float]:
    """The same, told the number of the call: 0 is the unmeasured one."""
    numbers = iter(range(1 << 30))
    return lambda: run(next(numbers))


def _require_tokens(name: str, tokens: int, plan: ServePlan) -> None:
    wanted = plan.streams * plan.answer
    if tokens != wanted:
        raise RuntimeError(f"bench serve: {name} wrote {tokens} tokens instead of {wanted}")


def chat_body(text: str, answer: int) -> dict[str, Any]:
    """A streamed chat that goes on to its last token."""
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def text_body(ids: Sequence[int], answer: int) -> dict[str, Any]:
    """The same as tokens that are continued."""
    return {
        "prompt": list(ids),
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def load_rows(load: Load, streams: int) -> Iterator[Row]:
    """All rows; ratios above 1 where the server is better."""
    peers = [name for name in load.times.seconds if name != OURS]
    ratios = {name: load.times.ratio(OURS, name) for name in peers}
    yield Row(f"serve aggregate {streams}", load.tokens / load.times.median(OURS), "tok/s", ratios)
    ours = load.heard[OURS]
    for percent in PERCENTILES:
        value = percentile(ours.firsts, percent)
        ratios = {name: percentile(load.heard[name].firsts, percent) / value for name in peers}
        yield Row(f"serve first token p{percent} {streams}", 1000 * value, "ms", ratios)
    for percent in PERCENTILES:
        value = percentile(ours.gaps, percent)
        ratios = {name: percentile(load.heard[name].gaps, percent) / value for name in peers if load.heard[name].gaps}
        yield Row(f"serve between tokens p{percent}", 1000 * value, "ms", ratios)
    spread = statistics.median(ours.spread)
    ratios = {name: statistics.median(load.heard[name].spread) / spread for name in peers if load.heard[name].spread}
    yield Row(f"serve longest / median {streams}", spread, "times", ratios)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed.

    >>> percentile([4.0, 1.0, 3.0, 2.0], 50), percentile([4.0, 1.0, 3.0, 2.0], 99)
    (2.0, 4.0)
    """
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]
