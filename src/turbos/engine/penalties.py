"""How often each token was seen in a prompt and its answer, kept as tokens come, and the penalties made of it.

Repetition (arXiv 1909.05858, section 4.1) divides a positive logit by the penalty and multiplies a negative one, for
every token of prompt and answer; presence and frequency subtract, for tokens of the answer.

>>> counts = TokenCounts(prompt=[3, 3])
>>> counts.add(5)
>>> counts.add(5)
>>> penalise(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0]), counts, 2.0, 0.5, 0.25).tolist()
[1.0, 1.0, 1.0, 0.5, 1.0, -0.5]
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


class TokenCounts:
    """Distinct tokens of a text, prompt first, with their counts in the answer; adding one is cheap at any length."""

    def __init__(self, prompt: Iterable[int]) -> None:
        seen = sorted(set(prompt))
        self._place = {token: place for place, token in enumerate(seen)}
        self._tokens = np.array(seen, np.int64)
        self._counts = np.zeros(len(seen), np.float32)

    def add(self, token: int) -> None:
        """Count one more token of the answer."""
        place = self._place.setdefault(token, len(self._place))
        if place >= len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.zeros(place + 16, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(place + 16, np.float32)])
        self._tokens[place] = token
        self._counts[place] += 1

    @property
    def tokens_N(self) -> Tensor:
        """Tokens seen, int64 `[N]`, each once."""
        return torch.from_numpy(self._tokens[: len(self._place)])

    @property
    def counts_N(self) -> Tensor:
        """How often the answer has each of `tokens_N`, fp32 `[N]`."""
        return torch.from_numpy(self._counts[: len(self._place)])


def penalise(logits_V: Tensor, counts: TokenCounts, repetition: float, presence: float, frequency: float) -> Tensor:
    """Change logits in place, and return them."""
    tokens_N, counts_N = counts.tokens_N, counts.counts_N
    logits_N = logits_V[tokens_N]
    logits_N = torch.where(logits_N > 0, logits_N / repetition, logits_N * repetition)
    logits_N = logits_N - presence * (counts_N > 0) - frequency * counts_N
    logits_V[tokens_N] = logits_N.to(logits_V.dtype)
    return logits_V
