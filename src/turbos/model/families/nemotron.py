"""The `nemotron_h` family (Nemotron-H, Nemotron 3 Nano): any order of sublayers, each with its own norm.

Loads in transformers, vLLM, SGLang, llama.cpp and mlx-lm. Layers are written as `hybrid_override_pattern` alone, which
all of them read. `dt` is never clamped here; transformers clamps it from below by `time_step_min` in prefill only, so
that is written too small to matter. transformers never ties this family's head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families.fields import layer_letters, must_be, number
from turbos.model.families.names import TensorName, attention_names, mamba_names

PATTERN = {"M": "M", "*": "A", "E": "F", "-": "D"}
"""Letters of `hybrid_override_pattern` and ours."""

NO_CLAMP = 1e-30
"""`time_step_min` that clamps nothing: softplus is larger wherever it matters."""

# Another value of these computes something else.
_HONOURED = {
    **{"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "tie_word_embeddings": False},
    **{"use_bias": False, "mlp_bias": False, "attention_bias": False, "mamba_proj_bias": False, "use_conv_bias": True},
    **{"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_latent_size": None},
    **{"num_nextn_predict_layers": 0, "sliding_window": None},
}
# Names of older configurations that transformers still reads.
_OLDER = {
    **{"mamba_n_groups": "n_groups", "mamba_d_conv": "conv_kernel", "mamba_chunk_size": "chunk_size"},
    **{"mamba_conv_bias": "use_conv_bias", "attention_head_dim": "head_dim"},
}


def obstacles(config: ModelConfig) -> Iterator[str]:
    """What Nemotron's files cannot say, one line each."""
    if "S" in config.layers:
        yield "layers: Mamba-1 (S) cannot be expressed"
    if config.tied:
        yield "tied must be false"
    if set("FD") & set(config.layers) and config.activation != "relu2":
        yield "activation must be relu2"
    if "A" in config.layers:
        yield from _attention_obstacles(config)
    if "F" in config.layers:
        yield from _expert_obstacles(config)
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        if getattr(config, name) != 1.0:
            yield f"{name} cannot be expressed"


def _attention_obstacles(config: ModelConfig) -> Iterator[str]:
    if config.qk_norm:
        yield "qk_norm cannot be expressed"
    if config.rope_theta is not None:
        yield "rope_theta must be null, attention has no positions"
    if config.attention_multiplier is not None:
        yield "attention_multiplier must be null (head_dim ** -0.5)"


def _expert_obstacles(config: ModelConfig) -> Iterator[str]:
    if config.router != "sigmoid":
        yield "router must be sigmoid"
    elif config.bias_update == "off":
        yield "bias_update must be freeze or update: the files' selection bias always acts"
    if not config.shared_expert_size:
        yield "shared_expert_size must be above 0"
    if config.num_experts < 2:
        yield "num_experts must be at least 2"


def to_files(config: ModelConfig) -> dict[str, object]:
    """config.json in Nemotron's names."""
    letters = {ours: theirs for theirs, ours in PATTERN.items()}
    return {
        "model_type": "nemotron_h",
        "architectures": ["NemotronHForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": len(config.layers),
        "hybrid_override_pattern": "".join(letters[letter] for letter in config.layers),
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": False,
        "sliding_window": None,
        "max_position_embeddings": config.max_positions,
        "mamba_num_heads": config.mamba_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "n_groups": config.mamba_groups,
        "ssm_state_size": config.mamba_state,
        "conv_kernel": config.conv_kernel,
        "chunk_size": config.chunk_size,
        "expand": max(1, config.mamba_inner // config.hidden_size),
        "mamba_hidden_act": "silu",
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",
        "use_conv_bias": True,
        "use_bias": False,
        "time_step_min": NO_CLAMP,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "intermediate_size": config.ffn_size,
        "mlp_hidden_act": "relu2",
        "mlp_bias": False,
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.top_k,
        "moe_intermediate_size": config.expert_size,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": config.shared_expert_size,
        "norm_topk_prob": config.router_normalise,
        "routed_scaling_factor": config.router_scale,
        "n_group": 1,
        "topk_group": 1,
        "layer_norm_epsilon": config.norm_eps,
        "norm_eps": config.norm_eps,
        "residual_in_fp32": False,
        "tie_word_embeddings": False,
    }


def from_files(files: Mapping[str, Any]) -> ModelConfig:
    """The configuration that a Nemotron config.json describes; `UserError` for an option that we would not honour."""
    files = {**{name: files[older] for older, name in _OLDER.items() if older in files}, **files}
    for problem in _not_honoured(files):
        raise UserError(problem)
    heads = files.get("num_attention_heads", 32)
    return ModelConfig(
        vocab_size=files["vocab_size"],
        hidden_size=files["hidden_size"],
        layers=_layers(files),
        num_heads=heads,
        num_kv_heads=files.get("num_key_value_heads", 8) or heads,
        head_dim=files.get("head_dim", 128),
        mamba_heads=files.get("mamba_num_heads", 128),
        mamba_head_dim=files.get("mamba_head_dim", 64),
        mamba_state=files.get("ssm_state_size", 128),
        mamba_groups=files.get("n_groups", 8),
        conv_kernel=files.get("conv_kernel", 4),
        chunk_size=files.get("chunk_size", 128),
        ffn_size=files.get("intermediate_size", 21504),
        num_experts=files.get("n_routed_experts", 8),
        top_k=files.get("num_experts_per_tok", 2),
        expert_size=files.get("moe_intermediate_size", 7688),
        shared_expert_size=files.get("moe_shared_expert_intermediate_size", 7688),
        activation="relu2",
        router="sigmoid",
        router_normalise=files.get("norm_topk_prob", True),
        router_scale=files.get("routed_scaling_factor", 1.0),
        aux_loss=0.0,
        z_loss=0.0,
        bias_update="freeze",
        norm_eps=files.get("layer_norm_epsilon", 1e-5),
        tied=False,
        max_positions=files.get("max_position_embeddings", 4096),
    )


def _not_honoured(files: Mapping[str, Any]) -> Iterator[str]:
    """Options of the file whose value would make us compute something else than the family does."""
    yield from must_be(files, _HONOURED)
    if "F" in _layers(files) and not files.get("moe_shared_expert_intermediate_size", 7688):
        yield "moe_shared_expert_intermediate_size 0: only experts beside a shared one are computed here"
    if [number(limit) for limit in files.get("time_step_limit") or (0, "inf")] != [0.0, float("inf")]:
        yield f"time_step_limit {files['time_step_limit']}: dt is never clamped here, only [0, inf] can be honoured"


def _layers(files: Mapping[str, Any]) -> str:
    """Our letters; transformers' list of kinds comes before the pattern where a file has both."""
    for field in ("layers_block_type", "layer_types"):
        if files.get(field) is not None:
            return layer_letters(files[field], field, "MAFD")
    for place, letter in enumerate(files["hybrid_override_pattern"]):
        if letter not in PATTERN:
            raise UserError(f"hybrid_override_pattern[{place}]: layer kind {letter!r} is none of {' '.join(PATTERN)}")
    return "".join(PATTERN[letter] for letter in files["hybrid_override_pattern"])


def tensor_names(config: ModelConfig) -> list[TensorName]:
    """File names as released Nemotron checkpoints have them (experts one by one)."""
    names = [
        TensorName("embed_weight", "backbone.embeddings.weight"),
        TensorName("norm_weight", "backbone.norm_f.weight"),
        TensorName("untied_head_weight", "lm_head.weight"),
    ]
    for index, kind in enumerate(config.layers):
        ours, theirs = f"sublayers.{index}", f"backbone.layers.{index}"
        names.append(TensorName(f"{ours}.norm_weight", f"{theirs}.norm.weight"))
        names.extend(_mixer_names(kind, f"{ours}.mixer", f"{theirs}.mixer", config))
    return names


def _mixer_names(kind: str, ours: str, theirs: str, config: ModelConfig) -> Iterator[TensorName]:
    if kind == "M":
        yield from mamba_names(ours, theirs, config.conv_channels)
    elif kind == "A":
        yield from attention_names(ours, theirs)
    elif kind == "F":
        yield TensorName(f"{ours}.router_weight", f"{theirs}.gate.weight")
        yield TensorName(f"{ours}.selection_bias", f"{theirs}.gate.e_score_correction_bias")
        yield TensorName(f"{ours}.shared.w_in.weight", f"{theirs}.shared_experts.up_proj.weight")
        yield TensorName(f"{ours}.shared.w_out.weight", f"{theirs}.shared_experts.down_proj.weight")
        up, down = (config.expert_size, config.hidden_size), (config.hidden_size, config.expert_size)
        for expert in range(config.num_experts):
            part = (expert, config.num_experts)
            yield TensorName(f"{ours}.w_in", f"{theirs}.experts.{expert}.up_proj.weight", up, part)
            yield TensorName(f"{ours}.w_out", f"{theirs}.experts.{expert}.down_proj.weight", down, part)
    else:
        yield TensorName(f"{ours}.w_in.weight", f"{theirs}.up_proj.weight")
        yield TensorName(f"{ours}.w_out.weight", f"{theirs}.down_proj.weight")
