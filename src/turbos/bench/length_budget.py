"""Rows `aggregate <length>`: tokens per second of all sessions that one memory budget holds, at the best batch.

A budget holds the weights, as the model and as int8, and as many sessions as fit beside them. Each step takes one token
for each of a batch; which batch is best is searched first, up to all sessions or the most that the fused step takes.
Sessions share no pages. The pools of the three shapes would not fit beside each other, so each is filled anew in every
round; that is not counted.

    aggregate_rows(32768, stacks, parse_bytes("4GiB"), rounds=5)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from turbos.bench.length_plan import ATTENTION, HYBRID, MAMBA
from turbos.bench.length_stack import Stack, say
from turbos.bench.peers import Times, interleave_timed
from turbos.bench.rows import Row
from turbos.common.errors import UserError
from turbos.engine.fused.support import MAX_BATCH
from turbos.engine.layout import Layout

STEPS = 4
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Bytes of a size with unit; UserError for what is none.

    >>> parse_bytes("4GiB"), parse_bytes("1.5 GB")
    (4294967296, 1500000000)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"bench length: --budget {text!r} is no size: write it like 4GiB or 500MB")
    return int(float(found[1]) * UNITS[(found[2] or "").upper()])


def sessions_that_fit(stack: Stack, length: int, budget: int) -> int:
    """Sessions of `length` tokens (and the next few) within a budget, beside the weights."""
    layout = Layout.of(stack.config)
    weights = stack.packed.nbytes + sum(parameter.nbytes for parameter in stack.model.parameters())
    a_session = layout.state_bytes + layout.pages_for(length + STEPS) * layout.page_bytes
    return max(0, budget - weights) // a_session


def batches_to_try(most: int) -> list[int]:
    """Powers of two and the greatest possible batch, largest first: at most five.

    >>> batches_to_try(41)
    [41, 32, 16, 8, 4]
    """
    powers = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [most, *reversed(powers)][:5]


def aggregate_rows(length: int, stacks: Sequence[Stack], budget: int, rounds: int) -> Sequence[Row]:
    """`aggregate <length>` of the hybrid and `aggregate mamba <length>`; none where some shape has no session."""
    fitting = {stack.shape.name: sessions_that_fit(stack, length, budget) for stack in stacks}
    if not all(fitting.values()):
        say(f"budget of {budget / 1e9:.2f} GB: no session of {length} tokens fits for {_without(fitting)}")
        return []
    batches = {stack.shape.name: best_batch(stack, length, fitting[stack.shape.name]) for stack in stacks}
    counts = ", ".join(f"{name} {batches[name]} of {fitting[name]}" for name in batches)
    say(f"budget of {budget / 1e9:.2f} GB at {length}, best batch of the sessions that fit: {counts}")
    work = {stack.shape.name: partial(seconds_a_token, stack, length, batches[stack.shape.name]) for stack in stacks}
    return _rows(length, interleave_timed(work, rounds, warm_up=0))


def _without(fitting: dict[str, int]) -> str:
    return ", ".join(name for name, count in fitting.items() if not count)


def _rows(length: int, times: Times) -> list[Row]:
    """The hybrid against both others, and Mamba-only against attention."""
    rates = {name: 1 / times.median(name) for name in times.seconds}
    hybrid = {other.name: times.ratio(HYBRID.name, other.name) for other in (ATTENTION, MAMBA)}
    mamba = {ATTENTION.name: times.ratio(MAMBA.name, ATTENTION.name)}
    return [
        Row(f"aggregate {length}", rates[HYBRID.name], "tok/s", hybrid),
        Row(f"aggregate mamba {length}", rates[MAMBA.name], "tok/s", mamba),
    ]


def best_batch(stack: Stack, length: int, fitting: int) -> int:
    """The batch with most tokens per second, of two tries each: the faster was disturbed less."""
    most = min(MAX_BATCH, fitting)
    sessions = stack.sessions(most, length, STEPS)
    rates = {
        batch: batch / min(sessions.seconds(STEPS, batch), sessions.seconds(STEPS, batch))
        for batch in batches_to_try(most)
    }
    return max(rates, key=lambda batch: rates[batch])


def seconds_a_token(stack: Stack, length: int, batch: int) -> float:
    """Seconds for each token of steps over a batch of freshly filled sessions."""
    sessions = stack.sessions(batch, length, STEPS)
    sessions.seconds(1)
    return sessions.seconds(STEPS) / (batch * STEPS)
