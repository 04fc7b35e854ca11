"""`turbos bench length`: what a token costs the hybrid, its attention twin and a Mamba-only stack, by length.

All three run through the same fused int8 step over the same kind of pool, with fp32 keys, values and states; only the
sublayers differ (`length_plan`). Caches are filled with noise, because what stands in them makes no difference to the
work. Decoding is timed at that length; reading is the time of one segment that ends there, by the model itself. Before
a length is timed, the fused step and the model must agree on what follows there. A round runs all three.

Rows (ratios above 1: the hybrid is better): `decode int8 <length>` and `prefill <length>` in tok/s, `bytes <length>`
that a session holds, with a budget `aggregate <length>` (`length_budget`), and `process 262144`, the peak resident size
of a process that runs one such session.

    rows = bench_length(Plan(lengths=(2048, 32768)))
    python -m turbos.bench.length 262144        # prints the peak of such a process in bytes (Linux only)
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from turbos.bench.length_budget import aggregate_rows
from turbos.bench.length_plan import (
    ATTENTION,
    HYBRID,
    SHAPES,
    Size,
    describe_shape,
    held_bytes,
    held_ratio,
    require_equal_sizes,
    shape_config,
)
from turbos.bench.length_stack import Stack, say
from turbos.bench.peers import Times, interleave_timed, require_agreement
from turbos.bench.prefill import peak_resident
from turbos.bench.rows import Row
from turbos.bench.sessions import Sessions
from turbos.common.errors import UserError
from turbos.engine.config import SEGMENT
from turbos.engine.fused.support import refusal

LENGTHS = (128, 2048, 8192, 32768, 131072)
"""The shortest is there because by traffic the hybrid does not win it: its states weigh more than so few keys."""

LONG_SESSION = 262_144
MB = 1e6


@dataclass(frozen=True)
class Plan:
    """What is measured; a `budget` in bytes adds the aggregate rows, `long_session` None leaves its process out.

    Decoding takes little time, so it has more rounds than reading and aggregates.
    """

    lengths: tuple[int, ...] = LENGTHS
    budget: int | None = None
    rounds: int = 5
    decode_rounds: int = 9
    segment: int = SEGMENT
    size: Size = Size()
    long_session: int | None = LONG_SESSION

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 2:
            raise UserError(f"bench length: lengths must be at least 2 tokens, not {list(self.lengths)}")

    def steps(self, length: int) -> int:
        """Tokens decoded in a round: fewer where each takes long."""
        return max(8, min(64, 2**19 // length))


def bench_length(plan: Plan = Plan()) -> Sequence[Row]:
    """All rows, lengths in order; shapes, and where the hybrid does not win, are printed."""
    require_equal_sizes(plan.size)
    for shape in SHAPES:
        say(describe_shape(shape, plan.size))
        if reason := refusal(shape_config(shape, plan.size), torch.device("cpu")):
            raise UserError(f"bench length: the fused step does not run here: {reason}")
    stacks = [Stack.of(shape, plan.size) for shape in SHAPES]
    rows: list[Row] = []
    for length in plan.lengths:
        rows += _rows_at(length, stacks, plan)
        if plan.budget is not None:
            rows += aggregate_rows(length, stacks, plan.budget, plan.rounds)
    if plan.long_session is not None and platform.system() == "Linux":
        rows.append(_process_row(plan.long_session))
    for line in losses(rows):
        say(line)
    return rows


def _rows_at(length: int, stacks: Sequence[Stack], plan: Plan) -> Iterator[Row]:
    """Decode, prefill and bytes at one length."""
    steps, segment = plan.steps(length), min(plan.segment, length)
    decode: dict[str, Callable[[], float]] = {}
    read: dict[str, Callable[[], float]] = {}
    for stack in stacks:
        sessions = stack.sessions(1, length, steps)
        _require_agreement(stack, sessions, length)
        decode[stack.shape.name] = partial(sessions.seconds, steps)
        read[stack.shape.name] = partial(sessions.read_seconds, stack.model, segment)
    rounds = f"{plan.decode_rounds} rounds of {steps} tokens, {plan.rounds} of a segment of {segment}"
    say(f"length {length}: {rounds}, {torch.get_num_threads()} threads")
    yield row_of(f"decode int8 {length}", steps, interleave_timed(decode, plan.decode_rounds))
    yield row_of(f"prefill {length}", segment, interleave_timed(read, plan.rounds))
    ratios = {shape.name: held_ratio(HYBRID, shape, length, plan.size) for shape in SHAPES if shape != HYBRID}
    yield Row(f"bytes {length}", held_bytes(HYBRID, length, plan.size) / MB, "MB", ratios)


def _require_agreement(stack: Stack, sessions: Sessions, length: int) -> None:
    """The fused step and the model itself say the same after `length` tokens; the sessions are as before."""
    token_B = torch.zeros(1, dtype=torch.int64)
    fused_V = torch.log_softmax(sessions.step(token_B)[0], -1)
    sessions.fill(length)
    plain_V = torch.log_softmax(sessions.read_one(stack.model, 0), -1)
    sessions.fill(length)
    require_agreement(f"log-probabilities of {stack.shape.title} at {length}", fused_V, plain_V)


def row_of(name: str, tokens: int, times: Times) -> Row:
    """The hybrid's rate, and how many times each other's it is."""
    ratios: Mapping[str, float] = {
        other: times.ratio(HYBRID.name, other) for other in times.seconds if other != HYBRID.name
    }
    return Row(name, tokens / times.median(HYBRID.name), "tok/s", ratios)


def losses(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each row that is not better than the attention twin's.

    >>> list(losses([Row("prefill 128", 2000.0, "tok/s", {"attention": 0.9}), Row("bytes 2048", 5.3, "MB", {})]))
    ['prefill 128: not better than the attention twin (0.90)']
    """
    for row in rows:
        if row.ratios.get(ATTENTION.name, 2.0) <= 1:
            yield f"{row.name}: not better than the attention twin ({row.ratios[ATTENTION.name]:.2f})"


def _process_row(length: int) -> Row:
    command = [sys.executable, "-m", "turbos.bench.length", str(length)]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return Row(f"process {length}", peak / MB, "MB")


def process_peak(length: int) -> int:
    """Peak resident bytes of this process once it has read a segment and decoded in a session of so many tokens."""
    stack = Stack.of(HYBRID, Size())
    sessions = stack.sessions(1, length, 8)
    sessions.read_seconds(stack.model, min(SEGMENT, length))
    sessions.seconds(8)
    return peak_resident()


if __name__ == "__main__":
    print(process_peak(int(sys.argv[1])))
