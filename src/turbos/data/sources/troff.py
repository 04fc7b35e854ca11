"""Plain text out of manual pages (troff with the `man` macros, man(7) and groff_man(7)).

Paragraphs become lines, tables rows, and examples stay as they stand. Pages in `mdoc` and pages that only point
elsewhere (`.so`) give nothing.

>>> man_text('.TH X 1\\n.SH NAME\\nx \\\\- do\\n.B two\\n.BR words (3),\\nplease\\n')
'NAME\\n\\nx - do two words(3), please\\n'
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from turbos.data.sources.texts import join_wrapped, tidy

GLYPHS = {
    **{"aq": "'", "dq": '"', "oq": "‘", "cq": "’", "lq": "“", "rq": "”", "ga": "`", "ha": "^", "ti": "~", "rs": "\\"},
    **{"em": "—", "en": "–", "hy": "-", "bu": "•", "co": "©", "rg": "®", "tm": "™", "de": "°", "sc": "§", "mu": "×"},
    **{"->": "→", "<-": "←", "<=": "≤", ">=": "≥", "!=": "≠", "==": "≡", "+-": "±", "if": "∞", "pl": "+", "mi": "−"},
    **{"bv": "|", "ba": "|", "or": "|", "sl": "/", "at": "@", "sh": "#", "Do": "$", "eq": "=", "S1": "¹", "S2": "²"},
    **{"Fo": "«", "Fc": "»", "bq": "‚", "Bq": "„", "lB": "[", "rB": "]", "lC": "{", "rC": "}", "la": "⟨", "ra": "⟩"},
    **{"*a": "α", "*b": "β", "*p": "π", "*m": "μ", "mc": "µ", "t+-": "±", "12": "½", "14": "¼", "ss": "ß", "an": "¯"},
}
ACCENTS = {":": "\u0308", "'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ",": "\u0327", "o": "\u030a"}
SINGLE_FONT = frozenset(("B", "I", "SM", "SB", "R", "CW"))
ALTERNATING = frozenset(("BI", "BR", "IB", "IR", "RB", "RI", "OP"))
ENDS_IGNORED = {"de": "..", "de1": "..", "am": "..", "ig": ".."}


@dataclass
class _Page:
    """What of a page is written so far; `paragraph` is what is still to be joined into a line."""

    lines: list[str] = field(default_factory=list)
    paragraph: list[str] = field(default_factory=list)
    fills: bool = True
    tag_follows: bool = False
    in_table: bool = False
    ignored_until: str = ""

    def write(self, text: str) -> None:
        """A line of text: of the paragraph, or for itself where lines are kept."""
        if self.tag_follows or not self.fills:
            self.flush()
            self.lines.append(text)
            self.tag_follows = False
        elif text.strip():
            self.paragraph.append(text)
        else:
            self.break_paragraph()

    def flush(self) -> None:
        """End the line that is being filled."""
        if self.paragraph:
            self.lines.append(join_wrapped(self.paragraph))
            self.paragraph = []

    def break_paragraph(self) -> None:
        """End the paragraph."""
        self.flush()
        self.lines.append("")


def man_text(source: str) -> str:
    """Text of a manual page; "" where it is none in the `man` macros."""
    if re.search(r"^\.(?:so|Dd|Sh)\b", source, re.MULTILINE) or not re.search(r"^\.\s*SH\b", source, re.MULTILINE):
        return ""
    page = _Page()
    for line in re.sub(r"\\\n", "", source).splitlines():
        if page.ignored_until:
            if line.strip() == page.ignored_until:
                page.ignored_until = ""
            continue
        line = re.sub(r"\\[\"#].*", "", line) if "\\" in line else line
        if line[:1] in (".", "'"):
            _request(page, line)
        elif page.in_table:
            _table_row(page, line)
        elif line.strip() or not page.fills:
            page.write(_plain(line))
        else:
            page.break_paragraph()
    page.flush()
    return tidy("\n".join(page.lines))


def _request(page: _Page, line: str) -> None:
    """Obey one macro or request; those that only change the look do nothing."""
    found = re.match(r"[.']\s*(\S+)\s*(.*)", line)
    if found is None:
        return
    name, rest = found[1], found[2]
    if name in ENDS_IGNORED:
        page.ignored_until = ENDS_IGNORED[name]
    elif name in ("SH", "SS"):
        page.fills = True
        page.break_paragraph()
        page.lines += [_plain(" ".join(_arguments(rest))), ""]
    elif name in ("PP", "P", "LP", "HP", "sp", "TP", "IP", "TQ"):
        _paragraph(page, name, rest)
    elif name in SINGLE_FONT:
        page.write(_plain(" ".join(_arguments(rest))))
    elif name in ALTERNATING:
        page.write(_plain("".join(_arguments(rest))))
    elif name in ("nf", "EX", "fi", "EE"):
        page.flush()
        page.fills = name in ("fi", "EE")
    elif name in ("br", "RS", "RE"):
        page.flush()
    elif name in ("UR", "MT"):
        page.write(_plain(rest))
    elif name in ("TS", "TE"):
        page.break_paragraph()
        page.in_table = name == "TS"


def _paragraph(page: _Page, name: str, rest: str) -> None:
    page.break_paragraph()
    page.tag_follows = name in ("TP", "TQ")
    if name == "IP" and rest:
        mark = _plain(_arguments(rest)[0]) if _arguments(rest) else ""
        if mark in ("•", "-", "*", "·", "–") or re.fullmatch(r"\(?\w{1,2}[.)]", mark):
            page.paragraph.append(mark)
        elif mark:
            page.lines.append(mark)


def _table_row(page: _Page, line: str) -> None:
    """A row of a tbl(1) table; its options and formats, which end in `;` or `.` or hold no word, give nothing."""
    row = _plain(line)
    is_format = re.fullmatch(r"\s*(?:[lcrnasLCRNAS^_|=-][bBiIfwWpPvVxzeE]*[\s|(),.\d\w]*)+\.?;?\s*", row)
    if (
        row.strip() in ("_", "=", "T{", "T}")
        or row.endswith(";")
        or (is_format and "\t" not in row and len(row.split()) < 9)
    ):
        return
    row = row.replace("T{", "").replace("T}", "").strip()
    if row:
        page.lines.append(re.sub(r"\s*\t\s*", "\t", row))


def _arguments(rest: str) -> list[str]:
    """A macro's arguments: parted by blanks, `"` joins, `""` within quotes is one."""
    return [
        word[1:-1].replace('""', '"') if len(word) > 1 and word[0] == '"' == word[-1] else word.strip('"')
        for word in re.findall(r'"(?:[^"]|"")*"?|(?:\\ |\S)+', rest)
    ]


def _plain(text: str) -> str:
    """Text with its escape sequences resolved (groff(7)); fonts, sizes and moves leave nothing."""
    if "\\" not in text:
        return text
    text = re.sub(r"\\f(?:\[[^]]*\]|\(..|.)|\\s(?:[-+]?\d|\[[^]]*\]|[-+]?\(\d\d)|\\m\[[^]]*\]", "", text)
    text = re.sub(r"\\[vhwlLbDonxXYNRZ]'[^']*'|\\[nkgM](?:\[[^]]*\]|\(..|.)", "", text)
    text = re.sub(r"\\(?:\[([^]]*)\]|\((..))", lambda found: _glyph(found[1] or found[2]), text)
    text = re.sub(r"\\\*(?:\[([^]]*)\]|\((..)|(.))", lambda found: _glyph(found[1] or found[2] or found[3]), text)
    text = re.sub(r"\\[&|^/,%:cdurptaz{}!)]", "", text)
    return re.sub(r"\\(.)", lambda found: {"e": "\\", "-": "-", "~": " ", "0": " "}.get(found[1], found[1]), text)


def _glyph(name: str) -> str:
    """The character of a glyph's name; "" for an unknown one."""
    if re.fullmatch(r"u[0-9A-F]{4,6}", name):
        return chr(int(name[1:], 16))
    if len(name) == 2 and name[0] in ACCENTS and name[1].isalpha():
        return name[1] + ACCENTS[name[0]]
    return GLYPHS.get(name, "")
