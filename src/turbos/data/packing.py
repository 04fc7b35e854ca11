"""Packing: whole samples into bins of limited tokens, and samples into one packed `Batch`. No padding anywhere.

>>> pack_lengths([5, 3, 4, 2], room=7)
[[0, 3], [2, 1]]
>>> batch = batch_of([Sample((7, 8, 9), (0.0, 0.0, 1.0)), Sample((4, 5), (0.0, 0.5))])
>>> batch.targets_T.tolist(), batch.loss_weights_T.tolist()
([-100, 9, -100, 5, -100], [0.0, 1.0, 0.0, 0.5, 0.0])
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from turbos.common.errors import UserError
from turbos.common.records import IGNORED, Batch, Documents, Sample


def pack_lengths(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: indices of items grouped into bins of at most `room`, longest items first.

    Every item goes into the fullest bin that still takes it. Raises UserError for an item longer than `room`.
    """
    bins: list[list[int]] = []
    # Bins by the room they have left; `sizes` lists the rooms that occur, in order, so the tightest fit is one
    # bisection away however many bins there are.
    open_bins: dict[int, list[int]] = {}
    sizes: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[item]
        if length > room:
            raise UserError(f"a sample of {length} tokens does not fit {room} tokens: raise the limit or leave it out")
        place = bisect_left(sizes, length)
        if place < len(sizes):
            left = sizes[place]
            number = open_bins[left].pop()
            if not open_bins[left]:
                del open_bins[left], sizes[place]
            bins[number].append(item)
        else:
            left, number = room, len(bins)
            bins.append([item])
        rest = left - length
        if rest not in open_bins:
            open_bins[rest] = []
            insort(sizes, rest)
        open_bins[rest].append(number)
    return bins


def pack_samples(samples: Sequence[Sample], max_tokens: int) -> list[list[int]]:
    """Indices of whole samples in bins of at most `max_tokens` tokens; UserError for a sample that is longer."""
    return pack_lengths([len(sample.ids) for sample in samples], max_tokens)


def _shifted(values: Sequence[float]) -> list[float]:
    """Values of the next token; the last token has none."""
    return [*values[1:], 0.0]


def batch_of(samples: Sequence[Sample]) -> Batch:
    """One packed batch `[T]` of samples, in order, each a document of its own.

    Targets are the next tokens, `IGNORED` where the weight of predicting them is 0. Sampler log-probabilities and
    advantages (one per token of a sample) are given if any sample has log-probabilities.
    """
    tokens: list[int] = []
    weights: list[float] = []
    logprobs: list[float] = []
    advantages: list[float] = []
    next_tokens: list[int] = []
    for sample in samples:
        if len(sample.loss_weights) != len(sample.ids):
            raise ValueError(f"a sample has {len(sample.ids)} ids but {len(sample.loss_weights)} loss weights")
        tokens += sample.ids
        next_tokens += [*sample.ids[1:], IGNORED]
        weights += _shifted(sample.loss_weights)
        logprobs += _shifted(sample.logprobs or (0.0,) * len(sample.ids))
        advantages += [sample.advantage] * len(sample.ids)
    weights_T = torch.tensor(weights, dtype=torch.float32)
    targets_T = torch.tensor(next_tokens, dtype=torch.int64).masked_fill(weights_T == 0, IGNORED)
    sampled = any(sample.logprobs is not None for sample in samples)
    return Batch(
        tokens_T=torch.tensor(tokens, dtype=torch.int64),
        documents=Documents.from_lengths([len(sample.ids) for sample in samples]),
        targets_T=targets_T,
        loss_weights_T=weights_T,
        advantages_T=torch.tensor(advantages, dtype=torch.float32) if sampled else None,
        logprobs_T=torch.tensor(logprobs, dtype=torch.float32) if sampled else None,
    )
