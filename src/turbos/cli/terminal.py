"""Model text on a terminal: shown, never obeyed.

>>> printable("4\\x1b[2J\\n"), printable("4\\x1b[2J\\n", keep="\\n\\t")
('4·[2J·', '4·[2J\\n')
"""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    """The text without characters that could command a terminal (`keep` names those that may)."""
    return "".join(letter if letter.isprintable() or letter in keep else "·" for letter in text)
