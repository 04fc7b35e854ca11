"""The `granitemoehybrid` family (Granite 4.0-H): pairs of a mixer (M or A) and a feed-forward (F, or D throughout).

Loads in transformers, vLLM, SGLang and llama.cpp. Training options that Granite's config has no name for are kept under
a `turbos` key, which the others ignore.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families.names import TensorName

_TRAINING_OPTIONS = ("z_loss", "init_std", "ffn_size", "num_experts", "expert_size", "top_k", "bias_update")
_KINDS = {"mamba": "M", "linear_attention": "M", "attention": "A", "full_attention": "A"}


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
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
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
        **({} if config.rope_theta is None else {"rope_parameters": rope, "rope_theta": config.rope_theta}),
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
        "dtype": "float32",
        "turbos": {name: getattr(config, name) for name in _TRAINING_OPTIONS},
    }


def from_files(files: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Granite config.json describes; `UserError` for an option that we would not honour."""
    for problem in _not_honoured(files):
        raise UserError(problem)
    dense = not files.get("num_local_experts")
    kinds = [_KINDS[kind] for kind in files["layer_types"]]
    heads = files["num_attention_heads"]
    multiplier = files.get("attention_multiplier", 1.0)
    experts = {} if dense else {"num_experts": files["num_local_experts"], "top_k": files["num_experts_per_tok"]}
    feed = "ffn_size" if dense else "shared_expert_size"
    options = {**files.get("turbos", {}), **experts, feed: files["shared_intermediate_size"]}
    return ModelConfig(
        vocab_size=files["vocab_size"],
        hidden_size=files["hidden_size"],
        layers="".join(kind + ("D" if dense else "F") for kind in kinds),
        num_heads=heads,
        num_kv_heads=files.get("num_key_value_heads") or heads,
        head_dim=files["hidden_size"] // heads,
        rope_theta=_rope_theta(files),
        max_positions=files["max_position_embeddings"],
        attention_multiplier=None if multiplier == (files["hidden_size"] // heads) ** -0.5 else multiplier,
        mamba_heads=files["mamba_n_heads"],
        mamba_head_dim=files["mamba_expand"] * files["hidden_size"] // files["mamba_n_heads"],
        mamba_groups=files["mamba_n_groups"],
        mamba_state=files["mamba_d_state"],
        conv_kernel=files["mamba_d_conv"],
        chunk_size=files["mamba_chunk_size"],
        norm_eps=files["rms_norm_eps"],
        tied=files.get("tie_word_embeddings", False),
        aux_loss=files.get("router_aux_loss_coef", 0.001),
        embedding_multiplier=files.get("embedding_multiplier", 1.0),
        residual_multiplier=files.get("residual_multiplier", 1.0),
        logits_scaling=files.get("logits_scaling", 1.0),
        **{"expert_size": files["intermediate_size"], **options},
    )


def _not_honoured(files: Mapping[str, Any]) -> Iterator[str]:
    """Options of the file whose value would make us compute something else than the family does."""
    if files.get("hidden_act", "silu") not in ("silu", "swish"):
        yield f"hidden_act {files['hidden_act']!r}: only silu is computed here"
    if [_number(limit) for limit in files.get("time_step_limit") or (0, "inf")] != [0.0, float("inf")]:
        yield f"time_step_limit {files['time_step_limit']}: dt is never clamped here, only [0, inf] can be honoured"
    if (files.get("rope_parameters") or {}).get("rope_type", "default") != "default":
        yield f"rope_type {files['rope_parameters']['rope_type']!r}: only default rotary positions are computed here"
    if files.get("attention_bias") or files.get("mamba_proj_bias") or not files.get("mamba_conv_bias", True):
        yield "attention_bias, mamba_proj_bias, no mamba_conv_bias: here projections have no bias, the convolution has"
    inner = files["mamba_expand"] * files["hidden_size"]
    if files.get("mamba_d_head", "auto") not in ("auto", inner // files["mamba_n_heads"]):
        yield f"mamba_d_head {files['mamba_d_head']} contradicts mamba_expand * hidden_size / mamba_n_heads"


def _number(value: Any) -> float:
    """A number of a config.json; transformers writes infinity as `{"__float__": "Infinity"}`."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _rope_theta(files: Mapping[str, Any]) -> float | None:
    if files.get("position_embedding_type") != "rope":
        return None
    return float((files.get("rope_parameters") or files).get("rope_theta", 10000.0))


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
        yield TensorName(f"{ours}.conv_weight", f"{theirs}.mamba.conv1d.weight", (config.conv_channels, 1, -1))
        yield TensorName(f"{ours}.conv_bias", f"{theirs}.mamba.conv1d.bias")
        yield TensorName(f"{ours}.norm_weight", f"{theirs}.mamba.norm.weight")
        for name in ("in_proj.weight", "dt_bias", "A_log", "D", "out_proj.weight"):
            yield TensorName(f"{ours}.{name}", f"{theirs}.mamba.{name}")
    elif kind == "A":
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield TensorName(f"{ours}.{name}.weight", f"{theirs}.self_attn.{name}.weight")
    elif kind == "F":
        yield TensorName(f"{ours}.router_weight", f"{theirs}.block_sparse_moe.router.layer.weight")
        yield TensorName(f"{ours}.w_in", f"{theirs}.block_sparse_moe.input_linear.weight")
        yield TensorName(f"{ours}.w_out", f"{theirs}.block_sparse_moe.output_linear.weight")
        yield TensorName(f"{ours}.shared.w_in.weight", f"{theirs}.shared_mlp.input_linear.weight")
        yield TensorName(f"{ours}.shared.w_out.weight", f"{theirs}.shared_mlp.output_linear.weight")
    else:
        yield TensorName(f"{ours}.w_in.weight", f"{theirs}.shared_mlp.input_linear.weight")
        yield TensorName(f"{ours}.w_out.weight", f"{theirs}.shared_mlp.output_linear.weight")
