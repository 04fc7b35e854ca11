"""The compiled step: reads the program and does each phase, by all threads where that pays.

Every phase has a part that the calling thread does alone before it (norms, routing: microseconds) and a part that is
shared out. Two compiled forms exist: with threads, and without (`prange` is then `range`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from numba import njit, prange

from turbos.engine.fused.attend import attend, join, place_keys
from turbos.engine.fused.feed import feed_in, feed_out, route
from turbos.engine.fused.program import ATTEND, FEED_IN, FEED_OUT, HEAD, JOIN, MERGE, PROJECT, SCAN
from turbos.engine.fused.rows import (
    embed,
    final_norm,
    head,
    merge,
    norm_rows,
    project_inputs,
    rotations,
)
from turbos.engine.fused.scan import convolve_shared, gated_norm, scan_heads
from turbos.engine.fused.vectors import inlined, put_int64
from turbos.engine.pages import PAGE

COMPILED = ("attend", "feed", "products", "program", "rows", "run", "scan", "tiles", "vectors")
"""Files of this folder that the compiled code depends on."""


@inlined
def _begin(op, sizes, call):  # type: ignore[no-untyped-def]
    """What a phase needs first, by the calling thread alone."""
    if op.code == PROJECT:
        norm_rows(op.norm, sizes, call)
    elif op.code == SCAN:
        convolve_shared(op, sizes, call)
    elif op.code == ATTEND:
        place_keys(op, sizes, call)
    elif op.code == MERGE:
        if op.gate_norm != 0:
            gated_norm(op, sizes, call)
    elif op.code == FEED_IN:
        norm_rows(op.norm, sizes, call)
        if op.experts > 0:
            route(op, sizes, call)
    elif op.code == HEAD:
        final_norm(op, sizes, call)
        for b in range(call.batch):
            put_int64(sizes.logits_rows, b, call.hidden + 4 * b * sizes.hidden)
            put_int64(sizes.logits_rows, call.batch + b, call.logits + 4 * b * sizes.vocabulary)


@inlined
def _work(op, matrices, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of a phase."""
    if op.code == PROJECT:
        project_inputs(op, matrices, sizes, call, thread, threads)
    elif op.code == SCAN:
        scan_heads(op, sizes, call, thread, threads)
    elif op.code == ATTEND:
        attend(op, sizes, call, thread, threads)
    elif op.code == JOIN:
        join(sizes, call, thread, threads)
    elif op.code == MERGE:
        merge(op, matrices, sizes, call, thread, threads)
    elif op.code == FEED_IN:
        feed_in(op, matrices, sizes, call, thread, threads)
    elif op.code == FEED_OUT:
        feed_out(op, matrices, sizes, call, thread, threads)
    elif op.code == HEAD:
        head(op, matrices, sizes, call, thread, threads)


def _sources() -> str:
    """A hash of everything that is compiled: numba's own cache looks at the outermost function's file only."""
    folder = Path(__file__).parent
    text = b"".join((folder / f"{name}.py").read_bytes() for name in COMPILED)
    return f"{hashlib.sha256(text).hexdigest()} {PAGE}"


def _compiled(parallel: bool, key: str) -> Any:
    @njit(parallel=parallel, nogil=True, cache=True, error_model="numpy")
    def run(program, matrices, sizes_1, call_1):  # type: ignore[no-untyped-def]
        # What the function mentions belongs to its key in numba's cache.
        assert len(key) > 0
        sizes, call = sizes_1[0], call_1[0]
        embed(sizes, call)
        if sizes.rotary != 0:
            rotations(sizes, call)
        threads = call.threads
        for number in range(len(program)):
            op = program[number]
            _begin(op, sizes, call)
            rows = call.cached if op.code == ATTEND or op.code == JOIN else call.batch
            if threads == 1 or op.bytes + rows * op.row_work < sizes.threads_pay:
                _work(op, matrices, sizes, call, 0, 1)
            else:
                for thread in prange(threads):
                    _work(program[number], matrices, sizes_1[0], call_1[0], thread, threads)

    return run


run_alone = _compiled(False, f"alone {_sources()}")
run_together = _compiled(True, f"together {_sources()}")
