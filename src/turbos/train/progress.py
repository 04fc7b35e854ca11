"""The progress line of a run, on stderr: loss, tokens per second, share of the machine's matmul rate, time left.

On a terminal it is one live line; elsewhere (a log file, CI) a plain line every `every_seconds`. It keeps no records:
`common.metrics` does.

    with ProgressLine("pretrain", total_steps=500, first_step=0, active_params=1_300_000) as line:
        line.update(step=1, loss=6.2, tokens=2048, seconds=0.25)
        line.note("step 1: held-out bits per byte 4.1")
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from turbos.common.machine import sgemm_flops

SMOOTHING = 0.9


class ProgressLine:
    """Shows how a run of `total_steps` goes; use it as a context manager."""

    def __init__(
        self, label: str, total_steps: int, first_step: int, active_params: int, every_seconds: float = 10.0
    ) -> None:
        self.label = label
        self.total_steps = total_steps
        self.first_step = first_step
        # Forward and backward take 6 flops for each active parameter and token (2 forward, 4 backward).
        self.flops_per_token = 6.0 * active_params
        self.every_seconds = every_seconds
        self.machine_flops = sgemm_flops()
        self.tokens_per_second = 0.0
        self.started = self.printed = time.monotonic()
        self.console = Console(file=sys.stderr)
        self.bar = self._start_bar() if self.console.is_terminal else None

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    @property
    def share_of_machine(self) -> float:
        """Model flops per second over the measured sgemm rate (0..1)."""
        return self.flops_per_token * self.tokens_per_second / self.machine_flops

    def update(self, step: int, loss: float, tokens: int, seconds: float) -> None:
        """Show that optimizer step `step` (from 1) with `tokens` took `seconds`."""
        speed = tokens / seconds
        previous = self.tokens_per_second or speed
        self.tokens_per_second = SMOOTHING * previous + (1.0 - SMOOTHING) * speed
        text = self._text(step, loss)
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, text=text)
        elif time.monotonic() - self.printed >= self.every_seconds or step == self.total_steps:
            self.printed = time.monotonic()
            print(f"{self.label} {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a lasting line above the live one."""
        self.console.print(f"{self.label} {text}", markup=False, highlight=False, soft_wrap=True)

    def _start_bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
        bar = Progress(*columns, console=self.console)
        bar.add_task(self.label, total=self.total_steps, completed=self.first_step, text="")
        bar.start()
        return bar

    def _text(self, step: int, loss: float) -> str:
        # Time left counts everything since the start, evaluations and saves included.
        elapsed = time.monotonic() - self.started
        left = elapsed / (step - self.first_step) * (self.total_steps - step)
        return (
            f"step {step}/{self.total_steps}  loss {loss:.4f}  {self.tokens_per_second:,.0f} tok/s  "
            f"{self.share_of_machine:.0%} of sgemm  {_clock(left)} left"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
