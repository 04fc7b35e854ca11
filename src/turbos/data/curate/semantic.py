"""Semantic copies: texts that say the same in other words, by an embedding function that the caller brings.

As in SemDeDup (arXiv 2303.09540) a text goes where the cosine to one that was kept is at least a limit. Every text is
compared with every kept one, one matrix product a batch: exact, and quadratic, so it is for up to about a million
documents. Which model embeds is not decided here: without one, the stage is left out and the report says so.

>>> letters = lambda texts: np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)
>>> SemanticCopies(letters).first_seen(["aab", "baa", "ccc"]).tolist()
[-1, 0, -1]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

SIMILARITY = 0.95
ROWS_AT_ONCE = 1 << 16


class Embed(Protocol):
    """A function from N texts to N vectors, float `[N, D]`; the same text must give the same vector."""

    def __call__(self, texts: Sequence[str], /) -> np.ndarray: ...


class SemanticCopies:
    """The vectors of the documents kept so far, of length one."""

    def __init__(self, embed: Embed, similarity: float = SIMILARITY) -> None:
        self.embed, self.similarity = embed, similarity
        self.kept = np.zeros((0, 0), np.float32)
        self.num_kept = 0

    def first_seen(self, texts: Sequence[str]) -> np.ndarray:
        """For each text, int64 `[N]`: the number of the kept one that it resembles, or -1; the new ones are kept.

        Kept texts count from 0. Raises ValueError where the function returns no matrix of N finite rows.
        """
        vectors = np.asarray(self.embed(texts), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise ValueError(f"the embedding of {len(texts)} texts has shape {vectors.shape} or is not finite")
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        found = self._nearest_kept(vectors)
        among = vectors @ vectors.T
        new: list[int] = []
        for row in range(len(texts)):
            near = [place for place, other in enumerate(new) if among[row, other] >= self.similarity]
            if found[row] < 0 and near:
                found[row] = self.num_kept + near[0]
            elif found[row] < 0:
                new.append(row)
        self._keep(vectors[new])
        return found

    def _nearest_kept(self, vectors: np.ndarray) -> np.ndarray:
        """Number of the nearest kept vector where it is near enough, else -1."""
        best, found = np.full(len(vectors), -1.0, np.float32), np.full(len(vectors), -1, np.int64)
        for start in range(0, self.num_kept, ROWS_AT_ONCE):
            cosines = vectors @ self.kept[start : min(start + ROWS_AT_ONCE, self.num_kept)].T
            place = cosines.argmax(1)
            top = cosines[np.arange(len(vectors)), place]
            better = top > best
            best[better], found[better] = top[better], start + place[better]
        return np.where(best >= self.similarity, found, -1)

    def _keep(self, vectors: np.ndarray) -> None:
        end = self.num_kept + len(vectors)
        if end > len(self.kept) or self.kept.shape[1] != vectors.shape[1]:
            grown = np.zeros((max(end, 2 * len(self.kept), 1024), vectors.shape[1]), np.float32)
            if self.num_kept:
                grown[: self.num_kept] = self.kept[: self.num_kept]
            self.kept = grown
        self.kept[self.num_kept : end] = vectors
        self.num_kept = end
