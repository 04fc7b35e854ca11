"""A tiny tokenizer and model that several tests share: made in milliseconds, good for nothing but testing."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from turbos.model.checkpoint import save_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer


@cache
def tiny_tokenizer() -> Tokenizer:
    """Bytes and a few pairs."""
    return Tokenizer.train(["gcd of 12 and 18? 18-12=6 12-6=6 6 add 12 and 34"] * 3, vocab_size=320)


def tiny_model(seed: int = 0, layers: str = "MFAF") -> LanguageModel:
    """Random weights, large enough logits that samples differ from greedy ones."""
    config = ModelConfig(
        vocab_size=tiny_tokenizer().vocab_size,
        hidden_size=32,
        layers=layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        mamba_heads=4,
        mamba_head_dim=16,
        mamba_state=16,
        num_experts=4,
        top_k=2,
        expert_size=32,
        shared_expert_size=32,
        init_std=0.1,
    )
    return LanguageModel(config).init_weights(seed)


def save_tiny(directory: Path, seed: int = 0) -> Path:
    """A checkpoint directory with model and tokenizer."""
    directory.mkdir(parents=True)
    save_model(tiny_model(seed), directory)
    tiny_tokenizer().save(directory)
    return directory
