"""Records that pass between rooms: small, frozen, and free of behaviour beyond what follows from their fields.

Tokens are packed: a batch is one row of `T` tokens, and `Documents` says where each document begins.

>>> documents = Documents.from_lengths([3, 2])
>>> documents.cu_seqlens.tolist(), documents.positions_T.tolist(), documents.index_T.tolist()
([0, 3, 5], [0, 1, 2, 0, 1], [0, 0, 0, 1, 1])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Literal

import torch
from torch import Tensor

IGNORED = -100
"""Target id that carries no loss (the field's usual value)."""


@dataclass(frozen=True)
class Documents:
    """Borders of documents packed one after another; every op resets at them.

    `cu_seqlens` is int64 `[N + 1]`: document `n` holds tokens `cu_seqlens[n] .. cu_seqlens[n + 1] - 1`.
    Every document has at least one token.
    """

    cu_seqlens: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> Documents:
        """Borders of documents of the given lengths (each >= 1)."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"documents need at least one token each, got lengths {list(lengths)[:8]}")
        borders = [0, *accumulate(int(length) for length in lengths)]
        documents = cls(torch.tensor(borders, dtype=torch.int64, device=device))
        # Known here already: a device need not be asked for them.
        documents.__dict__["borders"] = borders
        return documents

    @cached_property
    def borders(self) -> list[int]:
        """`cu_seqlens` as plain integers (copied from the device once)."""
        return self.cu_seqlens.tolist()

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return [end - start for start, end in pairwise(self.borders)]

    @property
    def count(self) -> int:
        """How many documents there are."""
        return len(self.borders) - 1

    @property
    def total(self) -> int:
        """How many tokens there are in all."""
        return self.borders[-1]

    @cached_property
    def lengths_N(self) -> Tensor:
        """Tokens of each document, int64 `[N]`."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @cached_property
    def index_T(self) -> Tensor:
        """Document of each token, int64 `[T]`."""
        numbers = torch.arange(self.count, device=self.cu_seqlens.device)
        return numbers.repeat_interleave(self.lengths_N, output_size=self.total)

    @cached_property
    def positions_T(self) -> Tensor:
        """Place of each token inside its document, int64 `[T]`, from 0."""
        return torch.arange(self.total, device=self.cu_seqlens.device) - self.cu_seqlens[self.index_T]


@dataclass(frozen=True)
class Problem:
    """A question whose answer a program can check.

    `thinking` holds worked steps, or None where the source gives none; `metadata` is what the family's own checker
    needs, as JSON. `level` grows with difficulty, from 0.
    """

    family: str
    seed: int
    level: int
    question: str
    answer: str
    thinking: str | None
    metadata: str = "{}"


Finish = Literal["stop", "length", "cancelled", "error"]
"""Why an answer ended; an error's reason stands beside it."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt: token ids, the log-probability of each when sampled, and why it ended.

    `text` is None where no tokenizer decoded the ids. Where asked for, `top_logprobs` has the likeliest tokens of each
    place, and `routes` `[T, L, K]` the experts of every token that was read (prompt and ids, less the last).
    `cached_tokens` of the prompt came from a state that was kept.
    """

    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Finish
    weights_version: int = 0
    text: str | None = None
    reason: str = ""
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    routes: Tensor | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """A scorer's word on an answer; one that cannot judge abstains (score None), it never guesses."""

    status: Literal["pass", "fail", "abstain"]
    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Sample:
    """A training sequence: flat ids, and for each the weight of the loss on *predicting that token* (0 = none).

    `logprobs` (of the sampler, same length, 0.0 where not sampled) and `advantage` are set in RL only.

    >>> Sample(ids=(5, 6, 7), loss_weights=(0.0, 1.0, 1.0)).logprobs
    """

    ids: tuple[int, ...]
    loss_weights: tuple[float, ...]
    logprobs: tuple[float, ...] | None = None
    advantage: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Packed samples, shifted for next-token prediction.

    `targets_T[t]` is the token after `tokens_T[t]` in the same document, or `IGNORED`; `loss_weights_T[t]` is the
    weight of predicting it (0 where ignored). `advantages_T` and `logprobs_T` (sampler's, of the target) are RL's.
    `recycling_seed` is the trainer's: it decides where tokens beyond an expert's capacity go; None sets no capacity.
    """

    tokens_T: Tensor
    documents: Documents
    targets_T: Tensor
    loss_weights_T: Tensor
    advantages_T: Tensor | None = None
    logprobs_T: Tensor | None = None
    recycling_seed: int | None = None
