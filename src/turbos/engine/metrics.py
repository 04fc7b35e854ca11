"""What an engine has done and holds, as one record; a server turns it into its own format.

>>> Counters().read_tokens
0
"""

from __future__ import annotations

from dataclasses import dataclass

from turbos.engine.cache import CacheMetrics
from turbos.engine.scheduler import Scheduler


@dataclass(frozen=True)
class EngineMetrics:
    """Counters since the engine began (tokens read from prompts, taken from kept states, written, replayed after a
    preemption), and what it holds at present.
    """

    steps: int
    read_tokens: int
    cached_tokens: int
    written_tokens: int
    replayed_tokens: int
    preemptions: int
    waiting: int
    reading: int
    writing: int
    free_slots: int
    free_pages: int
    weights_version: int
    cache: CacheMetrics


@dataclass
class Counters:
    """The counters as the engine raises them."""

    steps: int = 0
    read_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    replayed_tokens: int = 0

    def metrics(self, scheduler: Scheduler, weights_version: int) -> EngineMetrics:
        """The record, with what the scheduler holds."""
        return EngineMetrics(
            steps=self.steps,
            read_tokens=self.read_tokens,
            cached_tokens=self.cached_tokens,
            written_tokens=self.written_tokens,
            replayed_tokens=self.replayed_tokens,
            preemptions=scheduler.preemptions,
            waiting=len(scheduler.waiting),
            reading=int(scheduler.reading is not None),
            writing=len(scheduler.writing),
            free_slots=scheduler.pool.free_slots,
            free_pages=scheduler.pool.allocator.free,
            weights_version=weights_version,
            cache=scheduler.cache.metrics,
        )
