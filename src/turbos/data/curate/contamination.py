"""Decontamination: documents that hold what the model will be examined with are dropped.

A document is dropped where it shares a 13-gram of words with an evaluation text (GPT-3, arXiv 2005.14165, appendix C),
or holds a whole short evaluation text as a line or sentence of its own. As in GPT-3, an n-gram that many evaluation
texts share is how such questions are put and no evidence: here more than 10. In Chinese, where words are characters,
n is 20: thirteen characters make eight words. It cannot see a translation or a paraphrase.

>>> from turbos.data.curate.words import scan_texts
>>> exam = EvaluationTexts(["Tom has five red apples and gives two of them to his old friend Ann, how many are left?"])
>>> page = b"Quiz: Tom has five red apples and gives two of them to his old friend Ann, they say."
>>> exam.found_in(scan_texts([page, b"Tom has five red apples."])).tolist()
[True, False]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from numba import njit

from turbos.data.curate.hashing import HashSet, ngrams_into, slot_of
from turbos.data.curate.words import Scan, scan_texts
from turbos.data.problems import FIRST_HELD_OUT_SEED, families, levels, make_problem

NGRAM_WORDS, NGRAM_CHARACTERS = 13, 20
COMMON_TEXTS = 10
"""An n-gram that stands in more evaluation texts than this is a phrase, not evidence."""

HELD_OUT_SEEDS = 256
"""As many held-out problems of each family and level are kept out; evaluations take the first ones."""

SHORTEST_LINE_BYTES = 8
"""Shorter lines of evaluation texts (`yes`, `A)`) would hit by chance."""


@njit(cache=True)
def _ngrams_in(
    words: np.ndarray, word_borders: np.ndarray, n: int, ngrams: np.ndarray, grams: np.ndarray, found: np.ndarray
) -> None:
    for document in range(found.shape[0]):
        count = ngrams_into(words, word_borders[document], word_borders[document + 1], n, grams)
        for index in range(count):
            if ngrams[slot_of(ngrams, grams[index])] != np.uint64(0):
                found[document] = True
                break


@njit(cache=True)
def _lines_in(units: np.ndarray, unit_borders: np.ndarray, lines: np.ndarray, found: np.ndarray) -> None:
    for document in range(found.shape[0]):
        for unit in range(unit_borders[document], unit_borders[document + 1]):
            found[document] |= lines[slot_of(lines, units[unit])] != np.uint64(0)


def _rare(hashes: Sequence[np.ndarray], most: int) -> np.ndarray:
    """Hashes that stand in at most so many of the arrays."""
    if not hashes:
        return np.zeros(0, np.uint64)
    different, times = np.unique(np.concatenate([np.unique(one) for one in hashes]), return_counts=True)
    return different[times <= most]


class EvaluationTexts:
    """The evaluation texts as 13-grams, and those shorter than that as whole lines."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        scan = scan_texts([text.encode(errors="replace") for text in texts])
        sizes = np.where(scan.is_chinese_N, NGRAM_CHARACTERS, NGRAM_WORDS)
        ngrams: dict[int, list[np.ndarray]] = {NGRAM_WORDS: [], NGRAM_CHARACTERS: []}
        lines = []
        for number in range(len(scan)):
            first, last = scan.word_borders[number], scan.word_borders[number + 1]
            n = int(sizes[number])
            unit, end = scan.unit_borders[number], scan.unit_borders[number + 1]
            if last - first >= n:
                out = np.empty(last - first, np.uint64)
                ngrams[n].append(out[: ngrams_into(scan.word_hash_W, first, last, n, out)])
            elif end - unit == 1 and scan.unit_end_U[unit] - scan.unit_start_U[unit] >= SHORTEST_LINE_BYTES:
                lines.append(scan.unit_hash_U[unit:end])
        self.num_texts = len(scan)
        self.ngrams = {n: HashSet(_rare(found, COMMON_TEXTS)) for n, found in ngrams.items()}
        self.lines = HashSet(_rare(lines, len(lines)))

    def found_in(self, scan: Scan) -> np.ndarray:
        """Whether each document holds one of them, bool `[N]`."""
        found = np.zeros(len(scan), np.bool_)
        grams = np.empty(max(1, int(np.max(scan.word_borders[1:] - scan.word_borders[:-1], initial=1))), np.uint64)
        for n, seen in self.ngrams.items():
            if seen:
                _ngrams_in(scan.word_hash_W, scan.word_borders, n, seen.slots, grams, found)
        _lines_in(scan.unit_hash_U, scan.unit_borders, self.lines.slots, found)
        return found


@cache
def held_out_questions(seeds: int = HELD_OUT_SEEDS) -> tuple[str, ...]:
    """Questions of the held-out problems that evaluations draw: the first seeds of every family and level."""
    numbers = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + seeds)
    cases = [(family, level) for family in families() for level in range(levels(family))]
    return tuple(make_problem(family, number, level).question for family, level in cases for number in numbers)
