"""Counts of a source's documents, taken in one pass that keeps no text but the first few.

>>> measure(["one", "two", "one"], samples=1)
Counts(documents=3, distinct=2, megabytes=9e-06, median_characters=3, longest_characters=3, samples=('one',))
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What a source gives: documents, how many of them differ, UTF-8 megabytes (10^6), characters, the first texts."""

    documents: int
    distinct: int
    megabytes: float
    median_characters: int
    longest_characters: int
    samples: tuple[str, ...]


def measure(texts: Iterable[str], samples: int = 3, limit: int | None = None) -> Counts:
    """Count texts, at most `limit` of them where one is given."""
    lengths: list[int] = []
    seen: set[bytes] = set()
    first: list[str] = []
    size = 0
    for text in itertools.islice(texts, limit):
        encoded = text.encode()
        size += len(encoded)
        lengths.append(len(text))
        seen.add(hashlib.blake2b(encoded, digest_size=12).digest())
        if len(first) < samples:
            first.append(text)
    median = round(statistics.median(lengths)) if lengths else 0
    return Counts(len(lengths), len(seen), size / 1e6, median, max(lengths, default=0), tuple(first))
