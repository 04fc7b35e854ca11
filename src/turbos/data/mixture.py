"""A phase's mixture: shares of sources, the dial between English and Chinese, and how often a run will see each text.

Weights are shares of the tokens and need not add up to 1. The dial moves weight between sources in English and in
Chinese and leaves alone what both of them have together, and whatever is neither (code, sources in both languages).
Batches are dealt out by `loader.py`.

>>> english_weights({"books": 2.0, "code": 1.0, "news": 1.0}, {"books": "en", "code": "code", "news": "zh"}, 0.5)
{'books': 1.5, 'code': 1.0, 'news': 1.5}
>>> Supply("news", asked=3e6, there=1_000_000).epochs
3.0
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.data.sources import GROUPS, SOURCES, documents, expand

ENGLISH, CHINESE = "en", "zh"


def languages_of(names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """The language of each source or group: what is given, else what its cards say; UserError where neither says.

    >>> languages_of(["english-prose", "code", "mine.txt"], {"mine.txt": "zh"})
    {'english-prose': 'en', 'code': 'code', 'mine.txt': 'zh'}
    """
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise UserError(f"data: languages names {unknown[0]!r}, which is no source of the mixture")
    found = {}
    for name in names:
        if name not in given and name not in SOURCES and name not in GROUPS:
            raise UserError(f"data: english_share needs the language of {name!r}: set it in data.languages (en, zh)")
        cards = dict.fromkeys(SOURCES[one].language for one in expand([name]) if one in SOURCES)
        found[name] = given.get(name, ", ".join(cards))
    return found


def english_weights(weights: Mapping[str, float], languages: Mapping[str, str], share: float) -> dict[str, float]:
    """Weights whose English sources have `share` of what English and Chinese ones have together.

    UserError for a share outside 0..1, and where one of the languages is missing; a source that is left without weight
    is left out.
    """
    if not 0 <= share <= 1:
        raise UserError(f"data: english_share lies between 0 and 1, not {share}")
    totals = {
        language: sum(weight for name, weight in weights.items() if languages[name] == language)
        for language in (ENGLISH, CHINESE)
    }
    for language, word in ((ENGLISH, "English (en)"), (CHINESE, "Chinese (zh)")):
        if not totals[language] > 0:
            raise UserError(f"data: english_share needs a source in {word}: add one, or leave english_share out")
    wanted = {ENGLISH: share * sum(totals.values()), CHINESE: (1 - share) * sum(totals.values())}
    factors = {language: wanted[language] / totals[language] for language in totals}
    turned = {name: weight * factors.get(languages[name], 1.0) for name, weight in weights.items()}
    return {name: weight for name, weight in turned.items() if weight > 0}


def require_sources(names: Sequence[str]) -> None:
    """Refuse a mixture that names a source which is not there, before anything is fetched or tokenised."""
    for name in names:
        known = name in SOURCES or name in GROUPS or name.startswith("datasets:")
        if not known and not Path(name).expanduser().exists():
            # Its own message names the nearest source.
            documents(name)


@dataclass(frozen=True)
class Supply:
    """Tokens that a run asks of a source, and those that are there."""

    name: str
    asked: float
    there: int

    @property
    def epochs(self) -> float:
        """How often the run sees each text of it."""
        return self.asked / self.there


def supplies(shares: Mapping[str, float], tokens: int, there: Mapping[str, int]) -> list[Supply]:
    """What a run of so many tokens asks of each source; shares need not add up to 1."""
    total = sum(shares.values())
    return [Supply(name, tokens * share / total, there[name]) for name, share in shares.items()]


def supply_line(found: Sequence[Supply]) -> str:
    """One line: tokens asked of each source and its epochs; sources that are seen more than once are named.

    >>> supply_line([Supply("books", 2e6, 8_000_000), Supply("news", 3e6, 1_000_000)])
    '5.00 M tokens asked: books 40 % = 0.25 epochs of 8.00 M, news 60 % = 3.00 epochs of 1.00 M; more than once: news'
    """
    asked = sum(supply.asked for supply in found)
    parts = [
        f"{one.name} {100 * one.asked / asked:.0f} % = {one.epochs:.2f} epochs of {_amount(one.there)}" for one in found
    ]
    repeated = ", ".join(one.name for one in found if one.epochs > 1)
    return f"{_amount(asked)} tokens asked: {', '.join(parts)}" + (f"; more than once: {repeated}" if repeated else "")


def _amount(tokens: float) -> str:
    return f"{tokens / 1e6:.2f} M" if tokens >= 1e5 else f"{tokens / 1e3:.1f} k"
