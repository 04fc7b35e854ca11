"""Sequences of one length in a pool of their own, which the fused step continues: what decoding is timed on.

They have read a prompt, or their caches are filled with noise: what earlier tokens were makes no difference to the work
of the next. Pages are not shared, so that many sessions cost the memory traffic of many. Not an engine: nothing is
scheduled, and each next token is the likeliest.

    sessions = Sessions(config, packed, batch=8, longest=8192 + 40, threads=2)
    sessions.fill(8192)
    sessions.seconds(32)        # of 32 steps, each of 8 tokens; afterwards they are 8192 long again
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.common.records import Documents
from turbos.engine.config import SEGMENT
from turbos.engine.fused.step import FusedStep
from turbos.engine.fused.weights import PackedModel
from turbos.engine.layout import Layout
from turbos.engine.pool import PoolRow, StatePool
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel

NOISE = 0.5
"""Size of synthetic keys, values and states: attention then spreads over the whole cache."""


class Sessions:
    """`batch` sequences of at most `longest` tokens, and a fused step over them."""

    def __init__(self, config: ModelConfig, packed: PackedModel, batch: int, longest: int, threads: int) -> None:
        """Empty sequences with all their pages; memory is committed when they are filled."""
        self.config, self.batch, self.longest = config, batch, longest
        self.pool = StatePool(config, batch, batch * Layout.of(config).pages_for(longest))
        self.rows = [self._row(longest) for _ in range(batch)]
        self._step = FusedStep(packed, self.pool, threads)
        self._tables_BP = torch.tensor([row.table for row in self.rows], dtype=torch.int32)
        self._slots_B = torch.tensor([row.slot for row in self.rows])

    def _row(self, longest: int) -> PoolRow:
        row = self.pool.new_row()
        assert row is not None and self.pool.ensure(row, longest), "the pool was made for them"
        return row

    @torch.inference_mode()
    def read(self, model: LanguageModel, prompt: Sequence[int], segment: int = SEGMENT) -> None:
        """Let the first sequence read a prompt with the model itself, in segments."""
        for start in range(0, len(prompt), segment):
            self._read_piece(model, self.rows[0], prompt[start : start + segment])

    def take_over(self, other: Sessions) -> None:
        """Make every sequence a copy of the first one of others, which have the same model."""
        first, mine, theirs = other.rows[0], self.pool, other.pool
        pages = zip((*mine.keys, *mine.values), (*theirs.keys, *theirs.values), strict=True)
        for row in self.rows:
            mine.conv_SX[row.slot] = theirs.conv_SX[first.slot]
            mine.scan_SX[row.slot] = theirs.scan_SX[first.slot]
            row.length = first.length
        for target_GSKE, source_GSKE in pages:
            for row in self.rows:
                target_GSKE[row.table[: len(first.table)]] = source_GSKE[first.table]

    @torch.inference_mode()
    def read_one(self, model: LanguageModel, token: int) -> Tensor:
        """Logits `[V]` of the model itself after one token more of the first sequence, whose length stays."""
        row = self.rows[0]
        with self.pool.view([row]) as state:
            hidden_TD = model(torch.tensor([token]), Documents.from_lengths([1]), state).hidden_TD
        row.length -= 1
        return model.logits(hidden_TD)[0]

    def _read_piece(self, model: LanguageModel, row: PoolRow, piece: Sequence[int]) -> None:
        with self.pool.view([row]) as state:
            model(torch.tensor(list(piece)), Documents.from_lengths([len(piece)]), state)

    def fill(self, length: int) -> None:
        """Make every sequence `length` tokens long, with noise for what it remembers."""
        generator = torch.Generator().manual_seed(0)
        for flat_SX in (self.pool.conv_SX, self.pool.scan_SX):
            flat_SX.normal_(0.0, NOISE, generator=generator)
        for pages in (*self.pool.keys, *self.pool.values):
            # One page of noise, repeated: copying fills gigabytes in seconds, drawing them would take minutes.
            pages.copy_(torch.empty_like(pages[:1]).normal_(0.0, NOISE, generator=generator).expand_as(pages))
        for row in self.rows:
            row.length = length

    def step(self, tokens_B: Tensor, offset: int = 0) -> Tensor:
        """Logits `[B, V]` after one token for each of the first B sequences at its length + `offset`; lengths stay."""
        batch = len(tokens_B)
        positions = [row.length + offset for row in self.rows[:batch]]
        if max(positions) >= self.longest:
            raise UserError(f"bench: position {max(positions)} lies beyond the {self.longest} tokens of a session")
        slots_B, tables_BP = self._slots_B[:batch], self._tables_BP[:batch]
        return self._step(tokens_B, slots_B, torch.tensor(positions), tables_BP).logits_BV

    def seconds(self, steps: int, batch: int | None = None) -> float:
        """Seconds of `steps` greedy steps of the first `batch` sequences (None: all), whose lengths stay."""
        tokens_B = torch.zeros(batch or self.batch, dtype=torch.int64)
        start = time.perf_counter()
        for offset in range(steps):
            tokens_B = self.step(tokens_B, offset).argmax(-1)
        return time.perf_counter() - start

    @torch.inference_mode()
    def read_seconds(self, model: LanguageModel, segment: int = SEGMENT) -> float:
        """Seconds in which the model reads the last `segment` tokens of the first sequence's length."""
        row, length = self.rows[0], self.rows[0].length
        row.length = length - segment
        if row.length < 0:
            raise UserError(f"bench: a segment of {segment} tokens does not end at {length}")
        piece = [0] * segment
        start = time.perf_counter()
        self._read_piece(model, row, piece)
        return time.perf_counter() - start
