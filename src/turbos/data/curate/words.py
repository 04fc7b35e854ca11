"""One pass over the bytes of many documents: words, lines and sentences with their hashes, and what rules count.

Every later stage works on what this pass returns; no other one looks at every byte. A word is a run of letters and
digits, ASCII letters folded to lower case; each Chinese character and each Japanese kana is a word of its own. A unit
is a line, or a sentence of a line that holds several. This file judges nothing: `rules.py` does.

>>> scan = scan_texts([b"To be, or not to be.\\n\\nYes!"])
>>> scan.counts_NK[0, [Count.WORDS, Count.LINES, Count.PARAGRAPHS, Count.UNITS]].tolist()
[7, 2, 2, 2]
>>> bool(scan.word_hash_W[0] == scan.word_hash_W[4]), [scan.unit_text(unit) for unit in range(2)]
(True, [b'To be, or not to be.', b'Yes!'])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numba import njit

from turbos.data.curate.hashing import mixed


class Count(IntEnum):
    """Columns of a scan's counts: one whole number for each document."""

    BYTES = 0
    WORDS = 1
    WORD_CHARACTERS = 2
    LETTER_WORDS = 3
    CHINESE_WORDS = 4
    CHARACTERS = 5
    SYMBOLS = 6
    STOP_WORDS = 7
    LINES = 8
    BULLET_LINES = 9
    ELLIPSIS_LINES = 10
    TERMINAL_LINES = 11
    SHORT_LINES = 12
    SENTENCES = 13
    PARAGRAPHS = 14
    UNITS = 15
    BRACES = 16
    LOREM_IPSUM = 17


STOP_WORDS = (b"the", b"be", b"to", b"of", b"and", b"that", b"have", b"with")
"""Gopher's eight (arXiv 2112.11446, appendix A.1.1): prose has at least two of them."""

SHORT_LINE_CHARACTERS = 30
"""FineWeb's short line (arXiv 2406.17557, section 3.6)."""

FNV_OFFSET, FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)

SPACE, LETTER, DIGIT, CHINESE, TERMINAL, SIGN = range(6)
"""Kinds of character. TERMINAL ends a sentence; SIGN is everything else."""

LINE_START, PARAGRAPH_START = 1, 2
"""Bits of a unit's flags: it begins a line, it begins a paragraph."""


def hash_word(word: bytes) -> int:
    """The hash of one folded word, as the scan gives it."""
    h = int(FNV_OFFSET)
    for byte in word:
        h = (h ^ byte) * int(FNV_PRIME) % 2**64
    with np.errstate(over="ignore"):
        return int(mixed.py_func(np.uint64(h)))


def _ascii_kinds() -> np.ndarray:
    """The kind of each byte below 128."""
    kinds = np.full(128, SIGN, np.uint8)
    for byte in range(128):
        letter = chr(byte)
        if letter.isspace() or byte < 32:
            kinds[byte] = SPACE
        elif letter.isalpha():
            kinds[byte] = LETTER
        elif letter.isdigit():
            kinds[byte] = DIGIT
    for byte in b".!?":
        kinds[byte] = TERMINAL
    return kinds


ASCII_KINDS = _ascii_kinds()
STOP_HASHES = np.array([hash_word(word) for word in STOP_WORDS], np.uint64)
LOREM, IPSUM = np.uint64(hash_word(b"lorem")), np.uint64(hash_word(b"ipsum"))


@njit(cache=True, inline="always")
def _wide_kind(code: int) -> int:
    """The kind of a character beyond ASCII."""
    if 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0x3041 <= code <= 0x30FA or 0xF900 <= code <= 0xFAFF:
        return CHINESE
    if code >= 0x10000:
        return CHINESE if 0x20000 <= code <= 0x323AF else SIGN
    if code in (0x3002, 0xFF01, 0xFF1F, 0x2026, 0xFF0E):
        return TERMINAL
    if code in (0xA0, 0x3000, 0x2028, 0x2029, 0xFEFF) or 0x2000 <= code <= 0x200B:
        return SPACE
    if code < 0xC0 or code in (0xD7, 0xF7) or 0x2000 <= code <= 0x2BFF or 0x3000 <= code <= 0x303F:
        return SIGN
    if 0xFF10 <= code <= 0xFF19:
        return DIGIT
    if 0xFE30 <= code <= 0xFE4F or 0xFF00 <= code <= 0xFF20 or 0xFF3B <= code <= 0xFF40 or code >= 0xFF5B:
        return SIGN
    return LETTER


@njit(cache=True, inline="always")
def _decoded(text: np.ndarray, place: int, lead: int) -> tuple[int, int]:
    """Code and number of bytes of the character beyond ASCII at a place; the text is valid UTF-8."""
    if lead < 0xE0:
        return (lead & 31) << 6 | (text[place + 1] & 63), 2
    if lead < 0xF0:
        return (lead & 15) << 12 | (text[place + 1] & 63) << 6 | (text[place + 2] & 63), 3
    high = (lead & 7) << 18 | (text[place + 1] & 63) << 12
    return high | (text[place + 2] & 63) << 6 | (text[place + 3] & 63), 4


@njit(cache=True, inline="always")
def _is_bullet(code: int) -> bool:
    return code in (0x2A, 0x2D, 0x2022, 0x25CF, 0x25E6, 0x2023, 0x25AA, 0x25A0, 0xB7)


@njit(cache=True, inline="always")
def _closes(code: int) -> bool:
    """Whether a sign may stand behind the sign that ends a sentence: quotes and brackets."""
    return code in (0x22, 0x27, 0x29, 0x5D, 0x201D, 0x2019, 0x300D, 0x300F, 0xFF09, 0x3011, 0xBB)


@njit(cache=True, inline="always")
def _character(text: np.ndarray, place: int) -> tuple[int, int, int]:
    """Code, number of bytes and kind of the character at a place."""
    # Adding to a byte makes it a whole integer.
    code = 0 + text[place]
    if code < 128:
        return code, 1, 0 + ASCII_KINDS[code]
    code, size = _decoded(text, place, code)
    return code, size, _wide_kind(code)


@njit(cache=True, inline="always")
def _hashed(h: np.uint64, text: np.ndarray, place: int, size: int) -> np.uint64:
    """A hash (FNV-1a) with one more character, ASCII folded to lower case."""
    for index in range(place, place + size):
        byte = text[index]
        h = (h ^ np.uint64(byte + 32 if 65 <= byte <= 90 else byte)) * FNV_PRIME
    return h


@njit(cache=True)
def _scan_words(
    text: np.ndarray, borders: np.ndarray, counts: np.ndarray,
    word_hash: np.ndarray, word_start: np.ndarray, word_end: np.ndarray, word_borders: np.ndarray,
) -> None:  # fmt: skip
    words = 0
    for document in range(borders.shape[0] - 1):
        place, stop = borders[document], borders[document + 1]
        count = counts[document]
        count[Count.BYTES] = stop - place
        while place < stop:
            code, size, kind = _character(text, place)
            count[Count.CHARACTERS] += 1
            count[Count.BRACES] += code == 0x7B
            count[Count.CHINESE_WORDS] += kind == CHINESE
            if kind != LETTER and kind != DIGIT and kind != CHINESE:
                place += size
                continue
            word_start[words] = place
            h, has_letter = _hashed(FNV_OFFSET, text, place, size), kind != DIGIT
            place += size
            characters = 1
            while kind != CHINESE and place < stop:
                code, size, following = _character(text, place)
                if following != LETTER and following != DIGIT:
                    break
                characters += 1
                h = _hashed(h, text, place, size)
                has_letter |= following == LETTER
                place += size
            word_hash[words], word_end[words] = mixed(h), place
            count[Count.WORD_CHARACTERS] += characters
            count[Count.CHARACTERS] += characters - 1
            count[Count.LETTER_WORDS] += has_letter
            words += 1
        word_borders[document + 1] = words
        count[Count.WORDS] = words - word_borders[document]


@njit(cache=True)
def _count_words(word_hash: np.ndarray, word_borders: np.ndarray, counts: np.ndarray) -> None:
    """Different stop words, and "lorem ipsum"."""
    for document in range(word_borders.shape[0] - 1):
        seen, last = 0, np.uint64(0)
        for word in range(word_borders[document], word_borders[document + 1]):
            key = word_hash[word]
            for index in range(STOP_HASHES.shape[0]):
                if key == STOP_HASHES[index]:
                    seen |= 1 << index
            counts[document, Count.LOREM_IPSUM] += key == IPSUM and last == LOREM
            last = key
        for index in range(STOP_HASHES.shape[0]):
            counts[document, Count.STOP_WORDS] += seen >> index & 1


@njit(cache=True)
def _scan_line(
    text: np.ndarray, place: int, stop: int, count: np.ndarray, units: int, flags: int,
    unit_hash: np.ndarray, unit_start: np.ndarray, unit_end: np.ndarray, unit_flags: np.ndarray,
) -> int:  # fmt: skip
    """Units and signs of one line that is not blank; returns the number of units so far.

    A sentence ends behind its sign (. ! ? 。 ！ ？) and the quotes and brackets that close there: with a blank after
    them, or at once where the sign is a wide one.
    """
    first, last, dots, characters, terminal = units, 0, 0, 0, 0
    open_unit, u = False, FNV_OFFSET
    while place < stop:
        code, size, kind = _character(text, place)
        characters += 1
        if open_unit and terminal and (kind == SPACE or (terminal > 127 and kind != TERMINAL and not _closes(code))):
            unit_hash[units], open_unit = mixed(u), False
            count[Count.SENTENCES] += 1
            units += 1
        if kind != SPACE:
            if not open_unit:
                open_unit, terminal, u = True, 0, FNV_OFFSET
                unit_start[units], unit_flags[units] = place, flags if units == first else 0
                count[Count.BULLET_LINES] += units == first and _is_bullet(code)
            unit_end[units] = place + size
            u = _hashed(u, text, place, size)
            terminal = code if kind == TERMINAL else terminal if _closes(code) else 0
            dots = dots + 1 if code == 0x2E else 0
            # An ellipsis is three dots in a row, or the sign of its own.
            count[Count.SYMBOLS] += dots == 3 or code == 0x23 or code == 0x2026
            last = code
        place += size
    if open_unit:
        unit_hash[units] = mixed(u)
        count[Count.SENTENCES] += terminal != 0
        units += 1
    count[Count.UNITS] += units - first
    if units > first:
        count[Count.LINES] += 1
        count[Count.SHORT_LINES] += characters < SHORT_LINE_CHARACTERS
        count[Count.ELLIPSIS_LINES] += dots >= 3 or last == 0x2026
        count[Count.TERMINAL_LINES] += terminal != 0 or last == 0x22 or last == 0x201D
    return units


@njit(cache=True)
def _scan_units(
    text: np.ndarray, borders: np.ndarray, counts: np.ndarray,
    unit_hash: np.ndarray, unit_start: np.ndarray, unit_end: np.ndarray, unit_flags: np.ndarray,
    unit_borders: np.ndarray,
) -> None:  # fmt: skip
    units = 0
    for document in range(borders.shape[0] - 1):
        place, stop, after_blank = borders[document], borders[document + 1], True
        while place < stop:
            end = place
            while end < stop and text[end] != 10:
                end += 1
            flags = LINE_START | (PARAGRAPH_START if after_blank else 0)
            before, count = units, counts[document]
            units = _scan_line(
                text, place, end, count, units, flags, unit_hash, unit_start, unit_end, unit_flags
            )  # fmt: skip
            after_blank = units == before
            count[Count.PARAGRAPHS] += units > before and flags & PARAGRAPH_START != 0
            place = end + 1
        unit_borders[document + 1] = units


@dataclass(frozen=True)
class Scan:
    """What the pass found in N documents that lie one after another in `text_B`.

    `counts_NK` has a column for each `Count`. Words `word_borders[i] .. word_borders[i + 1] - 1` are document i's,
    with hash and byte range in `text_B`; units likewise.
    """

    text_B: np.ndarray
    borders: np.ndarray
    counts_NK: np.ndarray
    word_hash_W: np.ndarray
    word_start_W: np.ndarray
    word_end_W: np.ndarray
    word_borders: np.ndarray
    unit_hash_U: np.ndarray
    unit_start_U: np.ndarray
    unit_end_U: np.ndarray
    unit_flags_U: np.ndarray
    unit_borders: np.ndarray

    def __len__(self) -> int:
        return len(self.borders) - 1

    def count(self, column: Count) -> np.ndarray:
        """One count of every document, int64 `[N]`."""
        return self.counts_NK[:, column]

    def share(self, part: Count, whole: Count) -> np.ndarray:
        """One count over another, float64 `[N]`; 0 where the other is 0."""
        return self.count(part) / np.maximum(self.count(whole), 1)

    @property
    def is_chinese_N(self) -> np.ndarray:
        """Whether Chinese characters (or kana) make up more than a third of a document's words, bool `[N]`."""
        return self.share(Count.CHINESE_WORDS, Count.WORDS) > 1 / 3

    def unit_text(self, unit: int) -> bytes:
        """The bytes of one unit."""
        return self.text_B[self.unit_start_U[unit] : self.unit_end_U[unit]].tobytes()


def scan_texts(texts: Sequence[bytes]) -> Scan:
    """Scan documents given as UTF-8 (which must be valid: `str.encode` gives it)."""
    text = np.frombuffer(b"".join(texts), np.uint8)
    borders = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(one) for one in texts], out=borders[1:])
    # A word takes a byte and a blank, or three bytes in Chinese; a unit likewise.
    most = len(text) // 2 + len(texts) + 1
    counts = np.zeros((len(texts), len(Count)), np.int64)
    word_hash, unit_hash = np.empty(most, np.uint64), np.empty(most, np.uint64)
    word_start, word_end, unit_start, unit_end = (np.empty(most, np.int64) for _ in range(4))
    unit_flags = np.empty(most, np.uint8)
    word_borders, unit_borders = np.zeros(len(texts) + 1, np.int64), np.zeros(len(texts) + 1, np.int64)
    _scan_words(text, borders, counts, word_hash, word_start, word_end, word_borders)
    _count_words(word_hash, word_borders, counts)
    _scan_units(text, borders, counts, unit_hash, unit_start, unit_end, unit_flags, unit_borders)
    words, units = word_borders[-1], unit_borders[-1]
    return Scan(
        text, borders, counts, word_hash[:words], word_start[:words], word_end[:words], word_borders,
        unit_hash[:units], unit_start[:units], unit_end[:units], unit_flags[:units], unit_borders,
    )  # fmt: skip
