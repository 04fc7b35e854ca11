"""One token for each of a fixed number of rows, as one row of operations on the device: what a CUDA graph can hold.

The model itself runs, over a `StaticView` of the pool: shapes are those of a bucket (so many rows, so many pages each),
everything else lies in tensors, and the host is asked for nothing between `fill` and the logits. Rows that a batch does
not need are sent to the pool's scratch slot and scratch page. It knows no graphs (`engine.graphs` captures it), and
runs on any device.

    step = StaticStep(model, pool, batch=8, pages=16)      # pool = StatePool(..., scratch=True)
    step.fill(rows, ids)                                   # up to 8 rows of up to 16 pages
    step()                                                 # or the replay of a capture of it
    step.logits_BV[: len(rows)]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from turbos.common.records import Documents
from turbos.engine.pages import PAGE
from turbos.engine.pool import PoolRow, StatePool
from turbos.model.lm import LanguageModel
from turbos.model.state import KeyValues, MambaState, SelectiveState

COLUMNS = 3
"""Numbers of a row before its pages: token, slot, tokens read so far."""


@dataclass(frozen=True)
class StaticKeyValues:
    """Keys and values `[pages, PAGE, K, E]` of one attention sublayer through tables `[B, P]` of fixed width.

    `beyond_BS` marks places that no token of a row has, its new one included.
    """

    k_GSKE: Tensor
    v_GSKE: Tensor
    pages_BP: Tensor
    beyond_BS: Tensor

    def write(self, k_TKE: Tensor, v_TKE: Tensor, rows_T: Tensor, positions_T: Tensor) -> None:
        """Store each token's key and value on the page of its sequence and position."""
        pages_T = self.pages_BP[rows_T, positions_T // PAGE]
        self.k_GSKE[pages_T, positions_T % PAGE] = k_TKE
        self.v_GSKE[pages_T, positions_T % PAGE] = v_TKE

    def first(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        """All that the tables name, `[B, P * PAGE, K, E]`; beyond a row's length keys are anything, values zero."""
        k_BSKE, v_BSKE = (x_GSKE[self.pages_BP].flatten(1, 2) for x_GSKE in (self.k_GSKE, self.v_GSKE))
        # Scores of those keys are masked; but NaN would spoil the sum of values even where it is weighed with 0.
        return k_BSKE, v_BSKE.masked_fill_(self.beyond_BS[..., None, None], 0.0)


@dataclass(frozen=True)
class StaticView:
    """A `RunningState` of fixed shape; `longest` is what any row of its bucket may have read."""

    layers: tuple[KeyValues | MambaState | SelectiveState | None, ...]
    lengths_B: Tensor
    longest: int

    @property
    def batch(self) -> int:
        """How many sequences it shows, scratch rows included."""
        return self.lengths_B.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Bounds: the token that comes fills the bucket."""
        return [self.longest] * self.batch

    @property
    def fixed(self) -> bool:
        """True: this is what it is for."""
        return True

    def check_room(self, new_lengths: Sequence[int]) -> None:
        """Nothing: `StaticStep.fill` has looked."""


class StaticStep:
    """The step of one bucket: `batch` rows of up to `pages` pages. Its tensors keep their places from call to call."""

    def __init__(self, model: LanguageModel, pool: StatePool, batch: int, pages: int) -> None:
        """All rows are scratch rows until `fill`."""
        if not pool.scratch:
            raise ValueError("a static step needs a pool with a scratch slot and a scratch page")
        config, device = model.config, pool.device
        self.model, self.pool, self.batch, self.pages = model, pool, batch, pages if pool.pages_matter else 0
        self.inputs_BX = torch.empty(batch, COLUMNS + self.pages, dtype=torch.int64, device=device)
        self.logits_BV = torch.empty(batch, config.vocab_size, device=device, dtype=pool.scan_SX.dtype)
        routers = config.layers.count("F")
        self.routes_BLK = torch.empty(batch, routers, config.top_k, device=device, dtype=torch.int16)
        self.documents = Documents.from_lengths([1] * batch, device)
        # Made here, since what a capture makes is only filled by its replay.
        _ = self.documents.index_T, self.documents.positions_T, self.documents.lengths_N
        self.fill([], [])

    def fill(self, rows: Sequence[PoolRow], ids: Sequence[int]) -> None:
        """Name the rows and their tokens; the only numbers that go from the host to the device.

        RuntimeError where a row's next token has no page of its own; ValueError where rows do not fit the bucket.
        """
        if len(rows) > self.batch or len({row.slot for row in rows}) < len(rows):
            raise ValueError(f"{len(rows)} rows, each only once, do not fit into a step of {self.batch}")
        scratch_page = self.pool.allocator.num_pages
        lines = []
        for row, id in zip(rows, ids, strict=True):
            self._check_page(row)
            table = row.table[: self.pages]
            lines.append([id, row.slot, row.length, *table, *[scratch_page] * (self.pages - len(table))])
        nobody = [0, self.pool.num_slots, 0, *[scratch_page] * self.pages]
        lines += [nobody] * (self.batch - len(rows))
        self.inputs_BX.copy_(torch.tensor(lines, dtype=torch.int64))

    def _check_page(self, row: PoolRow) -> None:
        if not self.pool.pages_matter:
            return
        place = row.length // PAGE
        if place >= self.pages:
            raise ValueError(f"{row.length + 1} tokens do not fit on the {self.pages} pages of this step")
        if place >= len(row.table):
            raise RuntimeError(f"{row.length + 1} tokens do not fit on {len(row.table)} pages: call ensure first")
        if self.pool.allocator.count(row.table[place]) > 1:
            raise RuntimeError(f"a page about to be written at {row.length} is shared: call ensure first")

    def __call__(self) -> None:
        """Read one token for each row: states and pages advance, `logits_BV` and `routes_BLK` are filled."""
        pool, slots_B = self.pool, self.inputs_BX[:, 1]
        conv_BX, scan_BX = pool.conv_SX[slots_B], pool.scan_SX[slots_B]
        output = self.model(self.inputs_BX[:, 0], self.documents, self._view(conv_BX, scan_BX))
        pool.conv_SX[slots_B] = conv_BX
        pool.scan_SX[slots_B] = scan_BX
        self.logits_BV.copy_(self.model.logits(output.hidden_TD))
        if output.routes:
            self.routes_BLK.copy_(torch.stack(output.routes, 1))

    def _view(self, conv_BX: Tensor, scan_BX: Tensor) -> StaticView:
        pool, lengths_B, pages_BP = self.pool, self.inputs_BX[:, 2], self.inputs_BX[:, COLUMNS:]
        layers: list[KeyValues | MambaState | SelectiveState | None] = [None] * len(pool.config.layers)
        for place in pool.layout.scans:
            kind = MambaState if place.kind == "M" else SelectiveState
            layers[place.sublayer] = kind(place.conv.of(conv_BX), place.scan.of(scan_BX))
        if pool.pages_matter:
            beyond_BS = torch.arange(self.pages * PAGE, device=pool.device) > lengths_B[:, None]
            for sublayer, keys, values in zip(pool.layout.attention, pool.keys, pool.values, strict=True):
                layers[sublayer] = StaticKeyValues(keys, values, pages_BP, beyond_BS)
        # A copy, since the model counts its token in it.
        return StaticView(tuple(layers), lengths_B.clone(), max(self.pages * PAGE, 1) - 1)
