"""Rows of a pool as the model sees them: `PoolView` is a `RunningState`, `PagedKeyValues` a `KeyValues`.

Made by `StatePool.view`. Keys and values are written to pages in place; what attention reads is gathered for one
sublayer at a time, or is a plain view where a single sequence's pages lie in one run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from turbos.engine.pages import PAGE, PageAllocator
from turbos.model.state import MambaState, SelectiveState


class PageTables:
    """Page ids of a batch: `[B, P]`, short tables filled up with page 0 (what lies there is never read)."""

    def __init__(self, tables: Sequence[Sequence[int]], device: torch.device) -> None:
        """The tables as they are at present; they must not change while a view lives."""
        self.tables = tables
        self.device = device

    @cached_property
    def pages_BP(self) -> Tensor:
        """All tables, int64 `[B, P]`."""
        longest = max(len(table) for table in self.tables)
        return torch.tensor([[*table, *[0] * (longest - len(table))] for table in self.tables], device=self.device)

    @cached_property
    def run(self) -> int | None:
        """The first page where one sequence's pages follow each other, else None."""
        table = list(self.tables[0])
        if len(self.tables) > 1 or table != list(range(table[0], table[0] + len(table))):
            return None
        return table[0]


@dataclass(frozen=True)
class PagedKeyValues:
    """Keys and values `[pages, PAGE, K, E]` of one attention sublayer, seen through a batch's page tables."""

    k_GSKE: Tensor
    v_GSKE: Tensor
    tables: PageTables

    def write(self, k_TKE: Tensor, v_TKE: Tensor, rows_T: Tensor, positions_T: Tensor) -> None:
        """Store each token's key and value on the page of its sequence and position."""
        pages_T = self.tables.pages_BP[rows_T, positions_T // PAGE]
        self.k_GSKE[pages_T, positions_T % PAGE] = k_TKE
        self.v_GSKE[pages_T, positions_T % PAGE] = v_TKE

    def first(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, max(lengths), K, E]`, zero beyond each sequence's length."""
        return self._first(self.k_GSKE, lengths), self._first(self.v_GSKE, lengths)

    def _first(self, x_GSKE: Tensor, lengths: Sequence[int]) -> Tensor:
        longest = max(lengths)
        pages = -(-longest // PAGE)
        if self.tables.run is not None:
            return x_GSKE[self.tables.run : self.tables.run + pages].flatten(0, 1)[None, :longest]
        x_BSKE = x_GSKE[self.tables.pages_BP[:, :pages]].flatten(1, 2)[:, :longest]
        for row, length in enumerate(lengths):
            # Pages hold whatever was there before: NaN would spoil even what attention weighs with 0.
            x_BSKE[row, length:] = 0
        return x_BSKE


@dataclass(frozen=True)
class PoolView:
    """State of a batch of pool rows over all sublayers; see `StatePool.view`."""

    layers: tuple[PagedKeyValues | MambaState | SelectiveState | None, ...]
    lengths_B: Tensor
    tables: PageTables
    allocator: PageAllocator | None

    @property
    def batch(self) -> int:
        """How many sequences it shows."""
        return self.lengths_B.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Tokens read of each sequence, as plain integers."""
        return self.lengths_B.tolist()

    @property
    def fixed(self) -> bool:
        """False: its lengths are asked for."""
        return False

    def check_room(self, new_lengths: Sequence[int]) -> None:
        """RuntimeError where tokens would go beyond a row's pages, or onto a page that others hold too."""
        if self.allocator is None:
            return
        for table, old, new in zip(self.tables.tables, self.lengths, new_lengths, strict=True):
            places = range(old // PAGE, -(-(old + new) // PAGE))
            if places.stop > len(table):
                raise RuntimeError(f"{old + new} tokens do not fit on {len(table)} pages: call ensure first")
            if any(self.allocator.count(table[place]) > 1 for place in places):
                raise RuntimeError(f"a page about to be written at {old} is shared: call ensure first")
