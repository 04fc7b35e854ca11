"""Groups of sources, so that a command can name many at once. No group has a source whose rights are unclear.

>>> GROUPS["chinese-modern"].sources[0]
'chinese'
>>> expand(["code", "english"])
['python', 'packages', 'english']
"""

from __future__ import annotations

from collections.abc import Sequence

from turbos.data.sources.card import SourceGroup

_PARTS = (
    SourceGroup(
        "english-prose",
        "books, essays, quotations",
        ("english", "austen", "brown", "bible", "fortunes", "devils-dictionary"),
    ),
    SourceGroup(
        "english-manuals",
        "technical prose",
        (
            *("linux-docs", "python-docs", "perl-docs", "man-pages", "man-pages-dev"),
            *("postgresql-docs", "libreoffice-help", "git-docs"),
        ),
    ),
    SourceGroup("english-dictionaries", "dictionaries", ("gcide", "wordnet", "foldoc", "jargon")),
    SourceGroup(
        "chinese-modern",
        "dictionaries, manuals, short texts",
        (
            *("chinese", "chinese-characters", "man-pages-zh", "libreoffice-help-zh"),
            *("fortunes-zh", "linux-docs-zh"),
        ),
    ),
    SourceGroup("chinese-classical", "verse and classics", ("classical-chinese",)),
    SourceGroup("bilingual", "a dictionary, conversations", ("cedict", "chat")),
    SourceGroup("code", "Python", ("python", "packages")),
    SourceGroup("exercises", "worked problems", ("problems",)),
)
DEFAULT_GROUP = "default"
GROUPS = {
    group.name: group
    for group in (
        *_PARTS,
        SourceGroup(DEFAULT_GROUP, "all groups", tuple(name for part in _PARTS for name in part.sources)),
    )
}
"""Every group; `default` has all of them."""


def expand(names: Sequence[str]) -> list[str]:
    """Names with groups replaced by their sources, each name once, in order."""
    parts = (GROUPS[name].sources if name in GROUPS else (name,) for name in names)
    return list(dict.fromkeys(name for part in parts for name in part))
