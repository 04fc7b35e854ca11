"""What a model costs: parameters in all and per token, work per token, and bytes a running sequence holds.

Counted on the meta device, so that the report's 560B shape needs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.model.parameters import parameter_spec
from turbos.ops.moe import grouped_path


@dataclass(frozen=True)
class Description:
    """Counts of a model.

    `active_params` are the parameters that a token passes: routed experts count top_k of num_experts. `flops_per_token`
    is the forward pass at short context: 2 per active matrix parameter (the head once, the embedding look-up nothing)
    plus the scan's state update and read. `kv_bytes_per_token` grows with length (at `bytes_per_number`, default bf16);
    `state_bytes` is constant: conv rows at the same width and the fp32 scan state.
    `expert_product` says how fp32 experts are multiplied: `grouped_mm`, `loop` (one by one), or `none`.
    """

    layers: str
    total_params: int
    active_params: int
    flops_per_token: int
    kv_bytes_per_token: int
    state_bytes: int
    expert_product: str


def describe(config: ModelConfig, bytes_per_number: int = 2) -> Description:
    """Counts for a configuration, without allocating it."""
    with torch.device("meta"):
        model = LanguageModel(config)
    total = active = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        routed = parameter_spec(name).routed
        active += parameter.numel() * config.top_k // config.num_experts if routed else parameter.numel()
    mamba2, mamba1, attention = (config.layers.count(kind) for kind in "MSA")
    ssm_numbers = mamba2 * config.mamba_inner * config.mamba_state + mamba1 * config.mamba1_inner * config.mamba1_state
    conv_numbers = (config.conv_kernel - 1) * (mamba2 * config.conv_channels + mamba1 * config.mamba1_inner)
    multiplied = active - (0 if config.tied else model.embed_weight.numel())
    return Description(
        layers=config.layers,
        total_params=total,
        active_params=active,
        flops_per_token=2 * multiplied + 5 * ssm_numbers,
        kv_bytes_per_token=attention * 2 * config.num_kv_heads * config.head_dim * bytes_per_number,
        expert_product=_expert_product(config),
        state_bytes=4 * ssm_numbers + conv_numbers * bytes_per_number,
    )


def _expert_product(config: ModelConfig) -> str:
    if "F" not in config.layers:
        return "none"
    widths = ((config.hidden_size, config.expert_size), (config.expert_size, config.hidden_size))
    paths = {
        grouped_path(torch.empty(1, rows, device="meta"), torch.empty(1, rows, columns, device="meta"))
        for rows, columns in widths
    }
    return "loop" if "loop" in paths else "grouped_mm"
