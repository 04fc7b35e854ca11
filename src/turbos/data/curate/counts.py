"""What curation did, in numbers and samples: what each stage took in, let through, dropped and why.

Samples are drawn evenly over all drops of a reason (the few whose number hashes lowest), so they do not depend on where
a run was interrupted. Nothing here decides anything.

>>> counts = StageCounts("exact", "Exact copies")
>>> counts.drop(7, "english", "same text", b"To be, or not to be", "like document 3")
>>> counts.reasons, counts.samples[0].text
({'same text': 1}, 'To be, or not to be')
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SAMPLES_OF_REASON = 3
SAMPLE_BYTES = 600


@dataclass(frozen=True)
class DropSample:
    """A document that a stage dropped or cut: its number in the run, source, the reason, its beginning, more words."""

    number: int
    source: str
    reason: str
    text: str
    detail: str = ""

    @property
    def rank(self) -> bytes:
        """What orders samples: a hash of the number."""
        return hashlib.blake2b(f"{self.reason} {self.number}".encode(), digest_size=8).digest()


@dataclass
class StageCounts:
    """The running counts of one stage; `seconds` are CPU seconds, `edited` documents were changed but kept."""

    name: str
    title: str
    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0
    edited: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    samples: list[DropSample] = field(default_factory=list)
    skipped: str = ""

    def drop(self, number: int, source: str, reason: str, text: bytes, detail: str = "") -> None:
        """Count a document that goes, and perhaps keep its beginning as a sample."""
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.show(number, source, reason, text, detail)

    def show(self, number: int, source: str, reason: str, text: bytes, detail: str = "") -> None:
        """Offer a sample."""
        same = sorted((one for one in self.samples if one.reason == reason), key=lambda one: one.rank)
        offered = DropSample(number, source, reason, "", detail)
        if len(same) == SAMPLES_OF_REASON:
            if offered.rank >= same[-1].rank:
                return
            self.samples.remove(same[-1])
        beginning = text[:SAMPLE_BYTES].decode(errors="ignore")
        self.samples.append(DropSample(number, source, reason, beginning, detail))

    @property
    def dropped(self) -> int:
        """Documents dropped."""
        return self.documents_in - self.documents_out


@dataclass
class SourceCounts:
    """What one source gave and what came through."""

    documents_in: int = 0
    bytes_in: int = 0
    documents_out: int = 0
    bytes_out: int = 0


@dataclass
class Counts:
    """The counts of a whole run, stage by stage, source by source, and the labels of what came out."""

    stages: list[StageCounts]
    sources: dict[str, SourceCounts] = field(default_factory=dict)
    languages: dict[str, int] = field(default_factory=dict)
    topics: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def total(self) -> SourceCounts:
        """All sources together."""
        parts = self.sources.values()
        return SourceCounts(
            sum(one.documents_in for one in parts),
            sum(one.bytes_in for one in parts),
            sum(one.documents_out for one in parts),
            sum(one.bytes_out for one in parts),
        )

    def plain(self) -> dict[str, Any]:
        """The counts as JSON has them."""
        return asdict(self)


def counts_from(plain: Mapping[str, Any]) -> Counts:
    """The counts that `plain` came from."""
    stages = []
    for one in plain["stages"]:
        samples = [DropSample(**sample) for sample in one["samples"]]
        stages.append(StageCounts(**{**one, "samples": samples}))
    sources = {name: SourceCounts(**one) for name, one in plain["sources"].items()}
    return Counts(stages, sources, dict(plain["languages"]), dict(plain["topics"]), plain["seconds"])
