"""Curation measured on real texts: the speed of every stage, and how it does on faults that are planted among them.

Speed is in CPU seconds of one core, on texts that are in memory (reading a package's archive is its source's matter),
with the first batches left out, in which kernels are loaded. The planted corpus is `bench.planted`'s, its clean texts
are pieces of the sources; what a source holds twice is left out of it beforehand, word for word.

    python -m turbos.bench.curation                  # writes docs/results/curation.json and curation-planted.json
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from turbos.bench.collect import provenance
from turbos.bench.planted import Outcome, grade, plant
from turbos.bench.tables import Cell, Result, write_result
from turbos.common.errors import UserError
from turbos.data.curate.batch import Batch, Document
from turbos.data.curate.contamination import EvaluationTexts, held_out_questions
from turbos.data.curate.examples import train_labels
from turbos.data.curate.labels import Labels, read_labels, write_labels
from turbos.data.curate.pipeline import Aids, Curation, CurationConfig, batches, read_documents
from turbos.data.sources import documents

SOURCES = ("english-prose", "english-manuals", "chinese-modern", "code", "chat")
MEGABYTES = 6.0
PIECE_CHARACTERS = 700
PIECES_OF_SOURCE = 250
PLANTED_SOURCES = ("english", "austen", "brown", "git-docs", "libreoffice-help", "chinese", "man-pages-zh")
STAGE_COLUMNS = ("stage", "documents in", "dropped", "edited", "MB in", "MB/s a core")
PLANTED_COLUMNS = ("planted", "documents", "should be", "right %", "clean text kept %", "foreign text cut %")


def curate_in_memory(texts: Sequence[Document], aids: Aids, config: CurationConfig) -> tuple[Curation, dict[int, str]]:
    """Send documents through all stages; returns the curation with its counts, and what came out by number."""
    curation = Curation(config, aids)
    came_out: dict[int, str] = {}
    for group in batches(texts):
        batch = Batch(group)
        curation.process(batch)
        came_out |= {group[place].number: batch.texts[place].decode() for place in batch.living()}
    return curation, came_out


def stage_rows(names: Sequence[str], megabytes: float, labels: Labels) -> list[tuple[Cell, ...]]:
    """A row for each stage and one for all, over the first megabytes of each source."""
    texts = list(read_documents(names, megabytes=megabytes))
    aids = Aids(labels, EvaluationTexts(held_out_questions()))
    # Loads every kernel; the measured run starts with empty memories of its own.
    curate_in_memory(texts[:400], aids, CurationConfig())
    counts = curate_in_memory(texts, aids, CurationConfig())[0].counts
    rows: list[tuple[Cell, ...]] = []
    for stage in counts.stages:
        if not stage.skipped:
            speed = round(stage.bytes_in / 1e6 / stage.seconds, 1) if stage.seconds > 0.01 else None
            rows.append(
                (stage.title, stage.documents_in, stage.dropped, stage.edited, round(stage.bytes_in / 1e6, 2), speed)
            )
    total, seconds = counts.total, sum(stage.seconds for stage in counts.stages)
    size = total.bytes_in / 1e6
    all_dropped = total.documents_in - total.documents_out
    rows.append(("all stages", total.documents_in, all_dropped, None, round(size, 2), round(size / seconds, 1)))
    return rows


def clean_pieces(names: Sequence[str], seed: int) -> list[str]:
    """Pieces of about 700 characters of sources, that share no run of eight words (Chinese: of twenty signs)."""
    generator = random.Random(seed)
    found, seen = [], set[tuple[str, ...]]()
    for name in names:
        texts = [text for text in islice(documents(name), 3000) if len(text) > 2 * PIECE_CHARACTERS]
        pieces = []
        for text in generator.sample(texts, len(texts)):
            start = text.find("\n", generator.randrange(len(text) - PIECE_CHARACTERS)) + 1
            end = text.find("\n", start + PIECE_CHARACTERS)
            piece = text[start : end if end > 0 else None].strip()
            words = re.findall(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+", piece.lower())
            size = 20 if "\u4e00" <= max(piece, default="") <= "\u9fff" else 8
            runs = {tuple(words[place : place + size]) for place in range(len(words) - size + 1)}
            if len(words) >= 60 and not runs & seen and len(piece) < 3 * PIECE_CHARACTERS and is_prose(piece):
                seen |= runs
                pieces.append(piece)
            if len(pieces) == PIECES_OF_SOURCE:
                break
        found += pieces
    return found


def is_prose(piece: str) -> bool:
    """Whether letters and blanks make up nine tenths: no tables, signatures or listings, about which one can argue."""
    return sum(letter.isalpha() or letter.isspace() for letter in piece) >= 0.9 * len(piece)


def planted_outcome(names: Sequence[str], labels: Labels, seed: int) -> Outcome:
    """How curation does on faults planted among pieces of sources."""
    corpus = plant(clean_pieces(names, seed), seed)
    texts = [Document(number, "planted", document.text.encode()) for number, document in enumerate(corpus.documents)]
    aids = Aids(labels, EvaluationTexts(corpus.evaluation))
    return grade(corpus, curate_in_memory(texts, aids, CurationConfig())[1])


def planted_rows(outcome: Outcome) -> list[tuple[Cell, ...]]:
    """A row for each kind and one for all."""
    rows: list[tuple[Cell, ...]] = []
    for one in outcome.grades:
        is_kept = one.fate == "kept"
        foreign = round(100 * one.foreign_cut, 1) if one.kind in ("boilerplate", "page") else None
        rows.append(
            (
                one.kind,
                one.documents,
                one.fate,
                round(100 * one.right, 1),
                round(100 * one.text_kept, 1) if is_kept else None,
                foreign,
            )
        )
    documents = sum(one.documents for one in outcome.grades)
    figures = f"precision {100 * outcome.precision:.1f} %, recall {100 * outcome.recall:.1f} %"
    return [*rows, (figures, documents, "", round(100 * outcome.clean_kept, 1), None, None)]


def labels_at(path: Path) -> Labels:
    """The classifiers of a file, trained and written first where it is missing."""
    if not path.is_file():
        write_labels(path, train_labels(note=print))
    return read_labels(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write both results below the current directory."""
    parser = argparse.ArgumentParser(prog="python -m turbos.bench.curation", description="Curation on real texts.")
    parser.add_argument("sources", nargs="*", default=SOURCES, metavar="SOURCE", help=f"default: {' '.join(SOURCES)}")
    parser.add_argument("--megabytes", type=float, default=MEGABYTES, help="first megabytes of each source")
    parser.add_argument(
        "--labels", type=Path, default=Path("curation-labels.npz"), help="classifiers, trained if missing"
    )
    args = parser.parse_args(argv)
    try:
        labels = labels_at(args.labels)
        stages = stage_rows(args.sources, args.megabytes, labels)
        planted = planted_rows(planted_outcome(PLANTED_SOURCES, labels, seed=0))
    except UserError as error:
        print(f"curation: error: {error}", file=sys.stderr)
        return 2
    command = " ".join(["python -m turbos.bench.curation", *args.sources])
    for name, columns, rows, seeds in (
        ("curation", STAGE_COLUMNS, stages, ()),
        ("curation-planted", PLANTED_COLUMNS, planted, (0,)),
    ):
        for row in rows:
            print(*row, sep="  ")
        print(write_result(Result(**provenance(name, command, seeds), columns=columns, rows=tuple(rows)), Path.cwd()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
