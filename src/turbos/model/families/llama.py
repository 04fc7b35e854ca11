"""The `llama` family (SmolLM2 and its kin): attention and a dense SwiGLU feed-forward throughout, rotary positions.

Everything loads it. It is the attention twin of a hybrid model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families.fields import must_be, rope_fields, rope_obstacles, rope_theta
from turbos.model.families.names import TensorName, attention_names


def obstacles(config: ModelConfig) -> Iterator[str]:
    """What Llama's files cannot say, one line each."""
    if len(config.layers) % 2 or set(config.layers[0::2]) != {"A"} or set(config.layers[1::2]) != {"D"}:
        yield "layers must be A + D throughout"
        return
    if config.activation != "swiglu":
        yield "activation must be swiglu"
    if config.qk_norm:
        yield "qk_norm cannot be expressed"
    if config.rope_theta is None:
        yield "rope_theta must be set, there is no NoPE"
    if config.rope_alpha != 1.0:
        yield "rope_alpha cannot be expressed"
    if config.attention_multiplier is not None:
        yield "attention_multiplier must be null (head_dim ** -0.5)"
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        if getattr(config, name) != 1.0:
            yield f"{name} cannot be expressed"
    if config.hidden_size % config.num_heads:
        yield "hidden_size must be a multiple of num_heads"


def to_files(config: ModelConfig) -> dict[str, object]:
    """config.json in Llama's names."""
    assert config.rope_theta is not None
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers) // 2,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        **rope_fields(config.rope_theta),
        "max_position_embeddings": config.max_positions,
        "intermediate_size": config.ffn_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def from_files(files: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Llama config.json describes; `UserError` for an option that we would not honour."""
    for problem in [*must_be(files, {"attention_bias": False, "mlp_bias": False}), *rope_obstacles(files)]:
        raise UserError(problem)
    if files.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"hidden_act {files['hidden_act']!r}: only silu is computed here")
    heads = files["num_attention_heads"]
    return ModelConfig(
        vocab_size=files["vocab_size"],
        hidden_size=files["hidden_size"],
        layers="AD" * files["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=files.get("num_key_value_heads") or heads,
        head_dim=files.get("head_dim") or files["hidden_size"] // heads,
        rope_theta=rope_theta(files),
        ffn_size=files["intermediate_size"],
        norm_eps=files.get("rms_norm_eps", 1e-6),
        tied=files.get("tie_word_embeddings", False),
        max_positions=files.get("max_position_embeddings", 2048),
    )


def tensor_names(config: ModelConfig) -> list[TensorName]:
    """File names; gate and up are the halves of our one input matrix."""
    names = [TensorName("embed_weight", "model.embed_tokens.weight"), TensorName("norm_weight", "model.norm.weight")]
    if not config.tied:
        names.append(TensorName("untied_head_weight", "lm_head.weight"))
    for index, kind in enumerate(config.layers):
        ours, theirs = f"sublayers.{index}", f"model.layers.{index // 2}"
        norm = "post_attention_layernorm" if kind == "D" else "input_layernorm"
        names.append(TensorName(f"{ours}.norm_weight", f"{theirs}.{norm}.weight"))
        if kind == "A":
            names.extend(attention_names(f"{ours}.mixer", f"{theirs}.self_attn"))
            continue
        names.append(TensorName(f"{ours}.mixer.w_in.weight", f"{theirs}.mlp.gate_proj.weight", part=(0, 2)))
        names.append(TensorName(f"{ours}.mixer.w_in.weight", f"{theirs}.mlp.up_proj.weight", part=(1, 2)))
        names.append(TensorName(f"{ours}.mixer.w_out.weight", f"{theirs}.mlp.down_proj.weight"))
    return names
