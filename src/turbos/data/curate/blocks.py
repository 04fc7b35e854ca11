"""Block pruning: lines and sentences that stood in an earlier document are cut out of a later one.

Two measures, after what has been published: three units in a row that were seen before (C4's three-sentence span, arXiv
1910.10683, section 2.2), and one unit of at least 60 bytes that was seen before (CCNet's paragraphs, arXiv 1911.00359,
section 3.1). Units are sentences and lines whatever their place, so a copy that is shifted against the original loses
what both share. Short units make a longer row until it holds 80 bytes: a menu goes, but a play may repeat `Exit.`.
Programs repeat lines with right and are passed over. What repeats inside one document is a matter of `rules.py`.

>>> from turbos.data.curate.words import scan_texts
>>> menu = b"Home | News | About us | Contact us | Terms of use | Log in or sign up now"
>>> scan = scan_texts([menu + b"\\nA first text.", menu + b"\\nAnother text."])
>>> pruned = Blocks().prune(scan, np.array([True, True]))
>>> pruned.bytes_cut_N.tolist(), pruned.text(1)
([0, 74], b'Another text.')
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

from turbos.data.curate.hashing import HashSet, mixed, slot_of
from turbos.data.curate.words import LINE_START, PARAGRAPH_START, Scan

SPAN_UNITS, SPAN_BYTES, MOST_UNITS = 3, 80, 16
LONE_BYTES = 60
SPAN_SALT = np.uint64(0xA0761D6478BD642F)


@njit(cache=True, inline="always")
def _span(hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, unit: int, last: int) -> tuple[int, np.uint64]:
    """End and hash of the shortest row from a unit on that is long enough; end 0 where there is none."""
    h, size = SPAN_SALT, 0
    for index in range(unit, min(unit + MOST_UNITS, last)):
        h = mixed(h ^ hashes[index])
        size += ends[index] - starts[index]
        if index - unit + 1 >= SPAN_UNITS and size >= SPAN_BYTES:
            return index + 1, h
    return 0, h


@njit(cache=True, inline="always")
def _add(slots: np.ndarray, key: np.uint64) -> int:
    place = slot_of(slots, key)
    is_new = slots[place] == np.uint64(0)
    slots[place] = key
    return is_new


@njit(cache=True)
def _prune(
    hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, unit_borders: np.ndarray, asked: np.ndarray,
    slots: np.ndarray, cut: np.ndarray,
) -> int:  # fmt: skip
    """Mark the units to cut, document by document, and add each document's blocks behind it; returns new keys."""
    added = 0
    for document in range(asked.shape[0]):
        if not asked[document]:
            continue
        first, last = unit_borders[document], unit_borders[document + 1]
        for unit in range(first, last):
            if ends[unit] - starts[unit] >= LONE_BYTES:
                cut[unit] |= slots[slot_of(slots, hashes[unit])] != np.uint64(0)
            end, key = _span(hashes, starts, ends, unit, last)
            if end and slots[slot_of(slots, key)] != np.uint64(0):
                cut[unit:end] = True
        for unit in range(first, last):
            if ends[unit] - starts[unit] >= LONE_BYTES:
                added += _add(slots, hashes[unit])
            end, key = _span(hashes, starts, ends, unit, last)
            if end:
                added += _add(slots, key)
    return added


@njit(cache=True)
def _bytes_cut(
    starts: np.ndarray, ends: np.ndarray, unit_borders: np.ndarray, cut: np.ndarray, bytes_cut: np.ndarray
) -> None:
    for document in range(bytes_cut.shape[0]):
        for unit in range(unit_borders[document], unit_borders[document + 1]):
            if cut[unit]:
                bytes_cut[document] += ends[unit] - starts[unit]


@dataclass(frozen=True)
class Pruned:
    """Which units of a scan go (`cut_U`, bool), and how many bytes that takes from each document."""

    scan: Scan
    cut_U: np.ndarray
    bytes_cut_N: np.ndarray

    def text(self, document: int) -> bytes:
        """What is left of a document; a line that lost all its units leaves no empty line."""
        scan = self.scan
        parts: list[bytes] = []
        line, paragraph = False, False
        for unit in range(scan.unit_borders[document], scan.unit_borders[document + 1]):
            line |= bool(scan.unit_flags_U[unit] & LINE_START)
            paragraph |= bool(scan.unit_flags_U[unit] & PARAGRAPH_START)
            if self.cut_U[unit]:
                continue
            gap = b"\n\n" if paragraph else b"\n" if line else self._gap(unit)
            indent = self._indent(unit, int(scan.borders[document])) if line else b""
            parts += [gap if parts else b"", indent, scan.unit_text(unit)]
            line = paragraph = False
        return b"".join(parts)

    def _gap(self, unit: int) -> bytes:
        """What stands between a unit and the one before it in its line."""
        return self.scan.text_B[self.scan.unit_end_U[unit - 1] : self.scan.unit_start_U[unit]].tobytes()

    def _indent(self, unit: int, document_start: int) -> bytes:
        """The blanks before the first unit of a line; none before one that its line's first unit preceded."""
        if not self.scan.unit_flags_U[unit] & LINE_START:
            return b""
        begin = max(int(self.scan.unit_end_U[unit - 1]) if unit else 0, document_start)
        return self.scan.text_B[begin : self.scan.unit_start_U[unit]].tobytes().rpartition(b"\n")[2]

    def cut_text(self, document: int) -> bytes:
        """The units that were cut, a line each."""
        units = range(self.scan.unit_borders[document], self.scan.unit_borders[document + 1])
        return b"\n".join(self.scan.unit_text(unit) for unit in units if self.cut_U[unit])


class Blocks:
    """The blocks of all documents so far, as hashes."""

    def __init__(self, seen: HashSet | None = None) -> None:
        self.seen = seen or HashSet()

    def prune(self, scan: Scan, asked: np.ndarray) -> Pruned:
        """Cut seen blocks out of the documents with `asked` (bool `[N]`); their own blocks are seen from then on."""
        cut = np.zeros(len(scan.unit_hash_U), np.bool_)
        self.seen.reserve(2 * len(cut))
        self.seen.count += _prune(
            scan.unit_hash_U, scan.unit_start_U, scan.unit_end_U, scan.unit_borders, asked, self.seen.slots, cut
        )
        bytes_cut = np.zeros(len(scan), np.int64)
        _bytes_cut(scan.unit_start_U, scan.unit_end_U, scan.unit_borders, cut, bytes_cut)
        return Pruned(scan, cut, bytes_cut)
