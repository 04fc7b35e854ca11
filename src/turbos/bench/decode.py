"""`turbos bench decode`: one token after another, the fused step against transformers and llama.cpp, same weights.

A model of 127M active parameters writes 32 tokens after a context of 512, alone and in a batch of 8, with both cores
and with one; and a batch of 8 goes on at a context of 8192, whose keys are noise in both programs. In each round every
program runs once. A row's ratio to `llama.cpp` is at equal width of weights (f32, bf16, q8_0); `llama.cpp q4_0` reads
half the bytes of int8. `read floor` is the time in which torch reads as many bytes of an ordinary array, over ours: a
yardstick and no bound, since weights on large pages were read up to 1.7 times as fast as that array. llama.cpp's clock
includes its sampler, ours the choice of the likeliest token only.
What the engine adds to the bare step has rows of its own (`decode_engine`).

    rows = bench_decode(Sizes(threads=(2,)))
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from turbos.bench.contestants import Worker
from turbos.bench.decode_engine import EngineBench, engine_rows
from turbos.bench.decode_field import EQUAL_KINDS, SMALLER_KIND, Field, assemble, require_agreement_with, say
from turbos.bench.peers import Times, bench_model, interleave_timed, require_agreement, seconds_of
from turbos.bench.prefill import prompt
from turbos.bench.rows import Row
from turbos.bench.sessions import Sessions
from turbos.bench.their_sessions import TheirSessions
from turbos.common.errors import UserError
from turbos.common.machine import usable_cores
from turbos.engine.fused.support import refusal
from turbos.model.lm import LanguageModel

SHAPE = "bench-126m"
READ_BYTES = 2**28
Work = dict[str, Callable[[], float]]


@dataclass(frozen=True)
class Sizes:
    """What is measured: batches after `context` tokens and one after `deep`, steps of each round, rounds, threads.

    `kinds` are the files that llama.cpp runs alone, `kinds_together` those that it runs in a batch (with the first
    number of threads only: it reads every prompt anew in every round, which takes the most of the time).
    """

    context: int = 512
    steps: int = 32
    rounds: int = 5
    rounds_together: int = 3
    batches: tuple[int, ...] = (1, 8)
    deep: int = 8192
    deep_batch: int = 8
    deep_steps: int = 8
    threads: tuple[int, ...] = field(default_factory=lambda: tuple(dict.fromkeys((min(2, usable_cores()), 1))))
    kinds: tuple[str, ...] = ("f32", "bf16", "q8_0", "q4_0")
    kinds_together: tuple[str, ...] = ()

    def kinds_for(self, batch: int, threads: int) -> tuple[str, ...]:
        """Files that llama.cpp runs in one contest."""
        if batch == 1:
            return self.kinds
        return self.kinds_together if threads == self.threads[0] else ()


def bench_decode(sizes: Sizes = Sizes(), model: LanguageModel | None = None) -> Sequence[Row]:
    """Rows `decode <precision> b<batch> t<threads>` and `decode <precision> b8 8k`, tok/s of the whole batch.

    `model` None takes the benchmark's shape.
    """
    model = model or bench_model(SHAPE)
    if reason := refusal(model.config, torch.device("cpu")):
        raise UserError(f"bench decode: the fused step does not run here: {reason}")
    tokens, rows = prompt(model.config.vocab_size, sizes.context), list[Row]()
    with tempfile.TemporaryDirectory() as parent:
        everyone = assemble(model, tokens, parent)
        for threads in sizes.threads:
            torch.set_num_threads(threads)
            for batch in sizes.batches:
                rows += _contest(everyone, sizes, tokens, batch, threads)
        torch.set_num_threads(sizes.threads[0])
        rows += _deep_contest(everyone, sizes, sizes.threads[0])
        rows += _engine_rows(model, everyone, sizes, tokens)
    return rows


def _contest(everyone: Field, sizes: Sizes, tokens: Sequence[int], batch: int, threads: int) -> Iterator[Row]:
    """Rows of all precisions at one batch size, from rounds in which everyone runs."""
    work: Work = {}
    with ExitStack() as stack:
        for ours in everyone.ours:
            sessions = ours.sessions(batch, sizes.context + sizes.steps, threads, tokens[-1])
            work[ours.precision] = partial(sessions.seconds, sizes.steps)
        if everyone.transformers is not None:
            theirs = TheirSessions(everyone.transformers, tokens[:-1], batch)
            logprobs_BV = torch.log_softmax(theirs.logits(torch.full((batch,), tokens[-1])), -1)
            require_agreement("log-probabilities of transformers", everyone.exact_V, logprobs_BV[0])
            work["transformers"] = partial(theirs.seconds, sizes.steps)
        for kind in sizes.kinds_for(batch, threads) if everyone.files else ():
            worker = stack.enter_context(_worker(everyone.files[kind], kind, sizes, batch, threads))
            if kind == "f32":
                require_agreement_with(worker, tokens, everyone.exact_V)
            work[worker.name] = partial(worker.decode, tokens, sizes.steps)
        rounds = sizes.rounds if batch == 1 else sizes.rounds_together
        say(f"{sizes.steps} tokens, batch {batch}, {threads} threads, {rounds} rounds: {', '.join(work)}")
        times = interleave_timed(work | {"read": reading()}, rounds)
    for ours in everyone.ours:
        traffic = ours.traffic_bytes(batch, sizes.context) * sizes.steps
        yield _row(f"decode {ours.precision} b{batch} t{threads}", ours.precision, times, batch * sizes.steps, traffic)


def _worker(path: Path, kind: str, sizes: Sizes, batch: int, threads: int) -> Worker:
    context = sizes.context + sizes.steps + 8
    return Worker(f"llama.cpp {kind}", "llama.cpp", Path(sys.executable), path, threads, context, batch)


def _deep_contest(everyone: Field, sizes: Sizes, threads: int) -> Iterator[Row]:
    """Rows at `deep` tokens: all go on from the same noise, which llama.cpp has no way to be given."""
    if everyone.transformers is None:
        return
    batch, config = sizes.deep_batch, everyone.ours[0].config
    theirs = TheirSessions(everyone.transformers, prompt(config.vocab_size, 64), batch)
    theirs.lengthen(sizes.deep)
    tokens_B = torch.tensor(prompt(config.vocab_size, batch))
    their_logprobs_BV = torch.log_softmax(theirs.logits(tokens_B), -1)
    work: Work = {"transformers": partial(theirs.seconds, sizes.deep_steps)}
    for ours in everyone.ours:
        sessions = Sessions(config, ours.packed, batch, sizes.deep + sizes.deep_steps, threads)
        theirs.hand_over(sessions)
        logprobs_BV = torch.log_softmax(sessions.step(tokens_B), -1)
        if ours.precision == "fp32":
            require_agreement(f"log-probabilities at {sizes.deep}", logprobs_BV, their_logprobs_BV)
        work[ours.precision] = partial(sessions.seconds, sizes.deep_steps)
    say(f"{sizes.deep_steps} tokens at {sizes.deep}, batch {batch}, {threads} threads, {sizes.rounds} rounds")
    times = interleave_timed(work | {"read": reading()}, sizes.rounds)
    for ours in everyone.ours:
        traffic = ours.traffic_bytes(batch, sizes.deep) * sizes.deep_steps
        name = f"decode {ours.precision} b{batch} {sizes.deep / 1024:g}k"
        yield _row(name, ours.precision, times, batch * sizes.deep_steps, traffic)


def _engine_rows(model: LanguageModel, everyone: Field, sizes: Sizes, tokens: Sequence[int]) -> Iterator[Row]:
    """What the engine adds to the fused step, and what it is for."""
    threads = sizes.threads[0]
    longest = sizes.context + sizes.steps
    (int8,) = (ours for ours in everyone.ours if ours.precision == "int8")
    bare = {batch: int8.sessions(batch, longest, threads, tokens[-1]) for batch in sizes.batches}
    say(f"the engine, {threads} threads, {sizes.rounds} rounds")
    yield from engine_rows(EngineBench.of(model, threads), tokens, sizes.steps, bare, sizes.rounds)


def _row(name: str, precision: str, times: Times, tokens: int, traffic: int) -> Row:
    """Our rate, and how many times each peer's it is; `read floor` may be above 1, see the module."""
    peers = {"transformers": "transformers", "llama.cpp": f"llama.cpp {EQUAL_KINDS[precision]}"}
    if precision == "int8":
        peers["llama.cpp q4_0"] = f"llama.cpp {SMALLER_KIND}"
    ratios = {peer: times.ratio(precision, key) for peer, key in peers.items() if key in times.seconds}
    ratios["read floor"] = traffic / READ_BYTES * times.ratio(precision, "read")
    return Row(name, tokens / times.median(precision), "tok/s", ratios)


def reading() -> Callable[[], float]:
    """A measurement: seconds in which torch's threads read an array of `READ_BYTES`, more than any cache holds."""
    array = torch.zeros(READ_BYTES // 4)
    return lambda: seconds_of(array.max)
