"""Sequences that ask for what was said before: associative recall, and needles in a haystack of text.

Recall is multi-query associative recall (Arora et al. 2023, arXiv 2312.04927, section 4): key-value pairs, then every
key again in another order; only the values of the second round carry loss. A needle is such a pair planted in a text,
asked for after its end. Keys and values are symbols: ids above the tokenizer's, so no text holds one by accident.
Chance is `1 / values` (one in so many needles or pairs for who only notices what is there). What a model makes of
them is the matter of `bench.twins_measure`.

>>> symbols = Symbols(first=100, keys=4, values=4)
>>> sample = recall_sample(2, symbols, np.random.default_rng(0))
>>> sample.ids[:4], sample.ids[4:], sample.loss_weights
((102, 105, 100, 104), (102, 105, 100, 104), (0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0))
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from turbos.common.errors import UserError
from turbos.common.records import Sample


@dataclass(frozen=True)
class Symbols:
    """Ids `first .. first + keys - 1` are keys, the next `values` ids are values."""

    first: int
    keys: int = 64
    values: int = 64

    @property
    def end(self) -> int:
        """The smallest vocabulary that holds them."""
        return self.first + self.keys + self.values

    def pairs(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """`count` pairs, int64 `[count, 2]`: different keys, each with any value. UserError where keys run out."""
        if not 1 <= count <= self.keys:
            raise UserError(f"recall: {count} pairs want as many different keys, and there are {self.keys}")
        keys = rng.permutation(self.keys)[:count]
        return self.first + np.stack([keys, self.keys + rng.integers(0, self.values, count)], axis=1)


def recall_sample(pairs: int, symbols: Symbols, rng: np.random.Generator) -> Sample:
    """`pairs` pairs and as many questions, `4 * pairs` tokens; loss on the values that answer the questions."""
    said = symbols.pairs(pairs, rng)
    asked = said[rng.permutation(pairs)]
    ids = np.concatenate([said, asked]).ravel()
    return Sample(tuple(ids.tolist()), (0.0,) * (2 * pairs) + (0.0, 1.0) * pairs)


def needle_sample(text: np.ndarray, needles: int, symbols: Symbols, rng: np.random.Generator) -> Sample:
    """A text with `needles` pairs at places that are drawn evenly over it, then a question for each, in another order.

    The sample has `len(text) + 4 * needles` tokens. Text after text carries loss, and so do the values asked for;
    planted keys and values and the questions carry none, since nothing foretells them.
    """
    said = symbols.pairs(needles, rng)
    places = np.sort(rng.integers(1, len(text) + 1, needles)).tolist()
    ids, weights = [], []
    for number, (start, end) in enumerate(pairwise([0, *places, len(text)])):
        ids += text[start:end].tolist()
        weights += [1.0] * (end - start)
        if number < needles:
            ids += said[number].tolist()
            weights += [0.0, 0.0]
    for key, value in said[rng.permutation(needles)].tolist():
        ids += [key, value]
        weights += [0.0, 1.0]
    return Sample(tuple(ids), tuple(weights))
