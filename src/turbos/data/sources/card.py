"""What is known of a named source before anything is fetched: its card. And groups of sources.

The counts were measured on what the pinned packages give; a source that depends on the machine has none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from turbos.data.fetch import Package


@dataclass(frozen=True)
class Source:
    """A named source and its card. `read` gets the fetched file, or None where nothing is fetched.

    `language` names one or more of en, zh, code; `documents` and `megabytes` (UTF-8, 10^6 bytes) are what it gives. A
    source whose rights are unclear is there for who may use it, and in no group.
    """

    name: str
    what: str
    language: str
    licence: str
    package: Package | None
    read: Callable[[Path | None], Iterator[str]]
    documents: int | None = None
    megabytes: float | None = None
    rights_are_clear: bool = True

    @property
    def download_megabytes(self) -> float:
        """Size of the package to fetch, 0 where there is none."""
        return 0.0 if self.package is None else self.package.megabytes


@dataclass(frozen=True)
class SourceGroup:
    """Sources that go together under one name."""

    name: str
    what: str
    sources: tuple[str, ...]
