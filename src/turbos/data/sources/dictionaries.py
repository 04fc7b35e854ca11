"""Dictionaries: DICT files, CC-CEDICT, jionlp's. Entries are short, so some twenty of them make a document.

The two largest would fill a small model with entries, so only every other run of entries is taken of them.
"""

from __future__ import annotations

import gzip
import io
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from turbos.data.sources.archives import deb_files, tar_files
from turbos.data.sources.texts import grouped, join_wrapped, split_text, tidy

GCIDE_ONE_IN = 2
WORDNET_ONE_IN = 2
RUN = 16
"""Of the capped dictionaries one run of so many entries in `*_ONE_IN` is taken."""

BASE64 = {
    letter: value for value, letter in enumerate(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
}


def dict_entries(archive: Path) -> Iterator[str]:
    """Entries of the DICT dictionary in a Debian package, in its order, each once (dictfmt(1), RFC 2229).

    The `.index` gives offset and length of every headword in base 64; headwords that share an entry repeat them.
    """
    index, body = b"", b""
    for name, content in deb_files(archive, lambda name: name.endswith((".index", ".dict.dz"))):
        if name.endswith(".index"):
            index = content
        else:
            body = gzip.decompress(content)
    places = set()
    for line in index.splitlines():
        headword, place, size = line.split(b"\t")[:3]
        if not headword.lower().startswith((b"00-database", b"00database")):
            places.add((_number(place), _number(size)))
    for start, length in sorted(places):
        yield body[start : start + length].decode("utf-8", errors="replace")


def _number(digits: bytes) -> int:
    value = 0
    for digit in digits:
        value = 64 * value + BASE64[digit]
    return value


def gcide_entry(entry: str) -> str:
    """An entry of the Collaborative International Dictionary without its respelling and its editors' marks.

    >>> gcide_entry('Lapidate \\\\Lap"i*date\\\\, v. t. [L. lapidatus.]\\n   To\\n   stone.\\n   [1913 Webster]\\n')
    'Lapidate, v. t. [L. lapidatus.] To stone.'
    """
    entry = re.sub(
        r"\[(?:1913 Webster|Webster 1913[^]]*|PJC|WordNet[^]]*|AS|JK|RH|\+?[A-Z]{2,4}\d?)\][^\n]*", "", entry
    )
    entry = re.sub(r"(\w) +\\[^\\\n]+\\(?=[,;\s])", r"\1", entry)
    return _dictionary_paragraphs(entry)


def wordnet_entry(entry: str) -> str:
    """An entry of WordNet: the word, then its senses.

    >>> wordnet_entry("kotow\\n    n 1: a former\\n         custom [syn: {kowtow}, {kotow}]\\n    v 1: try\\n")
    'kotow\\nn 1: a former custom [syn: kowtow, kotow]\\nv 1: try'
    """
    return _dictionary_paragraphs(entry)


def _dictionary_paragraphs(entry: str) -> str:
    """Braces of cross-references removed, wrapped lines joined; a new line begins where a numbered sense does."""
    entry = re.sub(r"[{}]", "", entry)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n|\n(?=\s+(?:[a-z]+ )?\d+[.:] )", entry):
        lines = paragraph.strip().split("\n")
        if re.match(r"\S[^\n]*\n\s+(?:n|v|adj|adv)\s*\d*:? ", paragraph):
            paragraphs.append(lines.pop(0).strip())
        if "".join(lines).strip():
            paragraphs.append(join_wrapped(lines))
    return "\n".join(paragraphs)


def prose_entry(entry: str) -> str:
    """An entry of FOLDOC, the Jargon File or the Devil's Dictionary: prose or verse, whose lines stay.

    >>> prose_entry("lefun\\n\\n   <language> See {LeFun}.\\n")
    'lefun\\n\\n<language> See LeFun.\\n'
    """
    entry = re.sub(r"[{}]", "", entry.expandtabs())
    margins = [len(line) - len(line.lstrip()) for line in entry.splitlines() if line[:1] == " " and line.strip()]
    return tidy(re.sub(rf"^ {{{min(margins)}}}", "", entry, flags=re.MULTILINE)) if margins else tidy(entry)


def gcide(archive: Path | None) -> Iterator[str]:
    """The Collaborative International Dictionary of English, one run of entries in `GCIDE_ONE_IN`."""
    return _entries(archive, gcide_entry, GCIDE_ONE_IN)


def wordnet(archive: Path | None) -> Iterator[str]:
    """WordNet, one run of entries in `WORDNET_ONE_IN`."""
    return _entries(archive, wordnet_entry, WORDNET_ONE_IN)


def prose_dictionary(archive: Path | None) -> Iterator[str]:
    """A dictionary to be read rather than looked up: FOLDOC, the Jargon File, the Devil's Dictionary."""
    assert archive is not None
    documents = grouped((prose_entry(entry).rstrip() for entry in dict_entries(archive)), 4000)
    return (piece for document in documents for piece in split_text(document))


def _entries(archive: Path | None, clean: Callable[[str], str], one_in: int) -> Iterator[str]:
    assert archive is not None
    kept = (entry for number, entry in enumerate(dict_entries(archive)) if number // RUN % one_in == 0)
    documents = grouped(filter(None, map(clean, kept)))
    return (piece for document in documents for piece in split_text(document))


def cedict(archive: Path | None) -> Iterator[str]:
    """CC-CEDICT: a Chinese word, its reading and what it means in English, a line each."""
    assert archive is not None
    for _, content in tar_files(archive, lambda name: name.endswith("data/all.js")):
        module = content.decode("utf-8").strip().removeprefix("export default ").rstrip(";")
        yield from grouped(map(_cedict_line, json.loads(module)["all"]), joiner="\n")


def _cedict_line(entry: list[str | list[str]]) -> str:
    """A line for an entry of traditional form, simplified form, reading and meanings."""
    _, word, reading, meanings, *_ = entry
    said = meanings if isinstance(meanings, str) else "; ".join(meanings)
    return f"{word} ({reading}): {said}"


def chinese_words(archive: Path | None) -> Iterator[str]:
    """Dictionary entries and two-part sayings, forty to a document; the package's other word lists are left out."""
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        for name, joiner in (("chinese_word_dictionary", "："), ("xiehouyu", "——")):
            lines = _jionlp_lines(wheel, name)
            entries = iter([joiner.join(line.split("\t")) for line in lines if line.count("\t") == 1])
            while group := list(itertools.islice(entries, 40)):
                yield "\n".join(group) + "\n"


def chinese_characters(archive: Path | None) -> Iterator[str]:
    """Chinese characters and what they mean; the tilde that stands for the character is spelt out."""
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        rows = [line.split("\t") for line in _jionlp_lines(wheel, "chinese_char_dictionary")]
    explained = (f"{row[0]}：{row[-1].replace('~', row[0])}" for row in rows if len(row) > 6 and row[-1].strip())
    yield from (document for text in grouped(explained, joiner="\n") for document in split_text(text))


def _jionlp_lines(wheel: zipfile.ZipFile, name: str) -> list[str]:
    """Lines of a word list, which lies zipped in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel.read(f"jionlp/dictionary/{name}.zip"))) as inner:
        return inner.read(f"{name}.txt").decode("utf-8", errors="replace").splitlines()
