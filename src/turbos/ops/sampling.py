"""Sampling noise that depends only on (seed, position, token): the same draw alone or in any batch.

Gumbel noise from a counter-based integer hash (splitmix64's finaliser), so that `argmax(logits / temperature + noise)`
is a sample of the softmax. Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
_SECOND = -7723592293110705685  # 0x94D049BB133111EB


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_bits(x: Tensor) -> Tensor:
    """splitmix64 of int64 counters: int64 of the same shape, all bits mixed."""
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    return x ^ _shifted(x, 31)


def gumbel_noise(seeds_B: Tensor, positions_B: Tensor, vocabulary: int) -> Tensor:
    """Standard Gumbel noise, fp32 `[B, V]`, from int64 seeds and positions."""
    stream_B = hash_bits(hash_bits(seeds_B) + positions_B)
    tokens_V = torch.arange(vocabulary, device=seeds_B.device)
    bits_BV = _shifted(hash_bits(stream_B[:, None] + tokens_V), 41)  # 23 bits: bits + 0.5 is exact in fp32
    uniform_BV = (bits_BV.to(torch.float32) + 0.5) * 2.0**-23
    # -log(exponential): log1p keeps small exponentials, which are the large noise that argmax sees, finely spaced.
    return -torch.log(-torch.log1p(-uniform_BV))
