"""Sets of 64-bit hashes that compiled kernels fill, and the hashing of word n-grams.

A Python set of as many integers takes five times the memory and cannot be used inside a kernel. Nothing here looks at
text; `words.py` turns text into the hashes.

>>> seen = HashSet()
>>> seen.add_new(np.array([5, 7, 5], dtype=np.uint64)).tolist(), len(seen)
([True, True, False], 2)
"""

from __future__ import annotations

import numpy as np
from numba import njit

FIRST_SLOTS = 1 << 12

NGRAM_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that powers of it never vanish modulo 2^64."""


@njit(cache=True, inline="always")
def mixed(h: np.uint64) -> np.uint64:
    """A hash with all bits depending on all bits (MurmurHash3's 64-bit finalizer); 0 becomes 1, as 0 means free."""
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    h ^= h >> np.uint64(33)
    return h if h != np.uint64(0) else np.uint64(1)


@njit(cache=True, inline="always")
def slot_of(slots: np.ndarray, key: np.uint64) -> np.uint64:
    """Where a key lies in an open-addressing table, or the free slot where it belongs. Keys are mixed hashes."""
    mask = np.uint64(slots.shape[0] - 1)
    place = key & mask
    while slots[place] != np.uint64(0) and slots[place] != key:
        place = (place + np.uint64(1)) & mask
    return place


@njit(cache=True)
def _rehash(old: np.ndarray, new: np.ndarray) -> None:
    for key in old:
        if key != np.uint64(0):
            new[slot_of(new, key)] = key


@njit(cache=True)
def _add_new(slots: np.ndarray, keys: np.ndarray, is_new: np.ndarray) -> int:
    added = 0
    for index in range(keys.shape[0]):
        key = keys[index] if keys[index] != np.uint64(0) else np.uint64(1)
        place = slot_of(slots, key)
        is_new[index] = slots[place] == np.uint64(0)
        if is_new[index]:
            slots[place] = key
            added += 1
    return added


@njit(cache=True)
def _contains(slots: np.ndarray, keys: np.ndarray, found: np.ndarray) -> None:
    for index in range(keys.shape[0]):
        key = keys[index] if keys[index] != np.uint64(0) else np.uint64(1)
        found[index] = slots[slot_of(slots, key)] != np.uint64(0)


class HashSet:
    """A growing set of 64-bit hashes; `slots` is the table that kernels read and fill."""

    def __init__(self, keys: np.ndarray | None = None) -> None:
        self.slots = np.zeros(FIRST_SLOTS, np.uint64)
        self.count = 0
        if keys is not None:
            self.add_new(keys)

    def __len__(self) -> int:
        return self.count

    def reserve(self, more: int) -> None:
        """Make room for `more` hashes, so that a kernel can fill the table without growing it (at most half full)."""
        wanted = self.slots.shape[0]
        while wanted < 2 * (self.count + more):
            wanted *= 2
        if wanted > self.slots.shape[0]:
            grown = np.zeros(wanted, np.uint64)
            _rehash(self.slots, grown)
            self.slots = grown

    def add_new(self, keys: np.ndarray) -> np.ndarray:
        """Add hashes `[K]` in order; returns for each, bool `[K]`, whether it was absent before it came."""
        self.reserve(keys.shape[0])
        is_new = np.empty(keys.shape[0], np.bool_)
        self.count += _add_new(self.slots, keys.astype(np.uint64), is_new)
        return is_new

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Whether each hash `[K]` is in the set, bool `[K]`."""
        found = np.empty(keys.shape[0], np.bool_)
        _contains(self.slots, keys.astype(np.uint64), found)
        return found

    def keys(self) -> np.ndarray:
        """All hashes, in no order: what is saved, and what `HashSet(keys)` takes."""
        return self.slots[self.slots != 0]


@njit(cache=True)
def ngrams_into(words: np.ndarray, start: int, end: int, n: int, out: np.ndarray) -> int:
    """Hashes of the n-grams of words `start .. end - 1` into `out`; returns how many (0 where there are fewer words).

    A rolling polynomial over the word hashes, mixed: O(1) a word for any n.
    """
    count = end - start - n + 1
    if count < 1:
        return 0
    top = np.uint64(1)
    for _ in range(n - 1):
        top *= NGRAM_BASE
    h = np.uint64(0)
    for index in range(start, end):
        if index - start >= n:
            h -= words[index - n] * top
        h = h * NGRAM_BASE + words[index]
        if index - start >= n - 1:
            out[index - start - n + 1] = mixed(h)
    return count


@njit(cache=True)
def _shingles(words: np.ndarray, borders: np.ndarray, n: int, out: np.ndarray, offsets: np.ndarray) -> None:
    filled = 0
    for document in range(borders.shape[0] - 1):
        start, end = borders[document], borders[document + 1]
        if end > start:
            filled += ngrams_into(words, start, end, min(n, end - start), out[filled:])
        offsets[document + 1] = filled


def document_ngrams(words_W: np.ndarray, borders: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of every document's n-grams, uint64, and their borders `[N + 1]`, int64.

    `words_W` are word hashes, document `i` has words `borders[i] .. borders[i + 1] - 1`. A document with fewer than n
    words gives one n-gram of all its words; one without words gives none.
    """
    out = np.empty(words_W.shape[0], np.uint64)
    offsets = np.zeros(borders.shape[0], np.int64)
    _shingles(words_W, borders, n, out, offsets)
    return out[: offsets[-1]], offsets
