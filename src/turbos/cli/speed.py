"""How fast an answer came: tokens read, taken from kept states and written, with the seconds of each.

>>> str(Speed(read=12, cached=328, written=57, reading_seconds=0.05, writing_seconds=1.0))
'read 12 new of 340 tokens (328 kept) at 240 tokens/s, wrote 57 at 56 tokens/s'
>>> str(Speed(read=0, cached=340, written=1, reading_seconds=0.0, writing_seconds=0.0))
'read 0 new of 340 tokens (340 kept), wrote 1'
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from turbos.engine.engine import Engine


@dataclass(frozen=True)
class Speed:
    """Tokens and seconds of a request; reading lasts until the first token is there."""

    read: int
    cached: int
    written: int
    reading_seconds: float
    writing_seconds: float

    def __str__(self) -> str:
        reading = f"read {self.read} new of {self.read + self.cached} tokens"
        kept = f" ({self.cached} kept)" if self.cached else ""
        # The first token belongs to the reading.
        writing = f"wrote {self.written}{_rate(self.written - 1, self.writing_seconds)}"
        return f"{reading}{kept}{_rate(self.read, self.reading_seconds)}, {writing}"


def _rate(tokens: int, seconds: float) -> str:
    if tokens < 1 or seconds <= 0:
        return ""
    rate = tokens / seconds
    return f" at {rate:.1f} tokens/s" if rate < 20 else f" at {rate:.0f} tokens/s"


class Stopwatch:
    """Measures one request of an engine that does nothing else meanwhile; `lap` with each delta."""

    def __init__(self, engine: Engine) -> None:
        """The clock runs from here."""
        self._engine, self._before = engine, engine.metrics()
        self._start = self._first = self._last = time.perf_counter()
        self._laps = 0

    def lap(self) -> None:
        """Something was written."""
        self._last = time.perf_counter()
        if not self._laps:
            self._first = self._last
        self._laps += 1

    def speed(self) -> Speed:
        """What was done since the beginning."""
        now, before = self._engine.metrics(), self._before
        return Speed(
            read=now.read_tokens - before.read_tokens,
            cached=now.cached_tokens - before.cached_tokens,
            written=now.written_tokens - before.written_tokens,
            reading_seconds=self._first - self._start,
            writing_seconds=self._last - self._first,
        )
