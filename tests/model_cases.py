"""What the tests of the model share: tiny configurations, models whose weights are large enough to matter, token rows.

Not a test file. Weights are drawn larger than the training init, so that every sublayer moves the residual stream and a
mistake in any of them shows in the logits.

>>> tiny_config("MF", top_k=1).layers
'MF'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel

VOCABULARY = 61

BASE = ModelConfig(
    vocab_size=VOCABULARY,
    hidden_size=24,
    layers="MFAFMDSDAD",
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mamba_heads=4,
    mamba_head_dim=6,
    mamba_state=5,
    mamba_groups=2,
    mamba1_inner=14,
    mamba1_state=5,
    mamba1_dt_rank=3,
    chunk_size=16,
    ffn_size=32,
    num_experts=5,
    top_k=2,
    expert_size=12,
    shared_expert_size=8,
    init_std=0.2,
    max_positions=512,
)

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "rope, qk norm": {"rope_theta": 10000.0, "rope_alpha": 50.0, "qk_norm": True},
    "sigmoid, relu2": {"router": "sigmoid", "activation": "relu2", "bias_update": "update", "router_scale": 1.5},
    "multipliers, untied": {
        "tied": False,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.0,
    },
    "one group, no shared expert": {"mamba_groups": 1, "shared_expert_size": 0, "conv_kernel": 3},
}
"""Options that change what the model computes, by name."""


def tiny_config(layers: str | None = None, **changes: object) -> ModelConfig:
    """The base configuration with some fields changed."""
    return replace(BASE, **({} if layers is None else {"layers": layers}), **changes)  # type: ignore[arg-type]


def tiny_model(
    layers: str | None = None, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> LanguageModel:
    """A model with random weights everywhere, norms and selection biases included."""
    model = LanguageModel(tiny_config(layers, **changes)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm_weight") or name.endswith("conv_bias") or name.endswith(".D"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif name.endswith("dt_bias"):
                parameter += 2.0
        for buffer in model.buffers():
            buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
    return model.to(dtype)


def random_tokens(count: int, seed: int = 0) -> Tensor:
    """Token ids of the tiny vocabulary."""
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def logits_of(model: LanguageModel, tokens_T: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits of packed documents, without a state."""
    with torch.no_grad():
        return model.logits(model(tokens_T, Documents.from_lengths(lengths)).hidden_TD)


TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Largest difference allowed, relative to the largest logit."""
