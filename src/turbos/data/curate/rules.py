"""The heuristic filters that the field has published, with its thresholds, each named by its paper.

[Gopher] arXiv 2112.11446, appendix A.1.1, table A1. [C4] arXiv 1910.10683, section 2.2. [FineWeb] arXiv 2406.17557,
section 3.6. They were made for English web pages. Rules about English words and line shapes are therefore asked only of
prose in an alphabet; Chinese keeps those that count something it has, and n-grams of 8 to 10 of its characters stand
for Gopher's of 5 to 7 words (a Chinese word has 1.6 characters). Programs are only asked how much they repeat.

`RULES["web"]` is all of it, for pages from a crawl. `RULES["books"]`, for dictionaries, manuals, plays and chats,
leaves out what only says that a text is no web page: lengths, line ends, short lines, stop words, and repeated n-grams,
whose limits one in 170 documents of the Brown corpus breaks but one in seven of a database's manual. As Gopher's first
rule already drops what has fewer than 50 words, the other rules are only asked of texts with as many. Exact and near
copies are no matter of rules.

>>> from turbos.data.curate.words import scan_texts
>>> scan = scan_texts([b"spam ham " * 200])
>>> [rule.name for rule in broken_rules(scan, np.array([Writing.ALPHABET]), "books")[0]][:1]
['top 2-gram covers too much']
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np

from turbos.data.curate.repetition import REPEATED_NGRAMS, TOP_NGRAMS, Repetition, repetition
from turbos.data.curate.words import Count, Scan


class Writing(IntEnum):
    """What kind of writing a document is, as far as rules care."""

    ALPHABET = 0
    CHINESE = 1
    CODE = 2


ALL = (Writing.ALPHABET, Writing.CHINESE, Writing.CODE)
TEXT = (Writing.ALPHABET, Writing.CHINESE)
PROSE = (Writing.ALPHABET,)
RuleSet = Literal["web", "books"]
FEWEST_WORDS = 50


@dataclass(frozen=True)
class Measures:
    """What rules measure: a scan and its repetition."""

    scan: Scan
    repetition: Repetition


@dataclass(frozen=True)
class Rule:
    """A filter: a document whose measure is below `low` or above `high` goes. `writings` says whom it is asked."""

    name: str
    paper: str
    measure: Callable[[Measures], np.ndarray]
    low: float = float("-inf")
    high: float = float("inf")
    writings: tuple[Writing, ...] = ALL
    web_only: bool = False
    asks_short_texts: bool = False

    @property
    def limit(self) -> str:
        """The threshold as the report prints it."""
        bounds = [f"at least {self.low:g}"] * (self.low != float("-inf"))
        return " and ".join(bounds + [f"at most {self.high:g}"] * (self.high != float("inf")))


def _count(column: Count) -> Callable[[Measures], np.ndarray]:
    return lambda measures: measures.scan.count(column)


def _share(part: Count, whole: Count) -> Callable[[Measures], np.ndarray]:
    return lambda measures: measures.scan.share(part, whole)


def _top(column: int) -> Callable[[Measures], np.ndarray]:
    return lambda measures: measures.repetition.top_NG[:, column]


def _line_bytes(measures: Measures) -> np.ndarray:
    return measures.repetition.line_bytes_N


def _repeated(column: int) -> Callable[[Measures], np.ndarray]:
    return lambda measures: measures.repetition.repeated_NG[:, column]


GOPHER, C4, FINEWEB = "Gopher", "C4", "FineWeb"

QUALITY_RULES = (
    Rule("fewer than 50 or more than 100,000 words", GOPHER, _count(Count.WORDS), FEWEST_WORDS, 1e5, TEXT, True, True),
    Rule("mean word length outside 3 to 10", GOPHER, _share(Count.WORD_CHARACTERS, Count.WORDS), 3, 10, PROSE, True),
    Rule("too many # and ellipses for its words", GOPHER, _share(Count.SYMBOLS, Count.WORDS), high=0.1, writings=TEXT),
    Rule("most lines are bullets", GOPHER, _share(Count.BULLET_LINES, Count.LINES), high=0.9, writings=TEXT),
    Rule("many lines end in an ellipsis", GOPHER, _share(Count.ELLIPSIS_LINES, Count.LINES), high=0.3, writings=TEXT),
    Rule("too few words with a letter", GOPHER, _share(Count.LETTER_WORDS, Count.WORDS), 0.8, 1.0, TEXT, True),
    Rule("fewer than two stop words", GOPHER, _count(Count.STOP_WORDS), 2, writings=PROSE, web_only=True),
    Rule("holds lorem ipsum", C4, _count(Count.LOREM_IPSUM), high=0, writings=TEXT, asks_short_texts=True),
    Rule("holds a curly bracket", C4, _count(Count.BRACES), high=0, writings=TEXT, web_only=True),
    Rule("fewer than 3 sentences", C4, _count(Count.SENTENCES), 3, writings=TEXT, web_only=True),
    Rule("few lines end a sentence", FINEWEB, _share(Count.TERMINAL_LINES, Count.LINES), 0.12, 1.0, TEXT, True),
    Rule("most lines are short", FINEWEB, _share(Count.SHORT_LINES, Count.LINES), 0.0, 0.67, PROSE, True),
    Rule("repeated lines are a tenth of it", FINEWEB, _line_bytes, 0.0, 0.1, TEXT, True),
)

REPETITION_RULES = (
    Rule("repeated lines", GOPHER, lambda found: found.repetition.lines_N, 0.0, 0.3, TEXT, True),
    Rule("repeated paragraphs", GOPHER, lambda found: found.repetition.paragraphs_N, high=0.3, writings=TEXT),
    Rule("repeated lines cover too much", GOPHER, _line_bytes, high=0.2),
    Rule("repeated paragraphs cover too much", GOPHER, lambda found: found.repetition.paragraph_bytes_N, high=0.2),
    *(
        Rule(f"top {n}-gram covers too much", GOPHER, _top(column), high=high, writings=PROSE)
        for column, (n, high) in enumerate(zip(TOP_NGRAMS, (0.20, 0.18, 0.16), strict=True))
    ),
    *(
        Rule(f"repeated {n}-grams cover too much", GOPHER, _repeated(column), 0.0, high, PROSE, True)
        for column, (n, high) in enumerate(zip(REPEATED_NGRAMS, (0.15, 0.14, 0.13, 0.12, 0.11, 0.10), strict=True))
    ),
    *(
        Rule(f"repeated {n}-character runs cover too much", GOPHER, _repeated(column), 0.0, high, (Writing.CHINESE,))
        for column, (n, high) in enumerate(zip((8, 9, 10), (0.15, 0.14, 0.13), strict=True), start=3)
    ),
)

RULES: dict[RuleSet, tuple[Rule, ...]] = {
    "web": QUALITY_RULES + REPETITION_RULES,
    "books": tuple(rule for rule in QUALITY_RULES + REPETITION_RULES if not rule.web_only),
}


def broken_rules(scan: Scan, writing_N: np.ndarray, rule_set: RuleSet) -> list[list[Rule]]:
    """The rules that each document breaks, in their order; an empty list is a document that stays.

    `writing_N` holds a `Writing` for each document.
    """
    measures = Measures(scan, repetition(scan))
    broken: list[list[Rule]] = [[] for _ in range(len(scan))]
    long_enough = scan.count(Count.WORDS) >= FEWEST_WORDS
    for rule in RULES[rule_set]:
        measured = rule.measure(measures)
        asked = np.isin(writing_N, np.array(rule.writings, np.int64)) & (long_enough | rule.asks_short_texts)
        for document in np.flatnonzero(asked & ((measured < rule.low) | (measured > rule.high))):
            broken[document].append(rule)
    return broken


def rules_of(rule_sets: Sequence[RuleSet]) -> list[Rule]:
    """The different rules of some sets, for a report."""
    return list(dict.fromkeys(rule for rule_set in rule_sets for rule in RULES[rule_set]))
