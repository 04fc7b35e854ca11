"""Granite-family files in transformers and back: the same logits on both sides, for many shapes and options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_cases import VOCABULARY, logits_of, random_tokens, tiny_model
from turbos.common.errors import UserError
from turbos.model.checkpoint import load_model, save_model

transformers = pytest.importorskip("transformers")

CASES: dict[str, dict[str, object]] = {
    "mixed": {"layers": "MFAFMFMF"},
    "three groups": {"layers": "MFAF", "mamba_heads": 6, "mamba_head_dim": 4, "mamba_groups": 3},
    "one group, wide mamba": {"layers": "MFAF", "mamba_heads": 8, "mamba_groups": 1, "mamba_state": 7},
    "multipliers": {
        "layers": "AFMF",
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 3.0,
    },
    "rope": {"layers": "AFMFAF", "rope_theta": 10000.0},
    "rope, other base": {"layers": "AFAF", "rope_theta": 500.0},
    "untied": {"layers": "MFAF", "tied": False},
    "dense": {"layers": "MDADMD", "ffn_size": 40},
    "dense, untied, rope": {"layers": "ADMD", "tied": False, "rope_theta": 10000.0},
    "mamba only": {"layers": "MFMF"},
    "attention only": {"layers": "AFAF", "num_kv_heads": 1},
    "top-1 of many": {"layers": "MFAF", "num_experts": 9, "top_k": 1},
    "all experts": {"layers": "MFAF", "num_experts": 3, "top_k": 3, "num_kv_heads": 4},
    "kernel 3, other epsilon": {"layers": "MFAF", "conv_kernel": 3, "norm_eps": 1e-3, "chunk_size": 8},
}


def peer_logits(directory: Path, tokens: Tensor) -> Tensor:
    """Logits that transformers computes from a checkpoint directory."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest logit."""
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_our_files_give_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    model = tiny_model(seed=3, **CASES[name])
    save_model(model, tmp_path)
    tokens = random_tokens(45, seed=1)
    assert_same(logits_of(model, tokens, [45]), peer_logits(tmp_path, tokens))


def peer_config(**changes: object):  # type: ignore[no-untyped-def]
    """A small Granite configuration of transformers' own making."""
    options = {
        "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 12, "shared_intermediate_size": 8,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 5,
        "num_experts_per_tok": 2, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 6,
        "mamba_d_state": 5, "mamba_n_groups": 2, "mamba_expand": 1, "mamba_chunk_size": 16, "initializer_range": 0.2,
        "attention_multiplier": 0.3, "max_position_embeddings": 128,
    }  # fmt: skip
    return transformers.GraniteMoeHybridConfig(**{**options, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True, "embedding_multiplier": 4.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
        {"position_embedding_type": "rope"},
        {"position_embedding_type": "rope", "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"num_local_experts": 0, "num_experts_per_tok": 0},
        {"layer_types": ["linear_attention", "full_attention", "linear_attention"], "mamba_expand": 2},
    ],
    ids=str,
)
def test_files_of_transformers_load_here(changes: dict[str, object], tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = transformers.GraniteMoeHybridForCausalLM(peer_config(**changes)).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    peer.save_pretrained(tmp_path)
    tokens = random_tokens(45, seed=2)
    with torch.no_grad():
        theirs = peer(tokens[None], use_cache=False).logits[0]
    model = load_model(tmp_path)
    assert_same(logits_of(model, tokens, [45]), theirs)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, again)
    assert_same(peer_logits(again, tokens), theirs)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden_act", "gelu"),
        ("time_step_limit", [0.01, 0.1]),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
        ("mamba_d_head", 3),
    ],
)
def test_what_we_would_compute_otherwise_is_refused(option: str, value: object, tmp_path: Path) -> None:
    save_model(tiny_model("MFAF", rope_theta=10000.0), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), option: value}))
    with pytest.raises(UserError, match=option.split("_")[0]):
        load_model(tmp_path)


def test_a_sharded_checkpoint_loads_or_says_so(tmp_path: Path) -> None:
    peer = transformers.GraniteMoeHybridForCausalLM(peer_config()).eval()
    peer.save_pretrained(tmp_path, max_shard_size="10KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    try:
        model = load_model(tmp_path)
    except UserError as error:
        text = str(error).replace(str(tmp_path), "")
        assert "index" in text or "shard" in text
        return
    tokens = random_tokens(20)
    with torch.no_grad():
        assert_same(logits_of(model, tokens, [20]), peer(tokens[None], use_cache=False).logits[0])
