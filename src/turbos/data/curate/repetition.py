"""How much of a document repeats itself: lines, paragraphs and word n-grams, as Gopher counts them.

The measures of arXiv 2112.11446, table A1: what share of lines and paragraphs stands there twice, how much of the text
they are, how much the most frequent n-gram covers, and how much all repeated n-grams cover together. Lengths are bytes.
Limits are in `rules.py`.

>>> from turbos.data.curate.words import scan_texts
>>> found = repetition(scan_texts([b"same line\\nsame line\\nother line\\nlast one"]))
>>> found.lines_N.tolist(), found.line_bytes_N.round(2).tolist()
([0.25], [0.23])
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from turbos.data.curate.hashing import mixed, ngrams_into
from turbos.data.curate.words import LINE_START, PARAGRAPH_START, Scan

TOP_NGRAMS = (2, 3, 4)
REPEATED_NGRAMS = (5, 6, 7, 8, 9, 10)


@dataclass(frozen=True)
class Repetition:
    """Shares from 0 to 1, float64: of lines and paragraphs `[N]`, of bytes in them `[N]`, of bytes in n-grams `[N, G]`.

    `top_NG` has a column for each of `TOP_NGRAMS` (the most frequent one, if it stands there twice), `repeated_NG` for
    each of `REPEATED_NGRAMS` (every n-gram that stood there before, bytes counted once).
    """

    lines_N: np.ndarray
    line_bytes_N: np.ndarray
    paragraphs_N: np.ndarray
    paragraph_bytes_N: np.ndarray
    top_NG: np.ndarray
    repeated_NG: np.ndarray


@njit(cache=True, inline="always")
def _place(keys: np.ndarray, mask: int, key: np.uint64) -> np.int64:
    place = np.int64(key) & mask
    while keys[place] != np.uint64(0) and keys[place] != key:
        place = (place + 1) & mask
    return place


@njit(cache=True, inline="always")
def _table_size(entries: int) -> int:
    size = 8
    while size < 2 * entries:
        size *= 2
    return size


@njit(cache=True)
def _block_shares(
    hashes: np.ndarray, sizes: np.ndarray, flags: np.ndarray, start: int, end: int, flag: int, keys: np.ndarray
) -> tuple[float, float]:
    """Share and bytes of blocks seen before in units `start .. end - 1`; a block begins at a unit with `flag`."""
    mask = _table_size(end - start) - 1
    keys[: mask + 1] = 0
    blocks, again, again_bytes = 0, 0, 0
    unit = start
    while unit < end:
        h, size = np.uint64(0), 0
        while True:
            h = mixed(h ^ hashes[unit])
            size += sizes[unit]
            unit += 1
            if unit == end or flags[unit] & flag:
                break
        place = _place(keys, mask, h)
        blocks += 1
        if keys[place] == h:
            again += 1
            again_bytes += size
        keys[place] = h
    return again / max(blocks, 1), float(again_bytes)


@njit(cache=True)
def _top_bytes(
    grams: np.ndarray, count: int, n: int, starts: np.ndarray, ends: np.ndarray, keys: np.ndarray, times: np.ndarray
) -> int:
    """Bytes that the most frequent n-gram covers: its length times how often it stands there; 0 if only once."""
    mask = _table_size(count) - 1
    keys[: mask + 1] = 0
    best, best_bytes = 1, 0
    for index in range(count):
        place = _place(keys, mask, grams[index])
        if keys[place] == np.uint64(0):
            keys[place], times[place] = grams[index], 0
        times[place] += 1
        covered = times[place] * (ends[index + n - 1] - starts[index])
        if times[place] > best or (times[place] == best > 1 and covered > best_bytes):
            best, best_bytes = times[place], covered
    return best_bytes


@njit(cache=True)
def _repeated_bytes(
    grams: np.ndarray, count: int, n: int, starts: np.ndarray, ends: np.ndarray, keys: np.ndarray
) -> int:
    """Bytes of the n-grams that stood there before; a found one is stepped over, so nothing counts twice."""
    mask = _table_size(count) - 1
    keys[: mask + 1] = 0
    index, covered = 0, 0
    while index < count:
        place = _place(keys, mask, grams[index])
        if keys[place] == grams[index]:
            covered += ends[index + n - 1] - starts[index]
            index += n
        else:
            keys[place] = grams[index]
            index += 1
    return covered


@njit(cache=True)
def _measure(
    words: np.ndarray, starts: np.ndarray, ends: np.ndarray, word_borders: np.ndarray,
    unit_hash: np.ndarray, unit_size: np.ndarray, unit_flags: np.ndarray, unit_borders: np.ndarray,
    sizes: np.ndarray, blocks: np.ndarray, top: np.ndarray, repeated: np.ndarray,
) -> None:  # fmt: skip
    most = 1
    for document in range(sizes.shape[0]):
        most = max(most, word_borders[document + 1] - word_borders[document])
        most = max(most, unit_borders[document + 1] - unit_borders[document])
    keys, times = np.empty(_table_size(most), np.uint64), np.empty(_table_size(most), np.int32)
    grams = np.empty(most, np.uint64)
    for document in range(sizes.shape[0]):
        first, last, size = word_borders[document], word_borders[document + 1], max(sizes[document], 1)
        for column, flag in enumerate((LINE_START, PARAGRAPH_START)):
            share, covered = _block_shares(
                unit_hash, unit_size, unit_flags, unit_borders[document], unit_borders[document + 1], flag, keys
            )
            blocks[document, 2 * column] = share
            blocks[document, 2 * column + 1] = covered / size
        for column, n in enumerate(TOP_NGRAMS):
            count = ngrams_into(words, first, last, n, grams)
            top[document, column] = (
                _top_bytes(grams, count, n, starts[first:last], ends[first:last], keys, times) / size
            )
        for column, n in enumerate(REPEATED_NGRAMS):
            count = ngrams_into(words, first, last, n, grams)
            repeated[document, column] = (
                _repeated_bytes(grams, count, n, starts[first:last], ends[first:last], keys) / size
            )


def repetition(scan: Scan) -> Repetition:
    """Measure every document of a scan."""
    sizes = scan.borders[1:] - scan.borders[:-1]
    blocks = np.zeros((len(scan), 4))
    top, repeated = np.zeros((len(scan), len(TOP_NGRAMS))), np.zeros((len(scan), len(REPEATED_NGRAMS)))
    _measure(
        scan.word_hash_W, scan.word_start_W, scan.word_end_W, scan.word_borders,
        scan.unit_hash_U, scan.unit_end_U - scan.unit_start_U, scan.unit_flags_U, scan.unit_borders,
        sizes, blocks, top, repeated,
    )  # fmt: skip
    return Repetition(blocks[:, 0], blocks[:, 1], blocks[:, 2], blocks[:, 3], top, repeated)
