"""Counts of a model: by hand for a tiny one, and the report's 560B shape from its preset."""

from __future__ import annotations

import pytest
import torch

from model_cases import VARIANTS, tiny_config, tiny_model
from turbos.common.config import load_recipe
from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.model.state import HybridState


@pytest.mark.parametrize("variant", VARIANTS)
def test_totals_are_those_of_the_real_model(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    assert describe(model.config).total_params == sum(parameter.numel() for parameter in model.parameters())


def test_active_parameters_by_hand() -> None:
    config = tiny_config("MFF", num_experts=8, top_k=3)
    total, active = describe(config).total_params, describe(config).active_params
    expert = 3 * config.expert_size * config.hidden_size
    assert total - active == 2 * (8 - 3) * expert
    dense = tiny_config("MD")
    assert describe(dense).total_params == describe(dense).active_params


@pytest.mark.parametrize("tied", [True, False])
def test_flops_by_hand(tied: bool) -> None:
    config = tiny_config("D", tied=tied)
    matrices = 3 * config.ffn_size * config.hidden_size + config.vocab_size * config.hidden_size
    norms = 2 * config.hidden_size
    assert describe(config).flops_per_token == 2 * (matrices + norms)
    scan = describe(tiny_config("M")).flops_per_token - 2 * describe(tiny_config("M")).active_params
    assert scan == 5 * config.mamba_inner * config.mamba_state
    scan = describe(tiny_config("S")).flops_per_token - 2 * describe(tiny_config("S")).active_params
    assert scan == 5 * 14 * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_state_bytes_are_those_of_the_real_state(dtype: torch.dtype) -> None:
    config = tiny_config("MAMFSADS")
    counts = describe(config, bytes_per_number=dtype.itemsize)
    for length in (1, 100):
        state = HybridState.alloc(config, 1, length, dtype=dtype)
        assert state.nbytes == counts.state_bytes + length * counts.kv_bytes_per_token
    assert describe(tiny_config("MF")).kv_bytes_per_token == 0 and describe(tiny_config("AD")).state_bytes == 0


def test_the_report_shape_costs_what_the_report_says() -> None:
    config = load_recipe(ModelConfig, "model", "turbos-560b")
    assert [config.layers.count(kind) for kind in "MAF"] == [57, 7, 64] and len(config.layers) == 128
    # Pairs of a mixer and experts, from which alone these counts close.
    assert set(config.layers[0::2]) == set("MA") and set(config.layers[1::2]) == {"F"}
    counts = describe(config)
    assert abs(counts.total_params - 559e9) <= 1e9
    assert abs(counts.active_params - 57e9) <= 1e9
    assert counts.kv_bytes_per_token == 17920
    assert counts.state_bytes == pytest.approx(149e6, rel=0.05)
    # Forward pass: two per active parameter, and a scan that adds little.
    assert 2.0 <= counts.flops_per_token / counts.active_params < 2.05


def test_the_report_shape_against_its_attention_twin() -> None:
    config = load_recipe(ModelConfig, "model", "turbos-560b", ["--layers", "(AF)*64"])
    assert describe(config).kv_bytes_per_token == pytest.approx(163.8e3, rel=1e-3)
    assert describe(config).state_bytes == 0
