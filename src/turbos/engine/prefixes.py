"""Names for beginnings of token sequences: a hash chain, page by page, so that all beginnings of one are found at once.

A `Place` names a beginning by content: equal tokens, equal place. The index knows at which lengths places were added,
and so tries only those. What is kept at a place is not its business.

>>> places = PlaceIndex()
>>> places.add(places.of((5, 6, 7), 2))
>>> [place.length for place in places.known((5, 6, 9))], list(places.known((5, 7, 9)))
([2], [])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from turbos.engine.pages import PAGE

HASH_BYTES = 16
ID_BYTES = 4


@dataclass(frozen=True)
class Place:
    """A beginning of `length` tokens: the chain hash of its whole pages, and of those with the tokens beyond them."""

    whole: bytes
    key: bytes
    length: int


class PlaceIndex:
    """The places that were added, each once."""

    def __init__(self) -> None:
        """No places."""
        self._places: set[Place] = set()
        self._lengths: dict[bytes, Counter[int]] = {}

    def of(self, ids: Sequence[int], length: int) -> Place:
        """The place of the first `length` of `ids`, added or not."""
        data = _bytes_of(ids[:length])
        return _place(_chain(data)[-1], data, length)

    def add(self, place: Place) -> None:
        """Know a place (again)."""
        if place not in self._places:
            self._places.add(place)
            self._lengths.setdefault(place.whole, Counter())[place.length] += 1

    def remove(self, place: Place) -> None:
        """Know a place no longer."""
        self._places.remove(place)
        lengths = self._lengths[place.whole]
        lengths[place.length] -= 1
        if not lengths[place.length]:
            del lengths[place.length]
        if not lengths:
            del self._lengths[place.whole]

    def known(self, ids: Sequence[int]) -> Iterator[Place]:
        """Places that are beginnings of `ids`, longest first."""
        data = _bytes_of(ids)
        for whole in reversed(_chain(data)):
            for length in sorted(self._lengths.get(whole, ()), reverse=True):
                place = _place(whole, data, length)
                if place in self._places:
                    yield place


def _bytes_of(ids: Sequence[int]) -> bytes:
    return np.asarray(ids, dtype="<i4").tobytes()


def _chain(data: bytes) -> list[bytes]:
    """Hashes of the first 0, 1, 2, ... whole pages."""
    step = PAGE * ID_BYTES
    chain = [b""]
    for start in range(0, len(data) - step + 1, step):
        chain.append(_hash(chain[-1] + data[start : start + step], b"page"))
    return chain


def _place(whole: bytes, data: bytes, length: int) -> Place:
    beyond = data[length // PAGE * PAGE * ID_BYTES : length * ID_BYTES]
    return Place(whole, _hash(whole + beyond, b"place"), length)


def _hash(data: bytes, purpose: bytes) -> bytes:
    return blake2b(data, digest_size=HASH_BYTES, person=purpose).digest()
