"""How an engine is set up: memory, width, precision, borders of reading. Frozen; an impossible value is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from turbos.common.errors import UserError

Precision = Literal["auto", "own", "fp32", "bf16", "int8"]
Path = Literal["auto", "fused", "graphs", "static", "torch"]

SEGMENT = 512
"""Prompt tokens read in one call. A longer segment reads a little faster, and lets running answers wait longer."""


@dataclass(frozen=True)
class EngineConfig:
    """Options of an engine.

    `memory` bounds weights, states and keys in bytes (None: 70 % of what is free for states and keys). The plan shares
    it out for `max_running` answers of `context` tokens each; a single one may grow longer, up to all pages.
    `precision` is that of the weights: `own` leaves them as they are, `auto` is int8 on the CPU where the fused step
    runs, else bf16 on an accelerator and `own` on the CPU. `device` None is where the model lies. `path`
    `auto` takes the fused step where it can run, on `threads` threads (None: torch's number, which the model itself
    always runs on), CUDA graphs on a CUDA device, else the plain step of torch; `static` is the step that graphs
    capture, run without any (for tests). Prompts are read in calls that end at multiples of `segment`; a state is kept
    every `snapshot_every` tokens, at the end of a prompt and of an answer.
    """

    memory: int | None = None
    context: int = 8192
    max_running: int = 64
    precision: Precision = "auto"
    path: Path = "auto"
    segment: int = SEGMENT
    snapshot_every: int = 2048
    threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("context", "max_running", "segment", "snapshot_every", "threads", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"engine: {name} must be at least 1, not {value}")
        for name, words in (("precision", get_args(Precision)), ("path", get_args(Path))):
            if getattr(self, name) not in words:
                raise UserError(f"engine: {name} {getattr(self, name)!r} is none of {', '.join(words)}")


DEFAULTS = EngineConfig()
