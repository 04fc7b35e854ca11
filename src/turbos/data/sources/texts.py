"""Texts in pieces: long ones are split at blank lines, short ones joined, to documents of some thousand characters.

>>> list(pieces(["ab\\n", "\\n", "cd\\n", "\\n", "\\n"], characters=2))
['ab\\n', 'cd\\n']
>>> list(grouped(["one", "two", "three"], characters=6, joiner=" "))
['one two\\n', 'three\\n']
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 6000
"""Long texts are split at a blank line once a piece is about this long."""

GROUP_CHARACTERS = 2000
"""Short texts, such as a dictionary's entries, are joined until a document is about this long."""

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\ufeff\ufffe\uffff\u200b\u00ad]")
"""Everything but tab and newline that shows nothing on paper."""


def pieces(lines: Iterable[str], characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Texts of about `characters` from lines (with their ends), broken at blank lines where there are any."""
    parts: list[str] = []
    size = 0
    for line in lines:
        for start in range(0, len(line), 4 * characters):
            part = line[start : start + 4 * characters]
            parts.append(part)
            size += len(part)
            if (size >= characters and not line.strip()) or size >= 4 * characters:
                yield "".join(parts).strip("\n") + "\n"
                parts, size = [], 0
    if "".join(parts).strip():
        yield "".join(parts).strip("\n") + "\n"


def split_text(text: str) -> Iterator[str]:
    """A text in pieces."""
    return pieces(text.splitlines(keepends=True))


def grouped(texts: Iterable[str], characters: int = GROUP_CHARACTERS, joiner: str = "\n\n") -> Iterator[str]:
    """Short texts joined into documents of about `characters`."""
    parts: list[str] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= characters:
            yield joiner.join(parts) + "\n"
            parts, size = [], 0
    if parts:
        yield joiner.join(parts) + "\n"


def tidy(text: str) -> str:
    """The text without control characters, blanks at line ends and more than one blank line in a row.

    >>> tidy("a \\r\\n\\n\\n\\nb\\x07\\n")
    'a\\n\\nb\\n'
    """
    text = CONTROL_CHARACTERS.sub("", text)
    text = re.sub(r"[ \t\u00a0]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def join_wrapped(lines: Iterable[str]) -> str:
    """Lines of one paragraph as one line: a blank between them, but none between Chinese characters or after a hyphen.

    >>> join_wrapped(["two ", " words"]), join_wrapped(["中文", "字"]), join_wrapped(["self-", "made"])
    ('two words', '中文字', 'self-made')
    """
    text = "\n".join(line.strip() for line in lines)
    text = re.sub(r"(?<=[a-z]-)\n(?=[a-z])", "", text).replace("\n", " ")
    return re.sub(r"(?<=[\u3000-\u9fff\uff00-\uffef]) (?=[\u3000-\u9fff\uff00-\uffef])", "", text)
