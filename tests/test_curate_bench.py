"""The measurements of curation run on small texts and give well-formed rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from turbos.bench import curation, minhash, planted
from turbos.bench.planted import Amounts, Planted, PlantedCorpus, grade, plant
from turbos.common.errors import UserError


def tale(generator: random.Random) -> str:
    """Four paragraphs of different words."""
    words = [f"{a}{b}{c}" for a in "bdkm" for b in ("ar", "el", "in", "ot") for c in ("", "a", "o", "is")]
    lines = [" ".join(generator.choices(words, k=12)) + "." for _ in range(12)]
    return "\n\n".join("\n".join(lines[start : start + 3]) for start in range(0, 12, 3))


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A file of 400 tales."""
    generator = random.Random(0)
    path = tmp_path / "tales.jsonl"
    rows = [json.dumps({"text": "\n\n".join(tale(generator) for _ in range(3))}) for _ in range(400)]
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def test_libraries_agree_on_near_copies(source: str) -> None:
    pytest.importorskip("datasketch")
    rows = minhash.contest_rows(minhash.make_contest([source], seed=0), rounds=1)
    assert [row[0] for row in rows] == ["datasketch", "rensa, strings", "rensa, shared hashes"]
    for row in rows:
        cells = dict(zip(minhash.COLUMNS, row, strict=True))
        assert float(cells["recall %"]) >= 95 and float(cells["precision %"]) >= 95
        assert float(cells["mean error of similarity"]) < 0.06


def test_clean_pieces_are_unlike_and_prose(source: str) -> None:
    pieces = curation.clean_pieces([source], seed=0)
    assert len(pieces) == curation.PIECES_OF_SOURCE and len(set(pieces)) == len(pieces)
    assert min(map(len, pieces)) > 400
    assert curation.is_prose("Words, and more words here.") and not curation.is_prose("1\t2\t3\t4 |")


def test_planting_wants_enough_texts() -> None:
    with pytest.raises(UserError, match="planting needs 450 clean texts, got 1"):
        plant(["one"], seed=0)


def test_planted_documents_are_what_they_say() -> None:
    generator = random.Random(0)
    texts = [tale(generator) for _ in range(60)]
    few = Amounts(clean=20, exact=4, near=4, shifted=4, halves=4, boilerplate=4, page=4, bad=8, contaminated=4, alike=4)
    corpus = plant(texts, seed=0, amounts=few)
    assert corpus == plant(texts, seed=0, amounts=few) != plant(texts, seed=1, amounts=few)
    by_kind: dict[str, list[Planted]] = {}
    for document in corpus.documents:
        by_kind.setdefault(document.kind, []).append(document)
    assert {kind: len(found) for kind, found in by_kind.items()} == {
        name: getattr(few, name) for name in Amounts.__dataclass_fields__
    }
    assert all(one.text == one.origin for one in (*by_kind["exact"], *by_kind["clean"]))
    assert all(one.text != one.origin for one in (*by_kind["near"], *by_kind["shifted"], *by_kind["bad"]))
    assert all(any(question in one.text for question in corpus.evaluation) for one in by_kind["contaminated"])
    assert not any(question in one.text for question in corpus.evaluation for one in by_kind["alike"])
    assert all(part in one.text for one in by_kind["boilerplate"] for part in planted.BOILERPLATE)


def test_grades_count_what_went() -> None:
    documents = [Planted("clean", "kept", "a\nbb", "a\nbb")] * 4 + [Planted("exact", "gone", "a", "a")] * 4
    outcome = grade(PlantedCorpus(tuple(documents), ()), {0: "a\nbb", 1: "a", 2: "bb  ", 7: "a"})
    assert (outcome.precision, outcome.recall, outcome.clean_kept) == (0.75, 0.75, 0.75)
    clean, exact = outcome.grades
    assert (clean.right, exact.right) == (0.75, 0.75)
    assert clean.text_kept == pytest.approx((1 + 1 / 3 + 2 / 3) / 3)
    assert curation.planted_rows(outcome)[-1][0] == "precision 75.0 %, recall 75.0 %"
