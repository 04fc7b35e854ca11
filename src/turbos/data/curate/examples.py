"""What the label classifiers learn from: the named sources themselves, by language and by topic, and spoilt texts.

A topic is what a source is about, so a topic label says "reads like the sources of that topic", no more. Languages are
those of `TONGUES`, whose short conversations come in the package of the source `chat`; English, Chinese and code have
larger sources. Sources whose client is missing are left out and named. Every fifth example is kept back to measure.
"""

from __future__ import annotations

import random
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import yaml

from turbos.common.errors import UserError
from turbos.data.curate.classifier import Classifier, Features, train_classifier
from turbos.data.curate.labels import GOOD, Labels
from turbos.data.curate.spoil import WAYS, spoilt
from turbos.data.curate.words import scan_texts
from turbos.data.sources import documents, fetch

TOPICS: dict[str, tuple[str, ...]] = {
    "literature": ("english", "austen"),
    "religion": ("bible",),
    "essays and news": ("brown",),
    "sayings": ("fortunes", "fortunes-zh"),
    "dictionary": ("chinese", "foldoc"),
    "computing": ("man-pages", "man-pages-zh", "git-docs"),
    "code": ("python",),
    "mathematics": ("problems",),
    "conversation": ("chat",),
}
"""Topics, and the sources that are about them."""

TONGUES = {
    "persian": "fa", "ukrainian": "uk", "japanese": "ja", "italian": "it", "korean": "ko", "spanish": "es",
    "chinese": "zh", "traditionalchinese": "zh", "dutch": "nl", "portuguese": "pt", "bengali": "bn",
    "indonesian": "id", "turkish": "tr", "german": "de", "tamil": "ta", "marathi": "mr", "french": "fr",
    "russian": "ru", "hindi": "hi", "swedish": "sv", "hebrew": "he", "english": "en",
}  # fmt: skip
"""Folders of the conversations' package, and the language's code."""

LANGUAGE_SOURCES = {
    "en": ("english", "brown", "man-pages", "fortunes"),
    "zh": ("chinese", "man-pages-zh", "fortunes-zh"),
    "code": ("python", "packages"),
}
CURATED = ("english", "austen", "brown", "bible", "foldoc", "man-pages", "chinese", "man-pages-zh", "python", "chat")
"""What good text looks like: the quality classifier's other half is the same texts, spoilt."""

EXAMPLES_OF_SOURCE = 800
EXAMPLE_CHARACTERS = (80, 1500)
HELD_BACK = 5
Note = Callable[[str], None]


@dataclass(frozen=True)
class Example:
    """A text and the name of its class."""

    text: str
    label: str


class _Sources:
    """Examples of named sources, read once; a source that cannot be fetched is named and gives none."""

    def __init__(self, cache_dir: str | Path | None, note: Note, seed: int) -> None:
        self.cache_dir, self.note, self.seed = cache_dir, note, seed
        self.read: dict[str, list[str]] = {}

    def examples(self, name: str) -> list[str]:
        """Pieces of 80 to 1500 characters from up to 800 documents of a source, taken evenly."""
        if name not in self.read:
            try:
                texts = list(islice(documents(name, self.cache_dir), 20_000))
            except UserError as error:
                self.note(f"labels learn without {name}: {error}")
                texts = []
            generator = random.Random(f"{name} {self.seed}")
            stride = max(1, len(texts) // EXAMPLES_OF_SOURCE)
            self.read[name] = [_piece(text, generator) for text in texts[::stride]]
        return self.read[name]


def _piece(text: str, generator: random.Random) -> str:
    """A piece of a text, of a length drawn evenly on a logarithmic scale."""
    low, high = EXAMPLE_CHARACTERS
    size = int(low * (high / low) ** generator.random())
    start = generator.randrange(max(1, len(text) - size))
    return text[start : start + size]


def conversations(archive: Path) -> Iterator[Example]:
    """Short conversations of every language of `TONGUES` in the package's file."""
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            path = Path(name)
            if path.suffix == ".yml" and path.parent.name in TONGUES:
                for turns in (yaml.load(wheel.read(name), yaml.CSafeLoader) or {}).get("conversations") or ():
                    text = "\n".join(str(turn) for turn in turns if turn)
                    if len(text) >= 20:
                        yield Example(text[: EXAMPLE_CHARACTERS[1]], TONGUES[path.parent.name])


def _language_examples(sources: _Sources) -> list[Example]:
    found = [
        Example(text, code)
        for code, names in LANGUAGE_SOURCES.items()
        for name in names
        for text in sources.examples(name)
    ]
    try:
        found += conversations(fetch(["chat"], sources.cache_dir)[0])
    except UserError as error:
        sources.note(f"labels know only {', '.join(LANGUAGE_SOURCES)}: {error}")
    return found


def _topic_examples(sources: _Sources) -> list[Example]:
    return [
        Example(text, topic) for topic, names in TOPICS.items() for name in names for text in sources.examples(name)
    ]


def quality_examples(texts: Iterable[str], seed: int) -> list[Example]:
    """Good texts, and each of them spoilt in one way after another."""
    generator = random.Random(seed)
    found = []
    for number, text in enumerate(texts):
        found += [Example(text, GOOD), Example(spoilt(text, WAYS[number % len(WAYS)], generator), "bad")]
    return found


def _trained(kind: Features, examples: Sequence[Example], seed: int) -> tuple[Classifier, str]:
    """A classifier, and what it reaches on every fifth example, which it did not learn from."""
    examples = random.Random(seed).sample(list(examples), len(examples))
    names = sorted({example.label for example in examples})
    kept_back, learnt = examples[::HELD_BACK], [one for place, one in enumerate(examples) if place % HELD_BACK]
    texts = [example.text.encode(errors="replace") for example in learnt]
    classifier = train_classifier(kind, names, texts, [names.index(example.label) for example in learnt], seed)
    scores = classifier.scores(scan_texts([example.text.encode(errors="replace") for example in kept_back]))
    right = np.mean([names[place] == one.label for place, one in zip(scores.argmax(1), kept_back, strict=True)])
    return classifier, f"{len(names)} classes, {len(learnt)} examples, {right:.1%} right on {len(kept_back)} others"


def train_labels(
    cache_dir: str | Path | None = None, curated: Sequence[str] = (), note: Note = lambda line: None, seed: int = 0
) -> Labels:
    """Train the three classifiers from the named sources, fetching what is not there; takes under a minute.

    `curated` names sources (or paths) of good text instead of the built-in choice. Raises UserError where there is
    nothing to learn from.
    """
    sources = _Sources(cache_dir, note, seed)
    good = [text for name in (curated or CURATED) for text in sources.examples(name)]
    if not good:
        raise UserError("no source of good text could be read: name one with --curated, or go without: --labels none")
    language, about_language = _trained("bytes", _language_examples(sources), seed)
    topic, about_topic = _trained("words", _topic_examples(sources), seed)
    quality, about_quality = _trained("bytes", quality_examples(good, seed), seed)
    used = ", ".join(name for name, texts in sources.read.items() if texts)
    card = {"language": about_language, "topic": about_topic, "quality": about_quality, "sources": used}
    return Labels(language, topic, quality, card)
