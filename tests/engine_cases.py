"""What the tests of the engine's memory share: pools with poisoned memory, and reading through a view.

Not a test file.

>>> from model_cases import tiny_config
>>> poisoned_pool(tiny_config("MA"), 2, 3).keys[0].isnan().all().item()
True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbos.common.records import Documents
from turbos.engine.pool import PoolRow, StatePool
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState

LAYERS = ("MFAFMDSDAD", "MFMF", "ADAD", "SD", "DF")
"""Both Mambas, attention, experts and dense layers; without attention; without a scan; without either."""


def poisoned_pool(config: ModelConfig, num_slots: int, num_pages: int, dtype: torch.dtype = torch.float32) -> StatePool:
    """A pool whose memory is NaN wherever nothing was written."""
    pool = StatePool(config, num_slots, num_pages, dtype=dtype)
    for tensor in (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values):
        tensor.fill_(torch.nan)
    return pool


def started(pool: StatePool) -> PoolRow:
    """A new row; the test's pool must have one."""
    row = pool.new_row()
    assert row is not None
    return row


def read(model: LanguageModel, pool: StatePool, rows: Sequence[PoolRow], pieces: Sequence[Tensor]) -> Tensor:
    """Hidden states of one piece of tokens per row, continuing the rows."""
    for row, piece in zip(rows, pieces, strict=True):
        assert pool.ensure(row, row.length + len(piece))
    with torch.no_grad(), pool.view(rows) as state:
        return model(torch.cat(list(pieces)), Documents.from_lengths([len(piece) for piece in pieces]), state).hidden_TD


def read_plainly(model: LanguageModel, pieces: Sequence[Tensor], max_len: int = 400) -> tuple[Tensor, HybridState]:
    """Hidden states of one sequence read in pieces through the contiguous state: the truth."""
    state = HybridState.alloc(model.config, 1, max_len, dtype=model.embed_weight.dtype)
    with torch.no_grad():
        hidden = [model(piece, Documents.from_lengths([len(piece)]), state).hidden_TD for piece in pieces]
    return torch.cat(hidden), state


def keys_of(pool: StatePool, row: PoolRow) -> list[Tensor]:
    """Keys and values of a row, `[length, K, E]` each, copied from its pages."""
    return [tensor[row.table].flatten(0, 1)[: row.length] for tensor in (*pool.keys, *pool.values)]
