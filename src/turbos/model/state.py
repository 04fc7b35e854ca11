"""What a model remembers of running sequences: keys and values per attention sublayer, conv and scan state per Mamba.

One object holds `B` sequences. Keys and values are allocated once for `max_len` tokens and written in place; the scan
state is fp32 (or float64 in tests) and of constant size. A view made by `rows` shares memory with its parent.

`RunningState` and `KeyValues` are what the model asks of a state: `HybridState` is the plain one, with contiguous rows;
the engine's pool, with pages, is the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig


class KeyValues(Protocol):
    """Keys and values of one attention sublayer, wherever they lie."""

    def write(self, k_TKE: Tensor, v_TKE: Tensor, rows_T: Tensor, positions_T: Tensor) -> None:
        """Store each token's key and value under its sequence (`rows_T`) and position."""

    def first(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, max(lengths), K, E]`; those beyond a sequence's length are finite, no more is said."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values `[B, S, K, E]` of one attention sublayer."""

    k_BSKE: Tensor
    v_BSKE: Tensor

    def write(self, k_TKE: Tensor, v_TKE: Tensor, rows_T: Tensor, positions_T: Tensor) -> None:
        """Store each token's key and value under its sequence and position."""
        self.k_BSKE[rows_T, positions_T] = k_TKE
        self.v_BSKE[rows_T, positions_T] = v_TKE

    def first(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Views of the first `max(lengths)` keys and values of every sequence."""
        longest = max(lengths)
        return self.k_BSKE[:, :longest], self.v_BSKE[:, :longest]

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All it holds."""
        return self.k_BSKE, self.v_BSKE


@dataclass(frozen=True)
class MambaState:
    """Last K - 1 conv inputs `[B, K - 1, C]` and scan state `[B, H, P, N]` of one Mamba2 sublayer."""

    conv_BKC: Tensor
    ssm_BHPN: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All it holds."""
        return self.conv_BKC, self.ssm_BHPN


@dataclass(frozen=True)
class SelectiveState:
    """Last K - 1 conv inputs `[B, K - 1, I]` and scan state `[B, N, I]` of one Mamba-1 sublayer."""

    conv_BKC: Tensor
    ssm_BNI: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """All it holds."""
        return self.conv_BKC, self.ssm_BNI


LayerState = KVCache | MambaState | SelectiveState | None


class RunningState(Protocol):
    """What `LanguageModel.forward` asks of the state of `B` sequences; document b of a call continues sequence b."""

    @property
    def layers(self) -> Sequence[KeyValues | MambaState | SelectiveState | None]:
        """State of each sublayer; advanced in place."""

    @property
    def lengths_B(self) -> Tensor:
        """Tokens read of each sequence, int64; the model adds what it reads."""

    @property
    def batch(self) -> int:
        """How many sequences it holds."""

    @property
    def lengths(self) -> list[int]:
        """Tokens read of each sequence, as plain integers."""

    @property
    def fixed(self) -> bool:
        """Whether a call must not depend on the tensors' numbers in its shapes or on the host: it may be captured.

        `lengths` are then bounds, the same for every call.
        """

    def check_room(self, new_lengths: Sequence[int]) -> None:
        """An error if some sequence cannot grow by so many tokens."""


@dataclass(frozen=True)
class HybridState:
    """State of `B` sequences over all sublayers; the tensors change in place as tokens are read."""

    layers: tuple[LayerState, ...]
    lengths_B: Tensor  # int64, tokens read so far
    max_len: int

    @classmethod
    def alloc(
        cls,
        config: ModelConfig,
        batch: int,
        max_len: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HybridState:
        """Empty state of `batch` sequences of up to `max_len` tokens."""
        layers = tuple(_alloc_layer(kind, config, batch, max_len, device, dtype) for kind in config.layers)
        return cls(layers, torch.zeros(batch, dtype=torch.int64, device=device), max_len)

    @property
    def batch(self) -> int:
        """How many sequences it holds."""
        return self.lengths_B.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens read of each sequence, as plain integers."""
        return self.lengths_B.tolist()

    @property
    def fixed(self) -> bool:
        """False: its lengths are asked for."""
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors (allocated, not only filled)."""
        return sum(tensor.nbytes for layer in self.layers if layer is not None for tensor in layer.tensors)

    def select(self, rows: Sequence[int]) -> HybridState:
        """A copy of some sequences, in the given order; a row may be named more than once (that is a fork)."""
        index = torch.tensor(list(rows), dtype=torch.int64, device=self.lengths_B.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def fork(self, copies: int) -> HybridState:
        """Every sequence `copies` times, copies side by side: `[a, b] -> [a, a, b, b]`."""
        return self.select([row for row in range(self.batch) for _ in range(copies)])

    def rows(self, start: int, stop: int) -> HybridState:
        """A view of sequences `start .. stop - 1`: what is read through it is remembered here."""
        return self._map(lambda tensor: tensor[start:stop])

    def check_room(self, new_lengths: Sequence[int]) -> None:
        """`UserError` if some sequence would grow beyond `max_len`."""
        longest = max(old + new for old, new in zip(self.lengths, new_lengths, strict=True))
        if longest > self.max_len:
            raise UserError(f"state: {longest} tokens do not fit into max_len {self.max_len}; allocate a longer state")

    def _map(self, change) -> HybridState:  # type: ignore[no-untyped-def]
        layers = tuple(None if layer is None else type(layer)(*map(change, layer.tensors)) for layer in self.layers)
        return HybridState(layers, change(self.lengths_B), self.max_len)


def _alloc_layer(
    kind: str, config: ModelConfig, batch: int, max_len: int, device: torch.device | str, dtype: torch.dtype
) -> LayerState:
    if kind == "A":
        shape = (batch, max_len, config.num_kv_heads, config.head_dim)
        return KVCache(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if kind == "M":
        conv = torch.zeros(batch, config.conv_kernel - 1, config.conv_channels, device=device, dtype=dtype)
        shape = (batch, config.mamba_heads, config.mamba_head_dim, config.mamba_state)
        return MambaState(conv, torch.zeros(shape, device=device, dtype=wide))
    if kind == "S":
        conv = torch.zeros(batch, config.conv_kernel - 1, config.mamba1_inner, device=device, dtype=dtype)
        scan = torch.zeros(batch, config.mamba1_state, config.mamba1_inner, device=device, dtype=wide)
        return SelectiveState(conv, scan)
    return None
