"""Shapes that llama.cpp runs, by name: Granite's and Nemotron's, with odd sizes and every option that is written.

Not a test file.

>>> sorted(CASES)[:2]
['granite', 'granite, dense']
"""

from __future__ import annotations

from model_cases import tiny_model
from tiny import tiny_tokenizer
from turbos.model.lm import LanguageModel

_GRANITE: dict[str, object] = {"layers": "MFAFMFMF", "mamba_heads": 8, "mamba_head_dim": 6}
_NEMOTRON: dict[str, object] = {
    **{"layers": "MFAFMMFA", "activation": "relu2", "router": "sigmoid", "bias_update": "freeze", "tied": False},
    **{"mamba_heads": 4, "mamba_head_dim": 10, "head_dim": 5, "router_scale": 2.5},
}
CASES: dict[str, dict[str, object]] = {
    "granite": _GRANITE,
    "granite, dense": {**_GRANITE, "layers": "MDADMD"},
    "granite, wide": {
        **_GRANITE,
        **{"layers": "MFAF", "hidden_size": 32, "num_heads": 2, "head_dim": 16, "mamba_head_dim": 8, "mamba_state": 16},
        **{"expert_size": 32, "shared_expert_size": 32},
    },
    "granite, multipliers, untied": {
        **_GRANITE,
        **{"layers": "AFMFAF", "tied": False, "embedding_multiplier": 3.0, "attention_multiplier": 0.3},
        **{"residual_multiplier": 0.6, "logits_scaling": 2.0},
    },
    "granite, one group": {**_GRANITE, "mamba_groups": 1, "conv_kernel": 3, "top_k": 1, "num_experts": 9},
    "granite, eight groups": {**_GRANITE, "mamba_groups": 8, "conv_kernel": 2, "top_k": 3, "num_experts": 3},
    "nemotron": _NEMOTRON,
    "nemotron, dense": {**_NEMOTRON, "layers": "MDAMDD"},
    "nemotron, no normalisation": {**_NEMOTRON, "layers": "AFM", "router_normalise": False},
    "nemotron, odd": {**_NEMOTRON, "hidden_size": 33, "mamba_heads": 3, "mamba_groups": 3, "mamba_head_dim": 7},
}
"""Changes to the base configuration of `model_cases`."""


def gguf_model(name: str, seed: int = 1) -> LanguageModel:
    """A model of a case for the tiny tokenizer, with random weights everywhere."""
    return tiny_model(seed=seed, vocab_size=tiny_tokenizer().vocab_size, **CASES[name])
