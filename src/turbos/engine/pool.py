"""The states of all running sequences: scan and conv states in slots, keys and values in pages.

A sequence is a `PoolRow`: its slot, its pages, its length. `view` shows some rows to the model as the state of a batch;
the fused step reads and writes the same tensors in place. Pages may be shared between rows and snapshots: `ensure`
gives a row pages of its own before it writes. Not a scheduler: it never decides who must wait.

>>> from turbos.common.records import Documents
>>> from turbos.model.lm import LanguageModel
>>> config = ModelConfig(vocab_size=64, hidden_size=16, layers="MDAD", mamba_heads=2, mamba_head_dim=8)
>>> model, pool = LanguageModel(config).init_weights(seed=0), StatePool(config, num_slots=2, num_pages=4)
>>> row = pool.new_row()
>>> pool.ensure(row, 3)
True
>>> with torch.no_grad(), pool.view([row]) as state:
...     hidden_TD = model(torch.tensor([5, 6, 7]), Documents.from_lengths([3]), state).hidden_TD
>>> row.length, len(row.table), pool.allocator.free
(3, 1, 3)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turbos.engine.layout import Layout, scan_dtype
from turbos.engine.pages import PAGE, PageAllocator
from turbos.engine.view import PagedKeyValues, PageTables, PoolView
from turbos.model.config import ModelConfig
from turbos.model.state import MambaState, SelectiveState

__all__ = ["PAGE", "Layout", "PageAllocator", "PoolRow", "StatePool"]


@dataclass(eq=False)
class PoolRow:
    """One sequence: its slot, the pages of its keys in order, and how many tokens it has read. Grows in place."""

    slot: int
    table: list[int] = field(default_factory=list)
    length: int = 0


class StatePool:
    """Tensors of `num_slots` sequences and `num_pages` pages; uninitialised memory is committed when it is touched.

    `conv_SX` and `scan_SX` have a flat row for each slot (`layout` says what lies where); `keys` and `values` have one
    tensor `[pages, PAGE, K, E]` for each attention sublayer. Not safe for several threads.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        num_pages: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        scratch: bool = False,
    ) -> None:
        """Everything free; `dtype` is that of conv inputs, keys and values.

        `scratch` adds a slot and a page at the end that no sequence ever gets: a step of fixed height lets the rows
        that it does not need write there.
        """
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        self.layout = Layout.of(config, dtype)
        self.num_slots = num_slots
        self.allocator = PageAllocator(num_pages)
        self.scratch = scratch
        slots, pages = num_slots + scratch, num_pages + scratch
        self.conv_SX = torch.empty(slots, self.layout.conv_numbers, device=device, dtype=dtype)
        self.scan_SX = torch.empty(slots, self.layout.scan_numbers, device=device, dtype=scan_dtype(dtype))
        shape = (pages, PAGE, config.num_kv_heads, config.head_dim)
        self.keys = tuple(torch.empty(shape, device=device, dtype=dtype) for _ in self.layout.attention)
        self.values = tuple(torch.empty(shape, device=device, dtype=dtype) for _ in self.layout.attention)
        self._free_slots = list(range(num_slots))
        if scratch:
            self.conv_SX[num_slots].zero_()
            self.scan_SX[num_slots].zero_()
            for tensor in (*self.keys, *self.values):
                tensor[num_pages].zero_()

    @property
    def pages_matter(self) -> bool:
        """Whether sequences need pages at all (some sublayer is attention)."""
        return bool(self.layout.attention)

    @property
    def free_slots(self) -> int:
        """How many sequences more could begin."""
        return len(self._free_slots)

    def alloc_slot(self) -> int | None:
        """A slot of zeros; None where all are taken."""
        if not self._free_slots:
            return None
        slot = heapq.heappop(self._free_slots)
        self.conv_SX[slot].zero_()
        self.scan_SX[slot].zero_()
        return slot

    def free_slot(self, slot: int) -> None:
        """Give a slot back."""
        if slot in self._free_slots:
            raise ValueError(f"slot {slot} is free: it was given back once too often")
        heapq.heappush(self._free_slots, slot)

    def new_row(self) -> PoolRow | None:
        """An empty sequence; None where all slots are taken."""
        slot = self.alloc_slot()
        return None if slot is None else PoolRow(slot)

    def free_row(self, row: PoolRow) -> None:
        """Give a sequence's slot and pages back; the row must not be used again."""
        self.free_slot(row.slot)
        for page in row.table:
            self.allocator.release(page)
        row.table, row.length, row.slot = [], 0, -1

    def copy_slot(self, source: int, target: int) -> None:
        """Make one slot's states those of another."""
        self.conv_SX[target] = self.conv_SX[source]
        self.scan_SX[target] = self.scan_SX[source]

    def copy_page(self, source: int, target: int) -> None:
        """Make one page's keys and values, in every attention sublayer, those of another."""
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def pages_missing(self, row: PoolRow, new_length: int) -> int:
        """Pages that `ensure` would take: new ones, and copies of shared ones that are about to be written."""
        if not self.pages_matter or new_length <= row.length:
            return 0
        return max(0, self.layout.pages_for(new_length) - len(row.table)) + len(self._shared(row, new_length))

    def ensure(self, row: PoolRow, new_length: int) -> bool:
        """Ready a row for tokens up to `new_length`: room on pages, and those to be written its own.

        False where too few pages are free; nothing has changed then.
        """
        missing = self.pages_missing(row, new_length)
        if missing > self.allocator.free:
            return False
        if missing:
            for place in self._shared(row, new_length):
                row.table[place] = self._own_copy(row.table[place])
            while len(row.table) < self.layout.pages_for(new_length):
                row.table.append(self._take_page())
        return True

    def _shared(self, row: PoolRow, new_length: int) -> list[int]:
        """Places in a row's table that tokens up to `new_length` would be written to though others hold the page."""
        places = range(row.length // PAGE, min(len(row.table), self.layout.pages_for(new_length)))
        return [place for place in places if self.allocator.count(row.table[place]) > 1]

    def _take_page(self) -> int:
        page = self.allocator.alloc()
        if page is None:
            raise RuntimeError("no page is free, though the free ones were counted")
        return page

    def _own_copy(self, page: int) -> int:
        copy = self._take_page()
        self.copy_page(page, copy)
        self.allocator.release(page)
        return copy

    @contextmanager
    def view(self, rows: Sequence[PoolRow]) -> Iterator[PoolView]:
        """The rows as the state of a batch for `LanguageModel.forward`: document b continues row b.

        Keys and values go to the pages at once. On leaving, conv and scan states go back to their slots and each
        `row.length` is what was read; after an exception the rows' states are undefined, lengths are as before.
        Call `ensure` before: tokens without a page of the row's own are refused.
        """
        slots = [row.slot for row in rows]
        if len(set(slots)) != len(slots) or not slots:
            raise ValueError(f"a view needs rows, each only once; got slots {slots[:8]}")
        # A single row is worked on where it lies.
        alone = len(slots) == 1
        index_B = torch.tensor(slots, device=self.device)
        conv_BX = self.conv_SX[slots[0] : slots[0] + 1] if alone else self.conv_SX[index_B]
        scan_BX = self.scan_SX[slots[0] : slots[0] + 1] if alone else self.scan_SX[index_B]
        state = self._state(rows, conv_BX, scan_BX)
        yield state
        if not alone:
            self.conv_SX[index_B] = conv_BX
            self.scan_SX[index_B] = scan_BX
        for row, length in zip(rows, state.lengths, strict=True):
            row.length = length

    def _state(self, rows: Sequence[PoolRow], conv_BX: Tensor, scan_BX: Tensor) -> PoolView:
        layers: list[PagedKeyValues | MambaState | SelectiveState | None] = [None] * len(self.config.layers)
        for place in self.layout.scans:
            kind = MambaState if place.kind == "M" else SelectiveState
            layers[place.sublayer] = kind(place.conv.of(conv_BX), place.scan.of(scan_BX))
        tables = PageTables([row.table for row in rows], self.device)
        for sublayer, keys, values in zip(self.layout.attention, self.keys, self.values, strict=True):
            layers[sublayer] = PagedKeyValues(keys, values, tables)
        lengths_B = torch.tensor([row.length for row in rows], device=self.device)
        return PoolView(tuple(layers), lengths_B, tables, self.allocator if self.pages_matter else None)
