"""Where the state of each sublayer lies in a row of the pool, and what it costs.

A sequence's conv inputs are one flat row of numbers, its scan states another, sublayer after sublayer; keys and values
lie on pages, which all attention sublayers number alike. Not a tensor is held here.

>>> config = ModelConfig(vocab_size=64, hidden_size=16, layers="MDAD", mamba_heads=2, mamba_head_dim=8, mamba_state=4)
>>> layout = Layout.of(config)
>>> layout.scan_numbers, layout.attention, layout.kv_bytes_per_token, layout.pages_for(65)
(64, (2,), 512, 2)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from turbos.engine.pages import PAGE
from turbos.model.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A run `start .. stop - 1` of a flat row and the shape that it has in the sublayer."""

    start: int
    stop: int
    shape: tuple[int, ...]

    def of(self, flat_SX: Tensor) -> Tensor:
        """This part of every row, `[S, *shape]`: a view."""
        return flat_SX[:, self.start : self.stop].unflatten(1, self.shape)


@dataclass(frozen=True)
class ScanPlace:
    """Where one Mamba sublayer keeps its last conv inputs and its scan state."""

    sublayer: int
    kind: Literal["M", "S"]
    conv: Part
    scan: Part


@dataclass(frozen=True)
class Layout:
    """Places and bytes of a model's state; `scans` and `attention` are in the order of the stack."""

    scans: tuple[ScanPlace, ...]
    attention: tuple[int, ...]
    conv_numbers: int
    scan_numbers: int
    state_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype = torch.float32) -> Layout:
        """The layout of a model whose conv inputs, keys and values are `dtype`; scan states are never below fp32."""
        scans: list[ScanPlace] = []
        conv_end = scan_end = 0
        for sublayer, kind in enumerate(config.layers):
            if kind in "MS":
                conv, scan = _shapes(kind, config)
                place = ScanPlace(sublayer, "M" if kind == "M" else "S", _part(conv_end, conv), _part(scan_end, scan))
                conv_end, scan_end = place.conv.stop, place.scan.stop
                scans.append(place)
        attention = tuple(sublayer for sublayer, kind in enumerate(config.layers) if kind == "A")
        state_bytes = conv_end * dtype.itemsize + scan_end * scan_dtype(dtype).itemsize
        kv_bytes = 2 * len(attention) * config.num_kv_heads * config.head_dim * dtype.itemsize
        return cls(tuple(scans), attention, conv_end, scan_end, state_bytes, kv_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: keys and values of `PAGE` tokens over all attention sublayers."""
        return PAGE * self.kv_bytes_per_token

    def pages_for(self, length: int) -> int:
        """Pages that hold `length` tokens (none in a model without attention)."""
        return -(-length // PAGE) if self.attention else 0


def scan_dtype(dtype: torch.dtype) -> torch.dtype:
    """Numbers of scan states beside conv inputs, keys and values of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shapes(kind: str, config: ModelConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one sequence's conv inputs and scan state, as `model.state` has them."""
    margin = config.conv_kernel - 1
    if kind == "M":
        scan = (config.mamba_heads, config.mamba_head_dim, config.mamba_state)
        return (margin, config.conv_channels), scan
    return (margin, config.mamba1_inner), (config.mamba1_state, config.mamba1_inner)


def _part(start: int, shape: tuple[int, ...]) -> Part:
    return Part(start, start + math.prod(shape), shape)
