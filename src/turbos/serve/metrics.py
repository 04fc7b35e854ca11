"""Counters of a server in Prometheus's text format: requests by route and status, latencies, what the engine did.

Routes are named by their pattern, so that strangers cannot make series. Written by hand: the format is a few lines, and
one event loop counts, so that no lock is wanted. What is counted where is said in each line's help.

>>> seconds = Histogram("wait_seconds", "How long.", (0.1, 1.0))
>>> seconds.observe(0.5)
>>> print(*seconds.lines(), sep="\\n")
# HELP wait_seconds How long.
# TYPE wait_seconds histogram
wait_seconds_bucket{le="0.1"} 0
wait_seconds_bucket{le="1.0"} 1
wait_seconds_bucket{le="+Inf"} 1
wait_seconds_sum 0.5
wait_seconds_count 1
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from turbos.engine.metrics import EngineMetrics
from turbos.serve.limits import Gate
from turbos.serve.service import Finished, Part

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

ENGINE_COUNTERS = {
    "steps": "Steps of the engine.",
    "read_tokens": "Tokens of prompts that were read.",
    "cached_tokens": "Tokens of prompts that kept states had read.",
    "written_tokens": "Tokens that were written.",
    "replayed_tokens": "Tokens that were read again after an answer had stepped back.",
    "preemptions": "Answers that stepped back for older ones.",
}
ENGINE_GAUGES = {
    "waiting": "Answers that wait for a place.",
    "reading": "Answers whose prompt is being read.",
    "writing": "Answers that are being written.",
    "free_slots": "States that are free.",
    "free_pages": "Pages of keys that are free.",
}
CACHE_COUNTERS = {
    "hits": "Prompts whose beginning was found among kept states.",
    "misses": "Prompts of which nothing was found.",
    "evictions": "Kept states that were given up.",
}
CACHE_GAUGES = {"snapshots": "States that are kept.", "scan_bytes": "Bytes of kept states, keys apart."}


class Histogram:
    """Counts of observations by size."""

    def __init__(self, name: str, help: str, bounds: Sequence[float] = LATENCIES) -> None:
        self._name, self._help, self._bounds = name, help, tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self) -> Iterator[str]:
        """The series in text."""
        yield from _head(self._name, self._help, "histogram")
        totals = list(accumulate(self._counts))
        for bound, total in zip((*map(str, self._bounds), "+Inf"), totals, strict=True):
            yield f'{self._name}_bucket{{le="{bound}"}} {total}'
        yield f"{self._name}_sum {self._sum}"
        yield f"{self._name}_count {totals[-1]}"


class Watch:
    """Looks on while one request is answered: its first token, and the time between tokens."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics, self._last = metrics, time.monotonic()
        self._is_first = True

    def see(self, event: Part | Finished) -> None:
        """An event, as it comes."""
        now = time.monotonic()
        (self._metrics.first if self._is_first else self._metrics.between).observe(now - self._last)
        self._is_first, self._last = False, now
        if isinstance(event, Finished):
            self._metrics.finishes[event.reason] += 1


class ServerMetrics:
    """What a server counts itself."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.finishes: Counter[str] = Counter()
        self.seconds = Histogram("turbos_request_seconds", "From a request's first byte to its answer's last.")
        self.first = Histogram("turbos_first_token_seconds", "From a request to the first of its answer.")
        self.between = Histogram("turbos_between_tokens_seconds", "From one part of a request's answers to the next.")

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request is over."""
        self.requests[method, route, status] += 1
        self.seconds.observe(seconds)

    def text(self, engine: EngineMetrics, gate: Gate) -> str:
        """All series."""
        return "\n".join([*self._own(gate), *_engine(engine), ""])

    def _own(self, gate: Gate) -> Iterator[str]:
        yield from _head("turbos_requests_total", "Requests that are over.", "counter")
        for (method, route, status), count in sorted(self.requests.items()):
            labels = f'method="{_escaped(method)}",route="{_escaped(route)}",status="{status}"'
            yield f"turbos_requests_total{{{labels}}} {count}"
        yield from _head("turbos_answers_total", "Answers that are over, by why.", "counter")
        for reason, count in sorted(self.finishes.items()):
            yield f'turbos_answers_total{{reason="{reason}"}} {count}'
        yield from _one("turbos_open_answers", "Answers that run or wait.", "gauge", gate.open)
        yield from _one("turbos_refused_total", "Requests that were sent away with 429.", "counter", gate.refused)
        for histogram in (self.seconds, self.first, self.between):
            yield from histogram.lines()


def _engine(engine: EngineMetrics) -> Iterator[str]:
    for name, help in ENGINE_COUNTERS.items():
        yield from _one(f"turbos_engine_{name}_total", help, "counter", getattr(engine, name))
    for name, help in ENGINE_GAUGES.items():
        yield from _one(f"turbos_engine_{name}", help, "gauge", getattr(engine, name))
    for name, help in CACHE_COUNTERS.items():
        yield from _one(f"turbos_cache_{name}_total", help, "counter", getattr(engine.cache, name))
    for name, help in CACHE_GAUGES.items():
        yield from _one(f"turbos_cache_{name}", help, "gauge", getattr(engine.cache, name))


def _one(name: str, help: str, kind: str, value: float) -> Iterator[str]:
    yield from _head(name, help, kind)
    yield f"{name} {value}"


def _head(name: str, help: str, kind: str) -> Iterator[str]:
    yield f"# HELP {name} {help}"
    yield f"# TYPE {name} {kind}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
