"""Model text on a terminal: shown, never obeyed.

>>> printable("4\\x1b[2J\\n"), printable("4\\x1b[2J\\n", keep="\\n\\t")
('4·[2J·', '4·[2J\\n')
"""

from __future__ import annotations

from typing import TextIO


def printable(text: str, keep: str = "") -> str:
    """The text without characters that could command a terminal (`keep` names those that may)."""
    return "".join(letter if letter.isprintable() or letter in keep else "·" for letter in text)


def write(out: TextIO, text: str) -> None:
    """Put text out at once; a terminal that cannot show a character shows a question mark."""
    encoding = out.encoding or "utf-8"
    out.write(text.encode(encoding, errors="replace").decode(encoding))
    out.flush()
