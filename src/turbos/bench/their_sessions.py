"""The same sequences in transformers' own model and cache: what their decoding is timed on.

A cache is kept as it is after the prompt; each timing goes on from a copy, which is not counted. Their `generate` does
the same calls and more around them, so what is measured here is the least that it takes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turbos.bench.sessions import NOISE, Sessions
from turbos.engine.pages import PAGE


class TheirSessions:
    """`batch` equal sequences after a prompt."""

    @torch.inference_mode()
    def __init__(self, model: nn.Module, prompt: Sequence[int], batch: int) -> None:
        """Read the prompt once in each row."""
        self._model, self.batch = model, batch
        tokens_BT = torch.tensor([list(prompt)] * batch)
        self.cache: Any = model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1).past_key_values

    @property
    def length(self) -> int:
        """Tokens read."""
        return int(self.cache.get_seq_length())

    @torch.inference_mode()
    def lengthen(self, length: int) -> None:
        """Put noise for keys and values in front of what was read, up to `length` tokens."""
        generator = torch.Generator().manual_seed(0)
        for layer in self._attention():
            for name in ("keys", "values"):
                own_BKSE = getattr(layer, name)
                shape = (*own_BKSE.shape[:2], length - own_BKSE.shape[2], own_BKSE.shape[3])
                noise_BKSE = torch.empty(shape).normal_(0.0, NOISE, generator=generator)
                setattr(layer, name, torch.cat([noise_BKSE, own_BKSE], dim=2))

    @torch.inference_mode()
    def logits(self, tokens_B: Tensor) -> Tensor:
        """Logits `[B, V]` after one token more for each sequence; the sequences stay as they are."""
        return self._step(tokens_B, copy.deepcopy(self.cache))[:, -1]

    @torch.inference_mode()
    def seconds(self, steps: int) -> float:
        """Seconds of `steps` greedy steps from a copy of the cache."""
        cache, tokens_B = copy.deepcopy(self.cache), torch.zeros(self.batch, dtype=torch.int64)
        start = time.perf_counter()
        for _ in range(steps):
            tokens_B = self._step(tokens_B, cache)[:, -1].argmax(-1)
        return time.perf_counter() - start

    def _step(self, tokens_B: Tensor, cache: Any) -> Tensor:
        logits: Tensor = self._model(input_ids=tokens_B[:, None], past_key_values=cache, use_cache=True).logits
        return logits

    def _attention(self) -> list[Any]:
        """Layers of the cache with keys and values: a hybrid's others have `keys` None or no such field."""
        from transformers.cache_utils import DynamicLayer

        return [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer)]

    def _scans(self) -> list[Any]:
        """Layers of the cache with conv inputs and a scan state."""
        from transformers.cache_utils import LinearAttentionLayer

        return [layer for layer in self.cache.layers if isinstance(layer, LinearAttentionLayer)]

    @torch.inference_mode()
    def hand_over(self, sessions: Sessions) -> None:
        """Make our sequences remember exactly what these do."""
        pool, length = sessions.pool, self.length
        slots_B = torch.tensor([row.slot for row in sessions.rows])
        for place, layer in zip(pool.layout.scans, self._scans(), strict=True):
            margin = place.conv.shape[0]
            conv_BKC = layer.conv_states[0][..., -margin:].transpose(1, 2)
            place.conv.of(pool.conv_SX)[slots_B] = conv_BKC
            place.scan.of(pool.scan_SX)[slots_B] = layer.recurrent_states[0].view(self.batch, *place.scan.shape)
        for name, pages in (("keys", pool.keys), ("values", pool.values)):
            for pages_GSKE, layer in zip(pages, self._attention(), strict=True):
                _copy_to_pages(getattr(layer, name).transpose(1, 2), pages_GSKE, sessions)
        for row in sessions.rows:
            row.length = length


def _copy_to_pages(x_BSKE: Tensor, pages_GSKE: Tensor, sessions: Sessions) -> None:
    for row, x_SKE in zip(sessions.rows, x_BSKE, strict=True):
        for page, piece_SKE in zip(row.table, x_SKE.split(PAGE), strict=False):
            pages_GSKE[page, : len(piece_SKE)] = piece_SKE
