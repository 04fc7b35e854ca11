"""A corpus whose faults are known: copies, boilerplate, bad pages and evaluation texts planted among clean texts.

`plant` takes clean texts, makes documents of every kind from them, and shuffles; `grade` compares what came out of a
curation with what should have. The texts are the caller's, so tests use what Python ships and the measurement uses real
sources. It says nothing about faults that it does not plant.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from turbos.common.errors import UserError
from turbos.data.curate.spoil import spoilt

Fate = Literal["kept", "gone"]

MENU = "Home | News | Products | About us | Contact us | Sign in or register for a free account"
COOKIES = (
    "This site uses cookies to improve your experience and to measure how it is used. "
    "By going on you agree to our use of cookies, as our privacy policy explains in detail."
)
FOOTER = (
    "Archive\nPrivacy policy\nTerms of use\nSitemap\nSubscribe to our weekly letter\nAll rights reserved worldwide."
)
BOILERPLATE = (MENU, COOKIES, FOOTER)
QUESTION_WORDS, SHARED_WORDS = 32, 9
WORD = re.compile(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+")
BAD_WAYS = ("sales", "menu", "contents", "again", "blob", "numbers", "misread", "encoding")


@dataclass(frozen=True)
class Planted:
    """A document: its kind, whether it should be gone after curation, and (if kept) words that must and must not stay.

    `origin` is the text that it was made from; a copy's fate needs its original to be there.
    """

    kind: str
    fate: Fate
    text: str
    origin: str
    foreign: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlantedCorpus:
    """Documents in order, and the evaluation texts that some of them hold."""

    documents: tuple[Planted, ...]
    evaluation: tuple[str, ...]


@dataclass(frozen=True)
class Amounts:
    """How many documents of each kind."""

    clean: int = 260
    exact: int = 60
    near: int = 60
    shifted: int = 60
    halves: int = 40
    boilerplate: int = 50
    page: int = 40
    bad: int = 64
    contaminated: int = 40
    alike: int = 20

    @property
    def texts_needed(self) -> int:
        """Different clean texts that `plant` uses up."""
        return self.clean + self.boilerplate + self.page + 2 * self.contaminated + self.alike


def plant(texts: Sequence[str], seed: int, amounts: Amounts = Amounts()) -> PlantedCorpus:
    """Make a corpus of all kinds from clean, different texts of some hundred words.

    Originals come before their copies, as the first one is kept. Raises UserError where there are too few texts.
    """
    if len(texts) < amounts.texts_needed:
        raise UserError(f"planting needs {amounts.texts_needed} clean texts, got {len(texts)}")
    generator = random.Random(seed)
    pool = iter(generator.sample(list(texts), len(texts)))
    take = lambda count: [next(pool) for _ in range(count)]  # noqa: E731
    clean = take(amounts.clean)
    originals = [Planted("clean", "kept", text, text) for text in clean]
    questions = [_question(text) for text in take(amounts.contaminated)]
    others = [
        Planted("boilerplate", "kept", *_with_boilerplate(text, generator), BOILERPLATE)
        for text in take(amounts.boilerplate)
    ]
    others += [Planted("page", "kept", _page(text), text, ("Copyright", "trackVisit")) for text in take(amounts.page)]
    others += [Planted("alike", "kept", _inserted(text, _stretch(question, 0, SHARED_WORDS), generator), text)
               for text, question in zip(take(amounts.alike), questions, strict=False)]  # fmt: skip
    others += [Planted("contaminated", "gone", _inserted(text, question, generator), text)
               for text, question in zip(take(amounts.contaminated), questions, strict=True)]  # fmt: skip
    others += [Planted("bad", "gone", spoilt(text, BAD_WAYS[number % len(BAD_WAYS)], generator), text)
               for number, text in enumerate(clean[: amounts.bad])]  # fmt: skip
    copies = _copies(clean, generator, amounts)
    front = originals + others
    generator.shuffle(front)
    generator.shuffle(copies)
    return PlantedCorpus((*front, *copies), tuple(questions))


def _copies(clean: Sequence[str], generator: random.Random, amounts: Amounts) -> list[Planted]:
    kinds: list[tuple[str, int, Callable[[str], str]]] = [
        ("exact", amounts.exact, lambda text: text),
        ("near", amounts.near, lambda text: reworded(text, generator)),
        ("shifted", amounts.shifted, lambda text: _shifted(text, generator)),
        ("halves", amounts.halves, lambda text: _halves(text, generator.choice(clean))),
    ]
    return [
        Planted(kind, "gone", make(text), text)
        for kind, count, make in kinds
        for text in generator.sample(clean, count)
    ]


def reworded(text: str, generator: random.Random) -> str:
    """One word in about 80 (at least one) changed; a Chinese character is a word."""
    spans = [found.span() for found in WORD.finditer(text)]
    for start, end in sorted(generator.sample(spans, max(1, len(spans) // 80)), reverse=True):
        text = text[:start] + generator.choice(("indeed", "perhaps", "另", "XVII", "today", "often")) + text[end:]
    return text


def _shifted(text: str, generator: random.Random) -> str:
    """The text without its first words and with others behind it, so that no place agrees; blanks differ too."""
    cut = generator.randint(3, max(4, len(text) // 20))
    return "\n" + text[cut:].replace("\n\n", "\n \n") + f"\n{generator.randint(1900, 2030)}\n"


def _halves(text: str, other: str) -> str:
    """The second half of one text and the first half of another: neither is near enough for MinHash."""
    middle, other_middle = text.find("\n", len(text) // 2), other.find("\n", len(other) // 2)
    return text[middle + 1 :] + "\n" + other[:other_middle]


def _with_boilerplate(text: str, generator: random.Random) -> tuple[str, str]:
    """A text between a site's menu and its footer, with the site's notice before, between or behind."""
    parts = [MENU, text, FOOTER]
    parts.insert(generator.randint(1, 2), COOKIES)
    return "\n\n".join(parts), text


def _page(text: str) -> str:
    """A text as an HTML page with scripts, a menu and a footer."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    paragraphs = "".join(f"<p>{part}</p>\n" for part in escaped.split("\n\n"))
    menu = "".join(f"<li><a href='/{name}'>{name}</a></li>" for name in ("home", "news", "about", "contact"))
    return (
        f"<!DOCTYPE html><html><head><title>A page</title><script>trackVisit('page');</script></head><body>"
        f"<nav><ul>{menu}</ul></nav><div id='main'><article>{paragraphs}</article></div>"
        f"<footer><a href='/legal'>Legal</a> Copyright of the site</footer></body></html>"
    )


def _question(text: str) -> str:
    """A stretch of a text, as an examination question: some words from its middle."""
    middle = len(WORD.findall(text)) // 2
    return _stretch(text, max(0, middle - QUESTION_WORDS // 2), QUESTION_WORDS)


def _stretch(text: str, first: int, words: int) -> str:
    """So many words of a text on one line, with what stands between them."""
    spans = [found.span() for found in WORD.finditer(text)][first : first + words]
    return " ".join(text[spans[0][0] : spans[-1][1]].split())


def _inserted(text: str, passage: str, generator: random.Random) -> str:
    """A text with a passage as a line of its own somewhere in it."""
    lines = text.split("\n")
    lines.insert(generator.randrange(len(lines) + 1), passage)
    return "\n".join(lines)


@dataclass(frozen=True)
class Grade:
    """How curation did on one kind: documents, how many went, and how much of what must stay or go did so."""

    kind: str
    fate: Fate
    documents: int
    gone: int
    text_kept: float = 1.0
    foreign_cut: float = 1.0

    @property
    def right(self) -> float:
        """Share of documents with the right fate."""
        went = self.gone / self.documents
        return went if self.fate == "gone" else 1.0 - went


@dataclass(frozen=True)
class Outcome:
    """All grades; precision and recall of dropping documents."""

    grades: tuple[Grade, ...]

    @property
    def recall(self) -> float:
        """Of the documents that should go, the share that went."""
        bad = [grade for grade in self.grades if grade.fate == "gone"]
        return sum(grade.gone for grade in bad) / sum(grade.documents for grade in bad)

    @property
    def precision(self) -> float:
        """Of the documents that went, the share that should."""
        return sum(grade.gone for grade in self.grades if grade.fate == "gone") / sum(
            grade.gone for grade in self.grades
        )

    @property
    def clean_kept(self) -> float:
        """Of the documents that should stay, the share that stayed."""
        good = [grade for grade in self.grades if grade.fate == "kept"]
        return 1.0 - sum(grade.gone for grade in good) / sum(grade.documents for grade in good)


def grade(corpus: PlantedCorpus, came_out: Mapping[int, str]) -> Outcome:
    """Grade a curation: `came_out` has the texts that were kept, by their number in the corpus.

    A document of halves also counts as gone where block pruning left less than a fifth of it.
    """
    grades = []
    for kind in dict.fromkeys(document.kind for document in corpus.documents):
        numbers = [number for number, document in enumerate(corpus.documents) if document.kind == kind]
        graded = Grade(
            kind, corpus.documents[numbers[0]].fate, len(numbers), sum(number not in came_out for number in numbers)
        )
        kept = [(corpus.documents[number], came_out[number]) for number in numbers if number in came_out]
        if graded.fate == "kept" and kept:
            stays = sum(_share_kept(document.origin, text) for document, text in kept) / len(kept)
            cuts = [words not in text for document, text in kept for words in document.foreign]
            graded = replace(graded, text_kept=stays, foreign_cut=sum(cuts) / len(cuts) if cuts else 1.0)
        grades.append(graded)
    return Outcome(tuple(grades))


def _share_kept(origin: str, text: str) -> float:
    """Share of a text's lines that are in another, by characters; blanks at the ends of lines do not count."""
    lines = [line.strip() for line in origin.splitlines() if line.strip()]
    flat = " ".join(text.split())
    return sum(len(line) for line in lines if " ".join(line.split()) in flat) / max(1, sum(map(len, lines)))
