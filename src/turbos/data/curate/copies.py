"""Copies: the same text again (exact) and almost the same text again (MinHash); the first one that comes is kept.

Near copies are found as FineWeb finds them (arXiv 2406.17557, section 3.4): 112 hash functions over 5-grams of words,
in 14 bands of 8. A pair with similarity s shares a band with probability 1 - (1 - s^8)^14: 5 % at 0.5, 77 % at 0.75,
99 % at 0.85. What shares a band is then compared by its whole signature, of which one byte a function is kept (b-bit
MinHash, arXiv 0910.3349), and dropped from an estimated similarity of 0.7 on; the bands alone would also drop unlike
texts. Signatures come from `rensa`: `turbos.bench.minhash` measures it beside `datasketch`.

>>> near = NearCopies()
>>> from turbos.data.curate.words import scan_texts
>>> scan = scan_texts([f"{start} {' '.join(map(str, range(300)))}".encode() for start in ("one", "two")])
>>> near.first_seen(scan, np.array([True, True])).tolist()
[-1, 0]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import rensa
from numba import njit

from turbos.data.curate.hashing import NGRAM_BASE, document_ngrams, mixed, slot_of
from turbos.data.curate.words import Scan

SHINGLE_WORDS = 5
BANDS, ROWS = 14, 8
SIMILARITY = 0.7
FIRST_ROWS = 1 << 10
SEED = 1


def digests(texts: Sequence[bytes]) -> np.ndarray:
    """A 64-bit hash of every text without outer blanks, uint64 `[N]`; two of 10^7 agree once in 300,000 runs."""
    raw = b"".join(hashlib.blake2b(text.strip(), digest_size=8).digest() for text in texts)
    return np.frombuffer(raw, "<u8")


def signatures(scan: Scan) -> np.ndarray:
    """MinHash signatures of all documents, uint32 `[N, BANDS * ROWS]`."""
    shingles, offsets = document_ngrams(scan.word_hash_W, scan.word_borders, SHINGLE_WORDS)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        shingles, offsets.astype(np.uint64), BANDS * ROWS, SEED
    )
    return np.array(matrix.to_rows(), np.uint32).reshape(len(scan), BANDS * ROWS)


@njit(cache=True)
def _band_keys(signature: np.ndarray, keys: np.ndarray) -> None:
    for band in range(BANDS):
        h = np.uint64(band + 1)
        for row in range(ROWS):
            h = h * NGRAM_BASE + np.uint64(signature[band * ROWS + row])
        keys[band] = mixed(h)


@njit(cache=True)
def _similarity(left: np.ndarray, right: np.ndarray) -> float:
    """Estimated Jaccard similarity from one byte a function: of unlike functions one in 256 agrees by chance."""
    equal = 0
    for index in range(left.shape[0]):
        equal += left[index] == right[index]
    return (equal / left.shape[0] - 1 / 256) / (1 - 1 / 256)


@njit(cache=True)
def _first_seen(
    signature_NH: np.ndarray, asked: np.ndarray, names: np.ndarray, slots: np.ndarray, owners: np.ndarray,
    kept: np.ndarray, kept_names: np.ndarray, num_kept: int, found: np.ndarray,
) -> tuple[int, int]:  # fmt: skip
    """Look every asked document up and keep those that are new; returns kept documents and new keys."""
    keys = np.empty(BANDS, np.uint64)
    added = 0
    for document in range(signature_NH.shape[0]):
        found[document] = -1
        if not asked[document]:
            continue
        small = signature_NH[document].astype(np.uint8)
        _band_keys(signature_NH[document], keys)
        for band in range(BANDS):
            place = slot_of(slots, keys[band])
            if slots[place] != np.uint64(0) and _similarity(small, kept[owners[place]]) >= SIMILARITY:
                found[document] = kept_names[owners[place]]
                break
        if found[document] >= 0:
            continue
        kept[num_kept], kept_names[num_kept] = small, names[document]
        for band in range(BANDS):
            place = slot_of(slots, keys[band])
            if slots[place] == np.uint64(0):
                slots[place], owners[place] = keys[band], num_kept
                added += 1
        num_kept += 1
    return num_kept, added


@njit(cache=True)
def _moved(slots: np.ndarray, owners: np.ndarray, new_slots: np.ndarray, new_owners: np.ndarray) -> None:
    for place in range(slots.shape[0]):
        if slots[place] != np.uint64(0):
            target = slot_of(new_slots, slots[place])
            new_slots[target], new_owners[target] = slots[place], owners[place]


class NearCopies:
    """The documents kept so far by their bands and signatures; about 850 bytes for each, room to grow included."""

    def __init__(self) -> None:
        self.slots = np.zeros(FIRST_ROWS * BANDS * 2, np.uint64)
        self.slots = np.zeros(1 << (self.slots.shape[0] - 1).bit_length(), np.uint64)
        self.owners = np.zeros(self.slots.shape[0], np.int32)
        self.kept = np.zeros((FIRST_ROWS, BANDS * ROWS), np.uint8)
        self.kept_names = np.zeros(FIRST_ROWS, np.int64)
        self.num_keys = self.num_kept = self.num_asked = 0

    def first_seen(self, scan: Scan, asked: np.ndarray) -> np.ndarray:
        """For each document, int64 `[N]`: the number of the kept one that it copies, or -1; the new ones are kept.

        Documents count from 0 over all calls. Those with `asked` (bool `[N]`) false, and those without words, are
        passed over.
        """
        asked = asked & (scan.word_borders[1:] > scan.word_borders[:-1])
        self._reserve(len(scan))
        found = np.empty(len(scan), np.int64)
        names = np.arange(self.num_asked, self.num_asked + len(scan))
        self.num_kept, added = _first_seen(
            signatures(scan), asked, names, self.slots, self.owners, self.kept, self.kept_names, self.num_kept, found
        )
        self.num_keys += added
        self.num_asked += len(scan)
        return found

    def _reserve(self, documents: int) -> None:
        rows = self.kept.shape[0]
        while rows < self.num_kept + documents:
            rows *= 2
        if rows > self.kept.shape[0]:
            more = rows - self.kept.shape[0]
            self.kept = np.concatenate([self.kept, np.zeros((more, BANDS * ROWS), np.uint8)])
            self.kept_names = np.concatenate([self.kept_names, np.zeros(more, np.int64)])
        size = self.slots.shape[0]
        while size < 2 * (self.num_keys + documents * BANDS):
            size *= 2
        if size > self.slots.shape[0]:
            slots, owners = np.zeros(size, np.uint64), np.zeros(size, np.int32)
            _moved(self.slots, self.owners, slots, owners)
            self.slots, self.owners = slots, owners

    def arrays(self) -> dict[str, np.ndarray]:
        """What is saved: keys and owners of the bands, signatures, names, and the number of documents asked."""
        used = self.slots != 0
        return {
            "keys": self.slots[used],
            "owners": self.owners[used],
            "kept": self.kept[: self.num_kept],
            "names": self.kept_names[: self.num_kept],
            "asked": np.array([self.num_asked]),
        }

    @classmethod
    def restored(cls, arrays: dict[str, np.ndarray]) -> NearCopies:
        """The index that `arrays()` came from."""
        near = cls()
        near.num_kept = len(arrays["names"])
        near._reserve(0)
        near.num_keys = len(arrays["keys"])
        near._reserve(0)
        near.kept[: near.num_kept] = arrays["kept"]
        near.kept_names[: near.num_kept] = arrays["names"]
        near.num_asked = int(arrays["asked"][0])
        for key, owner in zip(arrays["keys"], arrays["owners"], strict=True):
            place = slot_of(near.slots, key)
            near.slots[place], near.owners[place] = key, owner
        return near
