"""MinHash libraries side by side: `datasketch`, `rensa` on strings, `rensa` on the hashes that curation shares.

The same documents, shingles of five words, 112 functions in 14 bands of 8 for all; CPU seconds of one core, from words
to verdicts. Near copies are planted, so recall and precision are known, and every signature's estimate is held against
the exact similarity. Curation takes what wins here.

    python -m turbos.bench.minhash                   # writes docs/results/minhash.json
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from turbos.bench.collect import provenance
from turbos.bench.planted import WORD, reworded
from turbos.bench.tables import Result, write_result
from turbos.common.errors import UserError
from turbos.data.curate.copies import BANDS, ROWS, SHINGLE_WORDS, NearCopies, signatures
from turbos.data.curate.words import scan_texts
from turbos.data.sources import documents

SOURCES = ("english", "chinese", "python")
DOCUMENTS = 600
COPIES = 150
COLUMNS = ("library", "CPU seconds", "MB/s a core", "recall %", "precision %", "mean error of similarity")
FUNCTIONS = BANDS * ROWS


@dataclass(frozen=True)
class Contest:
    """Texts of which the last are near copies; `origin` has the number of each copy's original."""

    texts: tuple[str, ...]
    origin: dict[int, int]


@dataclass(frozen=True)
class Entry:
    """What a library did: CPU seconds, which texts it called copies, and estimates for the planted pairs."""

    name: str
    seconds: float
    dropped: frozenset[int]
    estimates: tuple[float, ...]


def make_contest(names: Sequence[str], seed: int) -> Contest:
    """Texts of the sources, different from one another, and reworded ones behind them."""
    generator = random.Random(seed)
    texts = [text for name in names for text in dict.fromkeys(islice(documents(name), DOCUMENTS)) if len(text) > 500]
    originals = generator.sample(range(len(texts)), COPIES)
    copies = [reworded(texts[number], generator) for number in originals]
    return Contest((*texts, *copies), {len(texts) + place: number for place, number in enumerate(originals)})


def shingle_words(text: str) -> list[str]:
    """Runs of five words, words as curation counts them; one of all words where there are fewer."""
    words = WORD.findall(text.lower())
    return [" ".join(words[place : place + SHINGLE_WORDS]) for place in range(max(1, len(words) - SHINGLE_WORDS + 1))]


def similarity(left: str, right: str) -> float:
    """Exact Jaccard similarity of two texts' shingles."""
    one, other = set(shingle_words(left)), set(shingle_words(right))
    return len(one & other) / len(one | other)


def with_datasketch(contest: Contest) -> Entry:
    """datasketch: a MinHash an object, its own index."""
    from datasketch import MinHash, MinHashLSH

    started = time.process_time()
    index = MinHashLSH(num_perm=FUNCTIONS, params=(BANDS, ROWS))
    made, dropped = [], set()
    for number, text in enumerate(contest.texts):
        signature = MinHash(num_perm=FUNCTIONS, seed=1)
        signature.update_batch([shingle.encode() for shingle in shingle_words(text)])
        made.append(signature)
        if index.query(signature):
            dropped.add(number)
        else:
            index.insert(number, signature)
    seconds = time.process_time() - started
    estimates = tuple(made[copy].jaccard(made[number]) for copy, number in contest.origin.items())
    return Entry("datasketch", seconds, frozenset(dropped), estimates)


def with_rensa_strings(contest: Contest) -> Entry:
    """rensa: a MinHash an object from strings, its own index."""
    import rensa

    started = time.process_time()
    index = rensa.RMinHashLSH(threshold=0.75, num_perm=FUNCTIONS, num_bands=BANDS)
    made, dropped = [], set()
    for number, text in enumerate(contest.texts):
        signature = rensa.RMinHash(num_perm=FUNCTIONS, seed=1)
        signature.update(shingle_words(text))
        made.append(signature)
        if index.query(signature):
            dropped.add(number)
        else:
            index.insert(number, signature)
    seconds = time.process_time() - started
    estimates = tuple(made[copy].jaccard(made[number]) for copy, number in contest.origin.items())
    return Entry("rensa, strings", seconds, frozenset(dropped), estimates)


def with_curation(contest: Contest) -> Entry:
    """What curation does: words hashed once, rensa's signatures of their hashes, an index that compares signatures."""
    started = time.process_time()
    scan = scan_texts([text.encode() for text in contest.texts])
    found = NearCopies().first_seen(scan, np.ones(len(scan), np.bool_))
    seconds = time.process_time() - started
    made = signatures(scan)
    estimates = tuple(float((made[copy] == made[number]).mean()) for copy, number in contest.origin.items())
    return Entry("rensa, shared hashes", seconds, frozenset(np.flatnonzero(found >= 0).tolist()), estimates)


CONTESTANTS: tuple[Callable[[Contest], Entry], ...] = (with_datasketch, with_rensa_strings, with_curation)


def true_copies(contest: Contest, least: float, entries: Sequence[Entry]) -> frozenset[int]:
    """Texts with an earlier one at least so similar: the planted ones and what contestants named, checked exactly."""
    named = frozenset().union(*(entry.dropped for entry in entries))
    shingles = [frozenset(shingle_words(text)) for text in contest.texts]
    found = {
        copy
        for copy, number in contest.origin.items()
        if similarity(contest.texts[copy], contest.texts[number]) >= least
    }
    for number in named - found:
        earlier = (shingles[other] for other in range(number))
        if any(len(shingles[number] & other) >= least * len(shingles[number] | other) for other in earlier):
            found.add(number)
    return frozenset(found)


def contest_rows(contest: Contest, rounds: int = 3) -> list[tuple[str, float, float, float, float, float]]:
    """A row for each contestant: fastest of some interleaved rounds, verdicts against copies of similarity 0.7."""
    # The first call of a kernel compiles it, which is no part of its speed.
    with_curation(Contest(contest.texts[:20], {}))
    entries = [[enter(contest) for enter in CONTESTANTS] for _ in range(rounds)]
    truth = true_copies(contest, 0.7, entries[0])
    pairs = [similarity(contest.texts[copy], contest.texts[number]) for copy, number in contest.origin.items()]
    size = sum(len(text.encode()) for text in contest.texts) / 1e6
    rows = []
    for entry in entries[0]:
        seconds = min(one.seconds for turn in entries for one in turn if one.name == entry.name)
        recall = 100 * len(truth & entry.dropped) / len(truth)
        precision = 100 * len(truth & entry.dropped) / max(1, len(entry.dropped))
        error = float(np.abs(np.array(entry.estimates) - np.array(pairs)).mean())
        rows.append(
            (
                entry.name,
                round(seconds, 3),
                round(size / seconds, 2),
                round(recall, 1),
                round(precision, 1),
                round(error, 4),
            )
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the result below the current directory."""
    parser = argparse.ArgumentParser(
        prog="python -m turbos.bench.minhash", description="MinHash libraries side by side."
    )
    parser.add_argument("sources", nargs="*", default=SOURCES, metavar="SOURCE", help=f"default: {' '.join(SOURCES)}")
    args = parser.parse_args(argv)
    try:
        rows = contest_rows(make_contest(args.sources, seed=0))
    except UserError as error:
        print(f"minhash: error: {error}", file=sys.stderr)
        return 2
    for row in rows:
        print(*(f"{name} {cell}" for name, cell in zip(COLUMNS, row, strict=True)), sep="; ")
    command = "python -m turbos.bench.minhash " + " ".join(args.sources)
    print(
        write_result(
            Result(**provenance("minhash", command.strip(), (0,)), columns=COLUMNS, rows=tuple(rows)), Path.cwd()
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
