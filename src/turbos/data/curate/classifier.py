"""A small text classifier: hashed features, one linear layer over their mean, softmax (as fastText, arXiv 1607.01759).

Two kinds of features: runs of four bytes for languages and quality (they know layout and spelling, and do better on
sources that training has not seen), words with pairs of words for topics. They are taken from the front, the middle and
the end of a document, a bounded number, so that a long document costs no more than a page. What classes there are and
where examples come from is the matter of `labels.py` and `examples.py`.

>>> texts = [b"the cat sat on the mat", b"der Hund liegt auf dem Sofa"] * 20
>>> model = train_classifier("bytes", ("en", "de"), texts, [0, 1] * 20)
>>> model.names[int(model.scores(scan_texts([b"the dog sat on the sofa"]))[0].argmax())]
'en'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numba import njit

from turbos.data.curate.hashing import NGRAM_BASE, mixed
from turbos.data.curate.words import Scan, scan_texts

Features = Literal["bytes", "words"]
BUCKETS: dict[Features, int] = {"bytes": 1 << 16, "words": 1 << 18}
WINDOWS = 3
WINDOW_BYTES, WINDOW_WORDS = 600, 200
RUN_BYTES = 4
EPOCHS = 8
RATE = 1.0
"""fastText's step size: a document's features move by it, shared among them."""


@njit(cache=True)
def _windows(size: int, width: int, starts: np.ndarray) -> int:
    """Starts of up to WINDOWS windows spread over `size` places; returns how wide each is (all, where all fits)."""
    if size <= WINDOWS * width:
        starts[0] = 0
        for index in range(1, WINDOWS):
            starts[index] = size
        return size
    for index in range(WINDOWS):
        starts[index] = index * (size - width) // (WINDOWS - 1)
    return width


@njit(cache=True)
def _byte_features(text: np.ndarray, borders: np.ndarray, buckets: int, out: np.ndarray, offsets: np.ndarray) -> None:
    starts, filled = np.empty(WINDOWS, np.int64), 0
    for document in range(borders.shape[0] - 1):
        size = borders[document + 1] - borders[document]
        width = _windows(size, WINDOW_BYTES, starts)
        for window in range(WINDOWS):
            begin = borders[document] + starts[window]
            run = np.uint64(0)
            for place in range(begin, min(begin + width, borders[document + 1])):
                run = (run << np.uint64(8) | np.uint64(text[place])) & np.uint64(0xFFFFFFFF)
                if place - begin >= RUN_BYTES - 1:
                    out[filled] = np.int64(mixed(run)) & (buckets - 1)
                    filled += 1
        offsets[document + 1] = filled


@njit(cache=True)
def _word_features(words: np.ndarray, borders: np.ndarray, buckets: int, out: np.ndarray, offsets: np.ndarray) -> None:
    starts, filled = np.empty(WINDOWS, np.int64), 0
    for document in range(borders.shape[0] - 1):
        width = _windows(borders[document + 1] - borders[document], WINDOW_WORDS, starts)
        for window in range(WINDOWS):
            begin = borders[document] + starts[window]
            for word in range(begin, min(begin + width, borders[document + 1])):
                out[filled] = np.int64(words[word]) & (buckets - 1)
                filled += 1
                if word > begin:
                    out[filled] = np.int64(mixed(words[word - 1] * NGRAM_BASE + words[word])) & (buckets - 1)
                    filled += 1
        offsets[document + 1] = filled


def features(scan: Scan, kind: Features) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of all documents' features, int32, and the borders of the documents in them, int64 `[N + 1]`."""
    offsets = np.zeros(len(scan) + 1, np.int64)
    width = WINDOW_BYTES if kind == "bytes" else 2 * WINDOW_WORDS
    out = np.empty(len(scan) * WINDOWS * width + 1, np.int32)
    if kind == "bytes":
        _byte_features(scan.text_B, scan.borders, BUCKETS[kind], out, offsets)
    else:
        _word_features(scan.word_hash_W, scan.word_borders, BUCKETS[kind], out, offsets)
    return out[: offsets[-1]], offsets


@njit(cache=True)
def _probabilities(
    places: np.ndarray, start: int, end: int, weight: np.ndarray, bias: np.ndarray, out: np.ndarray
) -> None:
    """Softmax of the mean of the features' rows plus the bias."""
    out[:] = 0.0
    for index in range(start, end):
        row = weight[places[index]]
        for label in range(out.shape[0]):
            out[label] += row[label]
    top = -np.inf
    for label in range(out.shape[0]):
        out[label] = out[label] / max(end - start, 1) + bias[label]
        top = max(top, out[label])
    total = 0.0
    for label in range(out.shape[0]):
        out[label] = np.exp(out[label] - top)
        total += out[label]
    out /= total


@njit(cache=True)
def _score(
    places: np.ndarray, offsets: np.ndarray, weight: np.ndarray, bias: np.ndarray, out: np.ndarray
) -> None:  # fmt: skip
    for document in range(out.shape[0]):
        _probabilities(places, offsets[document], offsets[document + 1], weight, bias, out[document])


@njit(cache=True)
def _learn(
    places: np.ndarray, offsets: np.ndarray, labels: np.ndarray, order: np.ndarray, weight: np.ndarray,
    bias: np.ndarray, rate: float,
) -> None:  # fmt: skip
    """One pass of stochastic gradient descent in the given order; the rate falls linearly to zero."""
    probability = np.empty(bias.shape[0], np.float32)
    for step in range(order.shape[0]):
        document = order[step]
        start, end = offsets[document], offsets[document + 1]
        _probabilities(places, start, end, weight, bias, probability)
        probability[labels[document]] -= 1.0
        pace = np.float32(rate * (1.0 - step / order.shape[0]))
        # The mean's gradient would be shared by its length; fastText leaves that out, so that long texts teach as much.
        for index in range(start, end):
            row = weight[places[index]]
            for label in range(bias.shape[0]):
                row[label] -= pace * probability[label]
        for label in range(bias.shape[0]):
            bias[label] -= np.float32(0.1) * pace * probability[label]


@dataclass(frozen=True)
class Classifier:
    """Names of the classes, and the layer: `weight_BC` (a row for each bucket) and `bias_C`, float32."""

    kind: Features
    names: tuple[str, ...]
    weight_BC: np.ndarray
    bias_C: np.ndarray

    def scores(self, scan: Scan) -> np.ndarray:
        """Probability of every class for every document, float32 `[N, C]`."""
        places, offsets = features(scan, self.kind)
        out = np.empty((len(scan), len(self.names)), np.float32)
        _score(places, offsets, self.weight_BC, self.bias_C, out)
        return out


def train_classifier(
    kind: Features, names: Sequence[str], texts: Sequence[bytes], labels: Sequence[int], seed: int = 0
) -> Classifier:
    """Learn from texts with labels (indices into `names`); every class is shown equally often. Same seed, same bits.

    Raises ValueError where a class has no text.
    """
    places, offsets = features(scan_texts(texts), kind)
    label_N = np.asarray(labels, np.int64)
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(label_N == label) for label in range(len(names))]
    if any(len(one) == 0 for one in members):
        raise ValueError(f"no text for {[name for name, one in zip(names, members, strict=True) if len(one) == 0]}")
    shown = max(len(one) for one in members) * EPOCHS
    order = generator.permutation(np.concatenate([np.resize(generator.permutation(one), shown) for one in members]))
    weight, bias = np.zeros((BUCKETS[kind], len(names)), np.float32), np.zeros(len(names), np.float32)
    _learn(places, offsets, label_N, order, weight, bias, RATE)
    return Classifier(kind, tuple(names), weight, bias)
