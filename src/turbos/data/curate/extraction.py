"""Extraction: the text of a document that is markup, without its menus, scripts and templates.

HTML goes through `resiliparse` (its main-content heuristics, as in DCLM, arXiv 2406.11794); wiki markup through a few
expressions here, as parsers of the whole language read less than 1 MB a second. A text that only quotes some markup (a
manual, a program) stays as it is: `markup_of` wants a tag every 400 characters where the text begins with one, every
120 elsewhere, or wiki links beside wiki signs.

>>> extracted("<html><body><nav><a href='/'>Home</a></nav><article><p>A short text.</p></article></body></html>")
'A short text.'
>>> page = "'''Ada''' {{born|1815}} was a [[mathematician]] and [[Writer|writer]] from [[London]].<ref>x</ref>"
>>> extracted(page + "\\n== Life ==")
'Ada  was a mathematician and writer from London.\\nLife'
>>> extracted("if a < b and b > c: pass")
"""

from __future__ import annotations

import re
from typing import Literal

TAG = re.compile(
    r"</?(?:html|head|body|div|p|br|ul|ol|li|table|t[rdh]|h[1-6]|a|span|section|article|nav)\b[^<>]{0,500}>", re.I
)
CHARACTERS_PER_TAG, CHARACTERS_PER_TAG_INSIDE = 400, 120
FEWEST_TAGS = 3

WIKI_LINK = re.compile(r"\[\[(?:[^\[\]|\n]*\|)?([^\[\]|\n]+)\]\]")
WIKI_SIGN = re.compile(r"^==+[^=\n]+==+\s*$|'''|\{\{[^{}]|<ref\b", re.M)
FEWEST_WIKI_LINKS = 3
TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}")
DEEPEST_TEMPLATE = 8
WIKI_CUTS = (
    (re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref>|<(math|gallery|nowiki)\b.*?</\1>", re.S | re.I), ""),
    (re.compile(r"\[\[(?:File|Image|Category|文件|档案|分类)\s*:(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", re.I), ""),
    (WIKI_LINK, r"\1"),
    (re.compile(r"\[https?://\S+\s+([^\[\]\n]+)\]"), r"\1"),
    (re.compile(r"\[https?://\S+\]"), ""),
    (re.compile(r"'{2,5}"), ""),
    (re.compile(r"^==+[ \t]*([^=\n]+?)[ \t]*==+[ \t]*$", re.M), r"\1"),
    (re.compile(r"^[ \t]*(?:\{\||\|\}|\|-|[|!]).*$", re.M), ""),
    (re.compile(r"</?[a-z]+\b[^<>]*>", re.I), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
)  # fmt: skip


def markup_of(text: str) -> Literal["html", "wiki", ""]:
    """Which markup a text is written in, or "" for none."""
    # Counting two signs first lets plain text pass at the speed of a memory scan.
    if text.count("</") + text.count("<p") + text.count("<P") >= 1:
        tags = sum(1 for _ in TAG.finditer(text))
        spacing = CHARACTERS_PER_TAG if text.lstrip().startswith("<") else CHARACTERS_PER_TAG_INSIDE
        if tags >= FEWEST_TAGS and tags * spacing >= len(text):
            return "html"
    if text.count("[[") >= FEWEST_WIKI_LINKS and WIKI_SIGN.search(text):
        links = len(WIKI_LINK.findall(text))
        if links >= FEWEST_WIKI_LINKS:
            return "wiki"
    return ""


def extracted(text: str) -> str | None:
    """The text inside the markup, or None where there is no markup; "" where the markup holds no text."""
    kind = markup_of(text)
    if kind == "html":
        from resiliparse.extract.html2text import extract_plain_text

        return str(extract_plain_text(text, main_content=True, alt_texts=False)).strip()
    return _wiki_text(text) if kind == "wiki" else None


def _wiki_text(text: str) -> str:
    # Templates stand inside one another; each round takes the innermost ones.
    for _ in range(DEEPEST_TEMPLATE):
        text, found = TEMPLATE.subn("", text)
        if not found:
            break
    for pattern, replacement in WIKI_CUTS:
        text = pattern.sub(replacement, text)
    return text.strip()
