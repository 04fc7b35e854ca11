"""Curation of a corpus whose faults are known: what was planted goes, what is clean stays."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from turbos.bench.planted import Amounts, Outcome, PlantedCorpus, grade, plant
from turbos.data.curate.classifier import train_classifier
from turbos.data.curate.contamination import EvaluationTexts
from turbos.data.curate.examples import quality_examples
from turbos.data.curate.labels import Labels
from turbos.data.curate.pipeline import Aids, Counts, CurationConfig, curate
from turbos.data.sources import documents

PIECE = 700
SIGNS = [chr(code) for code in range(0x4E00, 0x5600)]


def chinese_text(generator: random.Random) -> str:
    """Twelve sentences of about 30 characters drawn from a few hundred: no meaning, but Chinese in its shape."""
    rare, common = generator.sample(SIGNS, 400), "的一是了我不在人有他这中大来上个国到说们"
    lines = []
    for _ in range(12):
        signs = [
            generator.choice(common if generator.random() < 0.4 else rare) for _ in range(generator.randint(24, 40))
        ]
        signs.insert(len(signs) // 2, "，")
        lines.append("".join(signs) + "。")
    return "\n".join(lines)


def english_paragraphs() -> Iterator[str]:
    """Python's language reference and the docstrings of its library."""
    for topic in sorted(topics):
        yield from re.split(r"\n\s*\n", topics[topic])
    for text in documents("python"):
        for docstring in re.findall(r'"""(.*?)"""', text, re.DOTALL):
            yield from re.split(r"\n\s*\n", docstring)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running text, by its letters and its end."""
    letters = sum(letter.isalpha() or letter.isspace() for letter in paragraph)
    return len(paragraph) >= 120 and letters > 0.92 * len(paragraph) and paragraph.rstrip().endswith((".", ":"))


def english_texts(count: int) -> list[str]:
    """Texts of about 700 characters of them, which share no five words in a row."""
    found: list[str] = []
    seen: set[tuple[str, ...]] = set()
    piece = ""
    for paragraph in english_paragraphs():
        words = re.findall(r"\w+", paragraph.lower())
        runs = {tuple(words[place : place + 5]) for place in range(len(words) - 4)}
        # The reference prints some paragraphs under several topics; an original must be original.
        if not is_prose(paragraph) or runs & seen or len(runs) < 0.95 * (len(words) - 4):
            continue
        seen |= runs
        piece += paragraph + "\n\n"
        if len(piece) >= PIECE:
            found.append(piece.strip())
            piece = ""
        if len(found) == count:
            break
    return found


def code_texts(count: int) -> list[str]:
    """Beginnings of modules of Python's library."""
    return [text[:1500] for text in islice(documents("python"), 0, 3 * count, 3)]


def labels_of(texts: dict[str, list[str]]) -> Labels:
    """The three classifiers, taught with these texts."""
    names = sorted(texts)
    raw = [(text.encode(), names.index(name)) for name in names for text in texts[name]]
    examples = quality_examples([text for name in names for text in texts[name]], seed=0)
    classes = ("good", "bad")
    return Labels(
        train_classifier("bytes", names, [text for text, _ in raw], [label for _, label in raw]),
        train_classifier("words", names, [text for text, _ in raw], [label for _, label in raw]),
        train_classifier(
            "bytes", classes, [one.text.encode(errors="replace") for one in examples],
            [classes.index(one.label) for one in examples],
        ),
        {},
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """English and Chinese texts, of which the first hundred teach and the others are planted."""
    generator = random.Random(0)
    return random.Random(1).sample(
        found := english_texts(440) + [chinese_text(generator) for _ in range(140)], len(found)
    )


@pytest.fixture(scope="module")
def labels(texts: list[str]) -> Labels:
    """Classifiers taught with texts that are not planted."""
    known = texts[:100]
    english = [text for text in known if "。" not in text]
    return labels_of({"en": english, "zh": [text for text in known if "。" in text], "code": code_texts(60)})


def curated(
    corpus: PlantedCorpus, folder: Path, config: CurationConfig, labels: Labels | None
) -> tuple[dict[int, str], Counts]:
    """Texts that came out, by number, and the counts."""
    source = folder / "planted.jsonl"
    rows = [json.dumps({"text": document.text}) for document in corpus.documents]
    source.write_text("\n".join(rows), encoding="utf-8")
    counts = curate([str(source)], folder / "out", config, Aids(labels, EvaluationTexts(corpus.evaluation)))
    out = [
        json.loads(line) for part in sorted((folder / "out").glob("*.jsonl")) for line in part.open(encoding="utf-8")
    ]
    return {row["number"]: row["text"] for row in out}, counts


def shown(outcome: Outcome) -> str:
    """The grades as lines."""
    lines = [
        f"{one.kind:<14} {one.documents:4} documents, should be {one.fate}: {one.right:6.1%} right, "
        f"text kept {one.text_kept:6.1%}, foreign cut {one.foreign_cut:6.1%}"
        for one in outcome.grades
    ]
    return "\n".join(
        [*lines, f"precision {outcome.precision:.3f} recall {outcome.recall:.3f} kept {outcome.clean_kept:.3f}"]
    )


def test_planted_faults_go_and_clean_text_stays(texts: list[str], labels: Labels, tmp_path: Path) -> None:
    corpus = plant(texts[100:], seed=0, amounts=Amounts(clean=220))
    assert len(corpus.documents) >= 500
    came_out, counts = curated(corpus, tmp_path, CurationConfig(), labels)
    outcome = grade(corpus, came_out)
    print("\n" + shown(outcome))
    right = {one.kind: one.right for one in outcome.grades}
    assert outcome.precision >= 0.98 and outcome.recall >= 0.95 and outcome.clean_kept >= 0.98
    assert right["exact"] == right["contaminated"] == 1.0
    assert right["near"] >= 0.95 and right["shifted"] >= 0.95 and right["halves"] >= 0.95
    by_kind = {one.kind: one for one in outcome.grades}
    assert by_kind["boilerplate"].foreign_cut >= 0.95 and by_kind["boilerplate"].text_kept >= 0.99
    assert by_kind["page"].foreign_cut == 1.0 and by_kind["page"].text_kept >= 0.95
    assert counts.total.documents_in == len(corpus.documents)


@pytest.mark.parametrize("stage", ["exact", "near", "blocks", "contamination", "extraction", "quality"])
def test_each_stage_is_needed(texts: list[str], labels: Labels, tmp_path: Path, stage: str) -> None:
    """Without a stage, what it is there for comes through: so the figures above are its doing."""
    corpus = plant(texts[100:], seed=1, amounts=Amounts(clean=160, bad=48))
    skip = {"exact": ("exact", "near", "blocks"), "near": ("near", "blocks"), "quality": ("quality", "rules")}.get(
        stage, (stage,)
    )
    came_out, _ = curated(corpus, tmp_path, CurationConfig(skip=skip), labels)
    by_kind = {one.kind: one for one in grade(corpus, came_out).grades}
    if stage == "extraction":
        assert by_kind["page"].foreign_cut < 0.5
        return
    kind = {"blocks": "halves", "contamination": "contaminated", "quality": "bad"}.get(stage, stage)
    assert by_kind[kind].right < 0.7, by_kind[kind]
