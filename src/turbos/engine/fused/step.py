"""One token for each of a few sequences in one compiled call: `FusedStep`. The plain model is its truth, see the tests.

Reads and writes the pool's tensors in place. A row's numbers are the same to the last bit whatever else is in the
batch and however many threads there are. It does not allocate pages: whoever calls it has made room for the new token.
Do not fork a process in which it has run on several threads: OpenMP's threads do not live on in the child.

    packed = pack(model, "int8")
    packed.round_to_packed(model)
    step = FusedStep(packed, pool, threads=2)
    stepped = step(tokens_B, slots_B, positions_B, tables_BP)
    stepped.logits_BV
"""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.engine.fused.build import Built, build
from turbos.engine.fused.program import CALL, INSTRUCTION, MATRIX, PART, SIZES
from turbos.engine.fused.run import run_alone, run_together
from turbos.engine.fused.support import MAX_BATCH, refusal, threads_refusal
from turbos.engine.fused.weights import PackedModel
from turbos.engine.pool import PAGE, StatePool

COMPILING = "fused: compiling the decode step for this processor, once; about 15 seconds"


@dataclass(frozen=True)
class Stepped:
    """Hidden states after the final norm, logits, and (where asked for) the experts of every router, int16."""

    hidden_BD: Tensor
    logits_BV: Tensor
    routes_BLK: Tensor | None


class FusedStep:
    """The step of one packed model over one pool. Not for several Python threads at once: its buffers are shared."""

    def __init__(self, packed: PackedModel, pool: StatePool, threads: int) -> None:
        """`threads` beyond what numba has are refused, as is a model or machine that the step cannot run on."""
        reason = refusal(packed.config, pool.device, pool.dtype)
        if reason is not None:
            raise UserError(f"fused: {reason}")
        most = 1 if threads_refusal() else numba.config.NUMBA_NUM_THREADS
        if not 1 <= threads <= most:
            raise UserError(f"fused: threads must lie between 1 and {most}, not {threads}")
        self.config, self.packed, self.pool, self.threads = packed.config, packed, pool, threads
        self.built: Built = build(packed, pool, threads)
        self._call = np.zeros(1, CALL)
        self._parts = (0, 0)
        self._partial: tuple[Tensor, ...] = ()
        warm_up(threads)

    @torch.no_grad()
    def __call__(
        self, tokens_B: Tensor, slots_B: Tensor, positions_B: Tensor, tables_BP: Tensor, want_routes: bool = False
    ) -> Stepped:
        """Read one token for each row: token `positions_B[b]` (from 0) of the sequence in slot `slots_B[b]`.

        Row b's keys lie on the pages `tables_BP[b, : positions_B[b] // PAGE + 1]`; short tables are filled up with 0.
        Errors: ValueError where shapes, slots, tokens or pages cannot be.
        """
        config, batch = self.config, len(tokens_B)
        tokens, slots, positions = (x.to(torch.int64).contiguous() for x in (tokens_B, slots_B, positions_B))
        tables = tables_BP.to(torch.int32).contiguous()
        longest = self._check(tokens, slots, positions, tables)
        hidden_BD = torch.empty(batch, config.hidden_size)
        logits_BV = torch.empty(batch, config.vocab_size)
        routes = self.built.routers if want_routes else 0
        routes_BLK = torch.empty(batch, routes, config.top_k, dtype=torch.int16) if routes else None
        self._make_room(batch, longest // PART + 1)
        call: Any = self._call[0]
        call["batch"], call["threads"] = batch, self.threads
        call["tokens"], call["slots"], call["positions"] = tokens.data_ptr(), slots.data_ptr(), positions.data_ptr()
        call["tables"], call["table_width"] = tables.data_ptr(), tables.shape[1]
        call["hidden"], call["logits"] = hidden_BD.data_ptr(), logits_BV.data_ptr()
        call["routes"] = 0 if routes_BLK is None else routes_BLK.data_ptr()
        call["cached"] = int(positions.sum()) + batch
        self._run()
        return Stepped(hidden_BD, logits_BV, routes_BLK)

    def _run(self) -> None:
        built = self.built
        if self.threads == 1:
            run_alone(built.program, built.matrices, built.sizes, self._call)
            return
        with_torch = torch.get_num_threads()
        numba.set_num_threads(self.threads)
        run_together(built.program, built.matrices, built.sizes, self._call)
        # Both share one pool of threads, and numba's first call in a process tells it another number.
        if torch.get_num_threads() != with_torch:
            torch.set_num_threads(with_torch)

    def _check(self, tokens: Tensor, slots: Tensor, positions: Tensor, tables: Tensor) -> int:
        """The largest position; the compiled code would read and write anywhere, so nothing wrong may pass."""
        batch = len(tokens)
        if not 1 <= batch <= MAX_BATCH or len(slots) != batch or len(positions) != batch or len(tables) != batch:
            raise ValueError(
                f"fused: {batch} tokens, {len(slots)} slots, {len(positions)} positions, {len(tables)} tables"
            )
        places, rows = positions.tolist(), slots.tolist()
        if min(rows) < 0 or max(rows) >= self.pool.num_slots or len(set(rows)) != batch:
            raise ValueError(f"fused: slots {rows} are not {batch} different ones of {self.pool.num_slots}")
        ids = tokens.tolist()
        if min(ids) < 0 or max(ids) >= self.config.vocab_size:
            raise ValueError(f"fused: tokens {ids} lie outside vocab_size {self.config.vocab_size}")
        if min(places) < 0:
            raise ValueError(f"fused: positions {places} must not be negative")
        if self.pool.pages_matter:
            self._check_tables(tables, max(places))
        return max(places)

    def _check_tables(self, tables: Tensor, longest: int) -> None:
        pages, last = longest // PAGE + 1, self.pool.allocator.num_pages - 1
        if pages > tables.shape[1]:
            raise ValueError(f"fused: position {longest} needs {pages} pages, the tables have {tables.shape[1]}")
        if int(tables.min()) < 0 or int(tables.max()) > last:
            raise ValueError(f"fused: a page of the tables lies outside 0 .. {last} (fill short tables up with 0)")

    def _make_room(self, batch: int, parts: int) -> None:
        """Memory for what parts of the cache leave: grows with the longest context, by half at least."""
        if not self.pool.pages_matter:
            return
        if batch * parts > self._parts[0] * self._parts[1]:
            numbers, config = batch * (parts + parts // 2), self.config
            self._partial = (
                torch.empty(numbers * config.num_heads * config.head_dim),
                torch.empty(numbers * config.num_heads),
                torch.empty(numbers * config.num_heads),
            )
            self._parts = (batch, parts + parts // 2)
        call: Any = self._call[0]
        call["parts"] = parts
        call["partial"], call["partial_maxima"], call["partial_sums"] = (x.data_ptr() for x in self._partial)


def warm_up(threads: int = 1) -> float:
    """Compile the step unless this machine has done so before (then it is loaded); returns the seconds it took.

    What takes longer than a second says so where the error output is a terminal.
    """
    if threads > 1:
        # Torch's own pool of threads. The other layers are slower, and one must not be called from two Python threads.
        numba.config.THREADING_LAYER = "omp"
    run = run_together if threads > 1 else run_alone
    kinds = tuple(numba.typeof(np.zeros(1, record)) for record in (INSTRUCTION, MATRIX, SIZES, CALL))
    start = time.perf_counter()
    notice = threading.Timer(1.0, print, [COMPILING], {"file": sys.stderr, "flush": True})
    # Programs that read the error output want errors there, nothing else.
    if sys.stderr.isatty():
        notice.start()
    try:
        run.compile(kinds)
    finally:
        notice.cancel()
    return time.perf_counter() - start
