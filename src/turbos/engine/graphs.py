"""Static steps by bucket, captured where that is wanted: each bucket's operations are launched as one CUDA graph.

Buckets are heights (1, 2, 4, ... rows) and widths (4, 8, 16, ... pages a row); one is made when a batch first needs it.
A capture runs the step on scratch rows only, so no sequence is touched by it. Graphs read weights and pool where they
lie: both must be changed in place. Where a capture fails, the reason is said and `ready` is False from there on.

    steps = StaticSteps(model, pool, cuda_capture(pool.device))
    if steps.ready(rows):
        logits_BV, routes_BLK = steps(rows, ids)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turbos.engine.pages import PAGE
from turbos.engine.pool import PoolRow, StatePool
from turbos.engine.static_step import StaticStep
from turbos.model.lm import LanguageModel

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of a step something that repeats its operations on the same tensors."""

LEAST_PAGES = 4
"""Width of the narrowest bucket: narrower ones would save little attention and cost a graph each."""

WARM_UPS = 2
"""Runs before a capture: libraries choose kernels and take their workspace in the first."""


def uncaptured(step: Callable[[], None]) -> Callable[[], None]:
    """No capture: the step itself, for devices without graphs."""
    return step


def cuda_capture(device: torch.device) -> Capture:
    """Captures into CUDA graphs that share one memory: they are replayed one after the other."""
    memory = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(device):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    step()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                step()
        return graph.replay

    return capture


def bucket(count: int, least: int, most: int) -> int:
    """The smallest `least * 2^n` that is at least `count`, or `most` where that is smaller.

    >>> [bucket(count, 1, 6) for count in (1, 2, 3, 5)], bucket(3, 4, 2)
    ([1, 2, 4, 6], 2)
    """
    size = least
    while size < count:
        size *= 2
    return min(size, most)


class StaticSteps:
    """The static steps of a model over a pool, each captured once. Not for several threads."""

    def __init__(self, model: LanguageModel, pool: StatePool, capture: Capture) -> None:
        """The smallest step is captured at once, so that what cannot be captured is known before a request comes."""
        self.model, self.pool, self._capture = model, pool, capture
        self.refusal = ""
        """Why nothing is captured any more; empty where all is well."""
        self._steps: dict[tuple[int, int], tuple[StaticStep, Callable[[], None]]] = {}
        self._add(self._key(1, 1))

    def ready(self, rows: Sequence[PoolRow]) -> bool:
        """Whether these rows can be stepped; a bucket that is missing is made. The first False is said on stderr."""
        if self.refusal:
            return False
        key = self._key_of(rows)
        if key in self._steps or self._add(key):
            return True
        print(f"engine: CUDA graphs are given up, the plain step goes on: {self.refusal}", file=sys.stderr)
        return False

    @torch.inference_mode()
    def __call__(self, rows: Sequence[PoolRow], ids: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Read a token for each row: logits `[B, V]` and, with experts, routes int16 `[B, L, K]`; ask `ready` first."""
        step, replay = self._steps[self._key_of(rows)]
        step.fill(rows, ids)
        replay()
        for row in rows:
            row.length += 1
        routes_BLK = step.routes_BLK[: len(rows)].clone() if step.routes_BLK.shape[1] else None
        return step.logits_BV[: len(rows)].clone(), routes_BLK

    def _key_of(self, rows: Sequence[PoolRow]) -> tuple[int, int]:
        return self._key(len(rows), max(row.length // PAGE + 1 for row in rows))

    def _key(self, rows: int, pages: int) -> tuple[int, int]:
        height = bucket(rows, 1, self.pool.num_slots)
        return height, bucket(pages, LEAST_PAGES, self.pool.allocator.num_pages) if self.pool.pages_matter else 0

    @torch.inference_mode()
    def _add(self, key: tuple[int, int]) -> bool:
        try:
            step = StaticStep(self.model, self.pool, *key)
            self._steps[key] = step, self._capture(step)
        # What torch raises for an operation that cannot be captured, or for memory that is short.
        except RuntimeError as error:
            self.refusal = str(error).strip().split("\n")[0] or type(error).__name__
            self._steps.clear()
        return not self.refusal
