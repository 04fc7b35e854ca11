"""What is checked and how a text can be read: whole, packed, in pieces. Shared by all checks; no check is here.

Two ways of reading are compared by their logits; only where these differ are both read again with every sublayer's
tensors, to name the first that diverges (`judge`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.model.families import Family
from turbos.verify.compare import Routers, compare, first_difference
from turbos.verify.implementation import Implementation
from turbos.verify.readings import EMBEDDING, LOGITS, Names, Reading
from turbos.verify.report import Check
from turbos.verify.truth import Truth

ROUNDING = 1e-5
"""fp32 keeps 6e-8; sums of thousands of terms in another order differ by 1e-6 or less of the largest logit, and every
fault that was ever planted here by 1e-4 or more."""
DEEP = 16
"""Sublayers up to which `ROUNDING` holds; beyond, rounding grows like the square root of the depth."""


@dataclass(frozen=True)
class Plan:
    """How much is read: `packed` lengths cross a chunk's border, `truth` lengths are for the slow truth."""

    packed: tuple[int, ...]
    truth: tuple[int, ...]
    segments: tuple[int, ...]
    prompts: tuple[int, ...]
    steps: int
    chunks: tuple[int, ...]
    quick: bool


@dataclass(frozen=True)
class Subject:
    """What is checked: an implementation of a checkpoint, the truth of its weights, and how much to read."""

    directory: Path
    scratch: Path
    implementation: Implementation[Any]
    truth: Truth
    routers: Routers
    plan: Plan
    family: Family

    @property
    def config(self) -> ModelConfig:
        """The model's shape."""
        return self.implementation.config

    @property
    def names(self) -> Names:
        """Words for places."""
        return Names.of(self.config, self.family)

    @property
    def rounding(self) -> float:
        """Tolerance for the same sums in another order, at this depth."""
        return ROUNDING * max(1.0, math.sqrt(len(self.config.layers) / DEEP))

    def texts(self, lengths: Sequence[int], seed: int) -> list[Tensor]:
        """Random documents over the whole vocabulary."""
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(self.config.vocab_size, (length,), generator=generator) for length in lengths]

    def folder(self, name: str) -> Path:
        """An empty directory of its own for a check."""
        path = self.scratch / name
        path.mkdir()
        return path


def plan_of(config: ModelConfig, quick: bool) -> Plan:
    """Lengths for a model: a long document has more than one chunk (quick: if chunks are at most 256)."""
    # No shorter text has something before and after a cut; positions beyond the declared ones are computed alike.
    room = max(config.max_positions, 8)
    chunk = config.chunk_size if config.scans else 32
    long = min(chunk + 9, 265, room) if quick else min(2 * chunk + 13, room)
    rest = max(1, min(chunk, long // 2))
    steps = min(8 if quick else 32, max(1, room // 4))
    short = max(1, min(23, room - steps))
    packed = (long, 1, min(37, room), 5) if quick else (long, 1, 2, min(64, room), min(37, room), 5)
    segments = (1, 2, rest, *([long - 3 - rest] if long > 3 + rest else []))
    sizes = (1, 7, 64) if quick else (1, 5, 16, 64, 128, 256)
    truth = (min(long, 80 if quick else room), 1, min(17, room))
    return Plan(
        packed=packed,
        truth=truth,
        segments=segments if sum(segments) <= room else (room,),
        prompts=(short, 3, 1, max(1, short // 2)),
        steps=steps,
        chunks=tuple(size for size in sizes if size != config.chunk_size),
        quick=quick,
    )


Job = tuple[str, Callable[[], Check | None]]
"""A check ready to run, with its name."""

Way = Callable[[bool], Reading]
"""A way of reading a text; True asks for every sublayer's tensors."""


def judge(subject: Subject, got: Way, want: Way, tolerance: float, why: str) -> Check:
    """Compare two ways of reading whole documents; on failure read again and name the place.

    Before that, rows where rounding alone decides are set aside (`unsteady_rows`).
    """
    ours, theirs = got(False), want(False)
    outcome = compare(ours, theirs, subject.routers, tolerance)
    where = outcome.where
    if not outcome.ok and not where:
        everything = want(True)
        if tolerance:
            unsteady_T = unsteady_rows(subject, everything, tolerance)
            outcome = compare(ours, theirs, subject.routers, tolerance, unsteady_T)
            where = outcome.where
        if not outcome.ok and not where:
            where = first_difference(got(True), everything, outcome.kept_T, tolerance, subject.names)
    return Check(outcome.ok, outcome.error, tolerance, where, why, outcome.note)


def unsteady_rows(subject: Subject, reading: Reading, tolerance: float) -> Tensor:
    """Rows whose logits the model's equations in plain fp32 miss by a quarter of the tolerance or more, `[T]` bool.

    Trained models hold rows that cancel numbers of 10^4 (SmolLM2's second token, now and then); there two right
    implementations differ by more than any tolerance. The equations share no code with what is checked, so that a
    fault never excuses itself.
    """
    documents, x_TD = Documents.from_lengths(reading.lengths), reading.rows(EMBEDDING)
    true_TV, rounded_TV = (
        truth.after_embedding(x_TD.to(truth.dtype), documents)[LOGITS].double()
        for truth in (subject.truth, subject.truth.rounded())
    )
    return (rounded_TV - true_TV).abs().amax(1) > tolerance / 4 * true_TV.abs().max()


def packed(implementation: Implementation[Any], texts: Sequence[Tensor]) -> Way:
    """All documents in one call."""

    def read(everything: bool) -> Reading:
        reading = Reading(len(texts))
        lengths = [len(text) for text in texts]
        reading.add(range(len(texts)), lengths, implementation.read(texts, None, everything))
        return reading

    return read


def separate(implementation: Implementation[Any], texts: Sequence[Tensor]) -> Way:
    """Each document in a call of its own."""

    def read(everything: bool) -> Reading:
        reading = Reading(len(texts))
        for number, text in enumerate(texts):
            reading.add([number], [len(text)], implementation.read([text], None, everything))
        return reading

    return read


def in_pieces(implementation: Implementation[Any], texts: Sequence[Tensor], cuts: Sequence[Sequence[int]]) -> Way:
    """Each document alone with a state, in pieces of these lengths (the rest in pieces of one token)."""

    def read(everything: bool) -> Reading:
        reading = Reading(len(texts))
        for number, (text, cut) in enumerate(zip(texts, cuts, strict=True)):
            state = implementation.start(1, len(text))
            for piece in text.split([*cut, *[1] * (len(text) - sum(cut))]):
                reading.add([number], [len(piece)], implementation.read([piece], state, everything))
        return reading

    return read
