"""Runs the model over rows of the pool: a piece of one prompt, or one token for each of many rows.

Prompts always go through the model itself. Single tokens go through the fused step where there is one, or through
static steps (CUDA graphs), else through the model too. Which of them runs is decided once, by the engine, and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from turbos.common.records import Documents
from turbos.engine.fused.support import MAX_BATCH
from turbos.engine.graphs import StaticSteps
from turbos.engine.pool import PoolRow, StatePool
from turbos.model.lm import LanguageModel, Output

if TYPE_CHECKING:
    from turbos.engine.fused.step import FusedStep, Stepped


@dataclass(frozen=True)
class Step:
    """Logits `[B, V]` after one token for each row, and its experts `[B, L, K]` where asked for."""

    logits_BV: Tensor
    routes_BLK: Tensor | None


@dataclass(frozen=True)
class Runner:
    """The model, its pool, and the fused step or the static steps if they run here."""

    model: LanguageModel
    pool: StatePool
    fused: FusedStep | None = None
    static: StaticSteps | None = None

    def read(self, row: PoolRow, ids: Sequence[int], want_routes: bool) -> tuple[Tensor, Tensor | None]:
        """Read a piece of a prompt into a row; the last token's hidden state `[D]` and experts `[n, L, K]`.

        The piece is alone in its call, so that its numbers do not depend on other requests.
        """
        output = self._forward([row], [len(ids)], ids)
        return output.hidden_TD[-1].clone(), routes_of(output) if want_routes else None

    def logits(self, hidden_D: Tensor) -> Tensor:
        """Logits `[1, V]` after a hidden state."""
        return self.model.logits(hidden_D[None])

    def step(self, rows: Sequence[PoolRow], ids: Sequence[int], want_routes: bool) -> Step:
        """Read one token for each row."""
        if self.static is not None and self.static.ready(rows):
            logits_BV, routes_BLK = self.static(rows, ids)
            return Step(logits_BV, routes_BLK if want_routes else None)
        if self.fused is None:
            output = self._forward(rows, [1] * len(rows), ids)
            return Step(self.model.logits(output.hidden_TD), routes_of(output) if want_routes else None)
        parts = [
            self._fused(self.fused, rows[start : start + MAX_BATCH], ids[start : start + MAX_BATCH], want_routes)
            for start in range(0, len(rows), MAX_BATCH)
        ]
        routes = [part.routes_BLK for part in parts if part.routes_BLK is not None]
        return Step(torch.cat([part.logits_BV for part in parts]), torch.cat(routes) if routes else None)

    def _fused(self, fused: FusedStep, rows: Sequence[PoolRow], ids: Sequence[int], want_routes: bool) -> Stepped:
        longest = max(len(row.table) for row in rows)
        stepped = fused(
            torch.tensor(list(ids)),
            torch.tensor([row.slot for row in rows]),
            torch.tensor([row.length for row in rows]),
            torch.tensor([[*row.table, *[0] * (longest - len(row.table))] for row in rows], dtype=torch.int32),
            want_routes,
        )
        for row in rows:
            row.length += 1
        return stepped

    def _forward(self, rows: Sequence[PoolRow], lengths: Sequence[int], ids: Sequence[int]) -> Output:
        device = self.model.embed_weight.device
        tokens_T = torch.tensor(list(ids), device=device)
        with self.pool.view(rows) as state:
            return self.model(tokens_T, Documents.from_lengths(lengths, device), state)


def routes_of(output: Output) -> Tensor | None:
    """Experts of each token, int16 `[T, L, K]`; None for a model without experts."""
    return torch.stack(output.routes, 1).to(torch.int16) if output.routes else None
