"""The `granitemoehybrid` family (Granite 4.0-H): pairs of a mixer (M or A) and a feed-forward (F, or D throughout).

Loads in transformers, vLLM, SGLang and llama.cpp. Both spellings of layer kinds are read; `attention` and `mamba` are
written, which everything reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families.fields import layer_letters, must_be, number, rope_fields, rope_obstacles, rope_theta
from turbos.model.families.names import TensorName, attention_names, mamba_names

# Another value of these computes something else.
_HONOURED = {
    **{"attention_bias": False, "mamba_proj_bias": False, "mamba_conv_bias": True},
    "normalization_function": "rmsnorm",
}


def obstacles(config: ModelConfig) -> Iterator[str]:
    """What Granite's files cannot say, one line each."""
    mixers, feeds = config.layers[0::2], config.layers[1::2]
    if len(config.layers) % 2 or not set(mixers) <= set("MA") or len(set(feeds)) != 1 or feeds[0] not in "FD":
        yield "layers must be pairs of (M or A) + F throughout, or (M or A) + D throughout"
        return
    if config.activation != "swiglu":
        yield "activation must be swiglu"
    if config.qk_norm:
        yield "qk_norm cannot be expressed"
    if feeds[0] == "F" and (config.router != "softmax" or not config.shared_expert_size):
        yield "experts need the softmax router and a shared expert"
    if config.rope_theta is not None and config.rope_alpha != 1.0:
        yield "rope_alpha cannot be expressed"
    if "A" in mixers and config.num_heads * config.head_dim != config.hidden_size:
        yield "num_heads * head_dim must equal hidden_size"
    if "M" in mixers and config.mamba_inner % config.hidden_size:
        yield "mamba_heads * mamba_head_dim must be a multiple of hidden_size"


def to_files(config: ModelConfig) -> dict[str, object]:
    """config.json in Granite's names."""
    dense = config.layers[1] == "D"
    mixers = config.layers[0::2]
    # Without Mamba sublayers the sizes say nothing, but the family's own check still wants them to agree.
    inner = config.mamba_inner if "M" in mixers else config.hidden_size
    heads = config.mamba_heads if "M" in mixers else 1
    return {
        "model_type": "granitemoehybrid",
        "architectures": ["GraniteMoeHybridForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(mixers),
        "layer_types": ["mamba" if kind == "M" else "attention" for kind in mixers],
        "num_attention_heads": config.num_heads if "A" in mixers else 1,
        "num_key_value_heads": config.num_kv_heads if "A" in mixers else 1,
        "attention_multiplier": config.attention_scale,
        "attention_bias": False,
        "position_embedding_type": "nope" if config.rope_theta is None else "rope",
        **({} if config.rope_theta is None else rope_fields(config.rope_theta)),
        "max_position_embeddings": config.max_positions,
        "mamba_n_heads": heads,
        "mamba_d_head": inner // heads,
        "mamba_expand": inner // config.hidden_size,
        "mamba_n_groups": config.mamba_groups,
        "mamba_d_state": config.mamba_state,
        "mamba_d_conv": config.conv_kernel,
        "mamba_chunk_size": config.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_local_experts": 0 if dense else config.num_experts,
        "num_experts_per_tok": 0 if dense else config.top_k,
        "intermediate_size": config.expert_size,
        "shared_intermediate_size": config.ffn_size if dense else config.shared_expert_size,
        "router_aux_loss_coef": config.aux_loss,
        "output_router_logits": False,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
    }


def from_files(files: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Granite config.json describes; `UserError` for an option that we would not honour."""
    for problem in _not_honoured(files):
        raise UserError(problem)
    hidden, heads, mamba_heads = files["hidden_size"], files["num_attention_heads"], files.get("mamba_n_heads", 128)
    dense = not files.get("num_local_experts", 8)
    experts = {} if dense else {"num_experts": files.get("num_local_experts", 8)}
    experts |= {} if dense else {"top_k": files.get("num_experts_per_tok", 2)}
    return ModelConfig(
        vocab_size=files["vocab_size"],
        hidden_size=hidden,
        layers="".join(letter + ("D" if dense else "F") for letter in _mixers(files)),
        num_heads=heads,
        num_kv_heads=files.get("num_key_value_heads") or heads,
        head_dim=hidden // heads,
        rope_theta=rope_theta(files) if files.get("position_embedding_type") == "rope" else None,
        max_positions=files.get("max_position_embeddings", 2048),
        attention_multiplier=files.get("attention_multiplier", 1.0),
        mamba_heads=mamba_heads,
        mamba_head_dim=files.get("mamba_expand", 2) * hidden // mamba_heads,
        mamba_groups=files.get("mamba_n_groups", 1),
        mamba_state=files.get("mamba_d_state", 256),
        conv_kernel=files.get("mamba_d_conv", 4),
        chunk_size=files.get("mamba_chunk_size", 256),
        norm_eps=files.get("rms_norm_eps", 1e-6),
        tied=files.get("tie_word_embeddings", False),
        aux_loss=files.get("router_aux_loss_coef", 0.001),
        embedding_multiplier=files.get("embedding_multiplier", 1.0),
        residual_multiplier=files.get("residual_multiplier", 1.0),
        logits_scaling=files.get("logits_scaling", 1.0),
        expert_size=files.get("intermediate_size", 11008),
        **{"ffn_size" if dense else "shared_expert_size": files.get("shared_intermediate_size", 1024)},
        **experts,
    )


def _mixers(files: Mapping[str, Any]) -> str:
    """`M` or `A` of each layer; without a list all are Mamba, as in transformers."""
    for field in ("layer_types", "layers_block_type"):
        if files.get(field) is not None:
            return layer_letters(files[field], field, "MA")
    return "M" * files["num_hidden_layers"]


def _not_honoured(files: Mapping[str, Any]) -> Iterator[str]:
    """Options of the file whose value would make us compute something else than the family does."""
    yield from must_be(files, _HONOURED)
    if files.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act {files['hidden_act']!r}: only silu is computed here"
    if [number(limit) for limit in files.get("time_step_limit") or (0, "inf")] != [0.0, float("inf")]:
        yield f"time_step_limit {files['time_step_limit']}: dt is never clamped here, only [0, inf] can be honoured"
    if files.get("num_local_experts", 8) and not files.get("shared_intermediate_size", 1024):
        yield "shared_intermediate_size 0: only experts beside a shared one are computed here"
    if files.get("position_embedding_type") == "rope":
        yield from rope_obstacles(files)
    inner = files.get("mamba_expand", 2) * files["hidden_size"]
    if files.get("mamba_d_head", "auto") not in ("auto", inner // files.get("mamba_n_heads", 128)):
        yield f"mamba_d_head {files['mamba_d_head']} contradicts mamba_expand * hidden_size / mamba_n_heads"


def tensor_names(config: ModelConfig) -> list[TensorName]:
    """File names as released Granite 4.0-H checkpoints have them (experts stacked)."""
    names = [TensorName("embed_weight", "model.embed_tokens.weight"), TensorName("norm_weight", "model.norm.weight")]
    if not config.tied:
        names.append(TensorName("untied_head_weight", "lm_head.weight"))
    for index, kind in enumerate(config.layers):
        ours, theirs = f"sublayers.{index}", f"model.layers.{index // 2}"
        norm = "post_attention_layernorm" if index % 2 else "input_layernorm"
        names.append(TensorName(f"{ours}.norm_weight", f"{theirs}.{norm}.weight"))
        names.extend(_mixer_names(kind, f"{ours}.mixer", theirs, config))
    return names


def _mixer_names(kind: str, ours: str, theirs: str, config: ModelConfig) -> Iterator[TensorName]:
    if kind == "M":
        yield from mamba_names(ours, f"{theirs}.mamba", config.conv_channels)
    elif kind == "A":
        yield from attention_names(ours, f"{theirs}.self_attn")
    elif kind == "F":
        yield TensorName(f"{ours}.router_weight", f"{theirs}.block_sparse_moe.router.layer.weight")
        yield TensorName(f"{ours}.w_in", f"{theirs}.block_sparse_moe.input_linear.weight")
        yield TensorName(f"{ours}.w_out", f"{theirs}.block_sparse_moe.output_linear.weight")
        yield TensorName(f"{ours}.shared.w_in.weight", f"{theirs}.shared_mlp.input_linear.weight")
        yield TensorName(f"{ours}.shared.w_out.weight", f"{theirs}.shared_mlp.output_linear.weight")
    else:
        yield TensorName(f"{ours}.w_in.weight", f"{theirs}.shared_mlp.input_linear.weight")
        yield TensorName(f"{ours}.w_out.weight", f"{theirs}.shared_mlp.output_linear.weight")
