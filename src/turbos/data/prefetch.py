"""Batches made ahead in a thread, so that a training step finds its own ready.

What makes a batch is a pure function of the step, so nothing needs to be saved and a run that resumes at any step gets
the same batches. The thread makes at most `ahead` steps more than were taken. It does not know what a batch is.

>>> with Prefetch(lambda step: step * step, last_step=5) as squares:
...     [squares.at(step) for step in (2, 3, 4)]
[4, 9, 16]
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

Made = TypeVar("Made")

AHEAD = 2
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class _Outcome(Generic[Made]):
    """What a step gave: a value, or the error that making it raised."""

    step: int
    value: Made | None
    error: BaseException | None


class Prefetch(Generic[Made]):
    """Steps up to `last_step` made ahead, in order from the first one asked for; a context manager, which ends the
    thread."""

    def __init__(self, make: Callable[[int], Made], last_step: int, ahead: int = AHEAD) -> None:
        self._make, self._last, self._ahead = make, last_step, ahead
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._made: queue.Queue[_Outcome[Made]] = queue.Queue()
        self._next = 0

    def __enter__(self) -> Prefetch[Made]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def at(self, step: int) -> Made:
        """What the step gives; an error that making it raised is raised here, at its step.

        Any other step than the one after the last begins anew there.
        """
        if self._thread is None or step != self._next:
            self._begin(step)
        self._next = step + 1
        outcome = self._made.get()
        if outcome.error is not None:
            raise outcome.error
        value: Made = outcome.value  # type: ignore[assignment]
        return value

    def _begin(self, step: int) -> None:
        self._end()
        self._stop = threading.Event()
        self._made = queue.Queue(maxsize=self._ahead)
        arguments = (step, self._made, self._stop)
        self._thread = threading.Thread(target=self._work, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _work(self, step: int, made: queue.Queue[_Outcome[Made]], stop: threading.Event) -> None:
        while not stop.is_set() and step <= self._last:
            try:
                outcome = _Outcome(step, self._make(step), None)
            except BaseException as error:  # it belongs to the step that asks for it
                outcome = _Outcome(step, None, error)
            while not stop.is_set():
                try:
                    made.put(outcome, timeout=POLL_SECONDS)
                    break
                except queue.Full:
                    continue
            if outcome.error is not None:
                return
            step += 1
