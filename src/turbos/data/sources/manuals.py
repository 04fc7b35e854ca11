"""Manuals of programs and systems, English and Chinese: each page is one text, long ones in pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from turbos.data.sources.archives import Keep, deb_files
from turbos.data.sources.markup import html_text, pod_text, rst_text
from turbos.data.sources.texts import split_text, tidy
from turbos.data.sources.troff import man_text

SHORTEST_PAGE = 200
"""Pages of fewer characters only lead elsewhere."""

Reader = Callable[[Path | None], Iterator[str]]


def pages(keep: Keep, convert: Callable[[str], str]) -> Reader:
    """A reader of the files of a Debian package whose names `keep` accepts, each converted to plain text."""

    def read(archive: Path | None) -> Iterator[str]:
        assert archive is not None
        for _, content in deb_files(archive, keep):
            text = convert(content.decode("utf-8", errors="replace"))
            if len(text) >= SHORTEST_PAGE:
                yield from split_text(text)

    return read


def is_english_rst(name: str) -> bool:
    """A source file of Sphinx, not below a folder of translations."""
    return name.endswith(".rst.txt") and "/_sources/" in name and "/translations/" not in name


def is_chinese_rst(name: str) -> bool:
    """A source file of the Linux documentation in Chinese, simplified."""
    return name.endswith(".rst.txt") and "/_sources/translations/zh_CN/" in name


def postgresql_page(page: str) -> str:
    """A chapter of PostgreSQL's manual without its navigation."""
    page = re.sub(r'<div class="navheader">.*?<hr ?/></div>|<div class="navfooter">.*', "", page, flags=re.DOTALL)
    page = re.sub(r'<div class="toc">.*?</dl></div>', "", page, flags=re.DOTALL)
    return html_text(re.sub(r'<a href="#ftn[^>]*>.*?</a>|<a href="#id-[^>]*>#</a>', "", page, flags=re.DOTALL))


def libreoffice_page(page: str) -> str:
    """A page of LibreOffice's help: what is between the frame's head and the related topics."""
    _, _, page = page.partition('<div id="DisplayArea"')
    page = re.split(r'<a name="relatedtopics">|<div class="relatedtopics">|<div id="SearchFrame">', page)[0]
    # The tag was cut open at its name.
    return html_text(page.partition(">")[2])


def git_page(page: str) -> str:
    """A page of git's manual."""
    return html_text(re.sub(r'<div id="footer">.*', "", page, flags=re.DOTALL))


def chinese_man_text(source: str) -> str:
    """A Chinese manual page without what its translators add at the end."""
    text = man_text(source)
    return tidy(re.split(r"^(?:跋|\[?中文版维护人\]?|中文版维护人)$", text, flags=re.MULTILINE)[0]) if text else ""


linux_docs = pages(is_english_rst, rst_text)
linux_docs_zh = pages(is_chinese_rst, rst_text)
python_docs = pages(is_english_rst, rst_text)
perl_docs = pages(lambda name: name.endswith(".pod"), pod_text)
man_pages = pages(lambda name: "/man/man" in name, man_text)
man_pages_zh = pages(lambda name: "/man/zh_CN/" in name, chinese_man_text)
postgresql_docs = pages(lambda name: name.endswith(".html") and "/html/" in name, postgresql_page)
libreoffice_help = pages(lambda name: name.endswith(".html") and "/text/" in name, libreoffice_page)
git_docs = pages(lambda name: name.endswith(".html"), git_page)
