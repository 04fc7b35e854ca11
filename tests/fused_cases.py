"""What the tests of the fused step share: a model and its pool, random configurations, and one way to advance rows.

Not a test file.

>>> random_config(3).layers == random_config(3).layers
True
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_cases import VOCABULARY
from turbos.common.records import Documents
from turbos.engine.fused.step import FusedStep, Stepped
from turbos.engine.fused.weights import Precision, pack
from turbos.engine.pool import PoolRow, StatePool
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState


@dataclass
class Fused:
    """A model, its pool, and the fused step over it."""

    model: LanguageModel
    pool: StatePool
    step: FusedStep

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        slots: int = 4,
        pages: int = 16,
        threads: int = 1,
        precision: Precision = "fp32",
    ) -> Fused:
        """A fresh pool whose memory is poisoned with NaN; with more threads, every phase uses them."""
        pool = StatePool(model.config, slots, pages)
        for tensor in (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values):
            tensor.fill_(float("nan"))
        packed = pack(model, precision)
        packed.round_to_packed(model)
        step = FusedStep(packed, pool, threads)
        step.built.sizes["threads_pay"] = 0
        for buffer in step.built.workspace.buffers:
            buffer.view(torch.float32).fill_(float("nan"))
        return cls(model, pool, step)

    def rows(self, count: int) -> list[PoolRow]:
        """Fresh rows."""
        rows = [self.pool.new_row() for _ in range(count)]
        return [row for row in rows if row is not None]

    def advance(self, rows: Sequence[PoolRow], tokens: Sequence[int], want_routes: bool = False) -> Stepped:
        """Read one token for each row."""
        for row in rows:
            assert self.pool.ensure(row, row.length + 1)
        longest = max(len(row.table) for row in rows)
        stepped = self.step(
            torch.tensor(list(tokens)),
            torch.tensor([row.slot for row in rows]),
            torch.tensor([row.length for row in rows]),
            torch.tensor([row.table + [0] * (longest - len(row.table)) for row in rows], dtype=torch.int32),
            want_routes,
        )
        for row in rows:
            row.length += 1
        return stepped


@torch.no_grad()
def truth(model: LanguageModel, tokens_BT: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits `[T, B, V]` of the plain model's one-token steps, in `dtype`."""
    own = model.embed_weight.dtype
    model = model.to(dtype)
    batch, length = tokens_BT.shape
    state = HybridState.alloc(model.config, batch, length, dtype=dtype)
    steps = []
    for tokens_B in tokens_BT.T:
        hidden_BD = model(tokens_B, Documents.from_lengths([1] * batch), state).hidden_TD
        steps.append(model.logits(hidden_BD))
    model.to(own)
    return torch.stack(steps)


def random_config(seed: int) -> ModelConfig:
    """A configuration of odd sizes with options drawn at random."""
    draw = random.Random(seed)
    groups, kv_heads = draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    softmax, rope = draw.random() < 0.5, draw.random() < 0.5
    experts = draw.randint(1, 9)
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=draw.randint(3, 70),
        layers="".join(draw.choice("MMAAFD") for _ in range(draw.randint(2, 6))),
        num_heads=kv_heads * draw.choice([1, 2, 3, 5]),
        num_kv_heads=kv_heads,
        head_dim=draw.choice([4, 6, 10, 16, 18, 34, 64, 70]) if rope else draw.choice([1, 3, 7, 16, 33, 65]),
        rope_theta=10000.0 if rope else None,
        rope_alpha=draw.choice([1.0, 50.0]) if rope else 1.0,
        qk_norm=draw.random() < 0.5,
        mamba_heads=groups * draw.choice([1, 2, 3]),
        mamba_head_dim=draw.choice([1, 3, 6, 8, 17, 32]),
        mamba_state=draw.choice([1, 5, 16, 24, 33]),
        mamba_groups=groups,
        conv_kernel=draw.choice([2, 3, 4, 5]),
        ffn_size=draw.randint(1, 70),
        num_experts=experts,
        top_k=draw.randint(1, experts),
        expert_size=draw.randint(1, 40),
        shared_expert_size=draw.choice([0, 7, 33]),
        activation=draw.choice(["swiglu", "relu2"]),
        router="softmax" if softmax else "sigmoid",
        router_normalise=softmax or draw.random() < 0.5,
        router_scale=1.0 if softmax else draw.choice([1.0, 2.5]),
        bias_update="off" if softmax else draw.choice(["off", "freeze"]),
        tied=draw.random() < 0.5,
        embedding_multiplier=draw.choice([1.0, 3.0]),
        attention_multiplier=draw.choice([None, 0.3]),
        residual_multiplier=draw.choice([1.0, 0.6]),
        logits_scaling=draw.choice([1.0, 2.0]),
        init_std=0.2,
        chunk_size=16,
        max_positions=8192,
    )
