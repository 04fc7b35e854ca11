"""Batches made ahead: the same in any order of asking, errors at their step, no stall, and no thread left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from turbos.data.prefetch import Prefetch


def named_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_steps_come_as_they_would_without_it_from_any_first_step() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return 7 * step

    with Prefetch(make, last_step=20) as ahead:
        assert [ahead.at(step) for step in range(5, 12)] == [7 * step for step in range(5, 12)]
        # Gone back to, as a run does that begins again.
        assert [ahead.at(step) for step in (3, 4, 5)] == [21, 28, 35]
        assert ahead.at(20) == 140
    assert made[:7] == list(range(5, 12)) and max(made) == 20
    assert not named_threads()


def test_it_makes_no_more_than_asked_ahead() -> None:
    made: list[int] = []
    with Prefetch(made.append, last_step=1000, ahead=2) as ahead:
        ahead.at(0)
        time.sleep(0.3)
        # Two wait in the queue and one in the thread's hand.
        assert len(made) <= 4
    assert len(made) <= 4


def test_an_error_comes_at_its_own_step() -> None:
    def make(step: int) -> int:
        if step == 3:
            raise ValueError("step three")
        return step

    with Prefetch(make, last_step=10) as ahead:
        assert [ahead.at(step) for step in range(3)] == [0, 1, 2]
        with pytest.raises(ValueError, match="step three"):
            ahead.at(3)
    assert not named_threads()


def test_leaving_ends_the_thread_also_when_nothing_was_taken() -> None:
    with pytest.raises(KeyboardInterrupt), Prefetch(lambda step: step, last_step=10) as ahead:
        ahead.at(0)
        raise KeyboardInterrupt
    with Prefetch(lambda step: step, last_step=10):
        pass
    assert not named_threads()


def waited(at: Callable[[int], object], steps: int, step_seconds: float) -> list[float]:
    """Seconds that each step of so many waits for its batch."""
    found = []
    for step in range(steps):
        started = time.perf_counter()
        at(step)
        found.append(time.perf_counter() - started)
        time.sleep(step_seconds)
    return found


def test_a_step_never_waits_for_a_loader_that_is_faster_than_it() -> None:
    def slow(step: int) -> int:
        time.sleep(0.02)
        return step

    with Prefetch(slow, last_step=19) as ahead:
        with_it = waited(ahead.at, 20, step_seconds=0.06)
    without = waited(slow, 20, step_seconds=0.0)
    assert min(without) >= 0.02
    # The first batch is waited for; of the others at most one in ten, on a machine that has other work.
    assert sorted(with_it[1:])[-3] < 0.005
