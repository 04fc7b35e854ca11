"""A parameter's name here and in a family's files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorName:
    """`ours` is the module's name; `shape` is the file's where it differs (same order of numbers)."""

    ours: str
    file: str
    shape: tuple[int, ...] | None = None
