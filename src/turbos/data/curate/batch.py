"""A batch of documents on its way through the stages: what is alive, what was found, and what it has become."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turbos.data.curate.labels import Judged
from turbos.data.curate.words import Scan, scan_texts


@dataclass(frozen=True)
class Document:
    """A text with its number in the run (from 0, over all sources) and its source."""

    number: int
    source: str
    text: bytes


class Batch:
    """Some documents in order. A dropped one keeps its place, so that arrays over the batch stay aligned."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.texts = [document.text for document in documents]
        self.alive = np.ones(len(documents), np.bool_)
        self.judged: Judged | None = None
        self._scan: Scan | None = None

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def scan(self) -> Scan:
        """The scan of the texts as they stood when it was first asked for; dropped ones count as empty."""
        if self._scan is None:
            pairs = zip(self.texts, self.alive, strict=True)
            self._scan = scan_texts([text if is_alive else b"" for text, is_alive in pairs])
        return self._scan

    def living(self) -> list[int]:
        """Places of the documents that are alive."""
        return np.flatnonzero(self.alive).tolist()

    @property
    def alive_bytes(self) -> int:
        """UTF-8 bytes of the documents that are alive."""
        return sum(len(self.texts[place]) for place in self.living())
