"""Families: which one a configuration gets, what config.json says, what is refused and where it is named.

Beside transformers itself they stand in test_families_transformers.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from family_cases import FAMILIES, random_config, stored_tensors
from model_cases import logits_of, random_tokens, tiny_config, tiny_model
from turbos.common.errors import UserError
from turbos.model.checkpoint import load_config, load_model, save_model, stored_dtypes
from turbos.model.config import ModelConfig, expand_layers
from turbos.model.describe import describe
from turbos.model.families import family_by_type, family_of
from turbos.model.lm import LanguageModel

NEMOTRON = {"activation": "relu2", "router": "sigmoid", "bias_update": "freeze", "tied": False}

CHOICES: list[tuple[str, dict[str, object]]] = [
    ("llama", {"layers": "ADAD", "rope_theta": 1e4, "head_dim": 8}),
    ("granitemoehybrid", {"layers": "ADAD"}),
    ("granitemoehybrid", {"layers": "ADAD", "rope_theta": 1e4, "logits_scaling": 2.0}),
    ("granitemoehybrid", {"layers": "MFAF"}),
    ("nemotron_h", {"layers": "MFA", **NEMOTRON}),
    ("nemotron_h", {"layers": "FMDAA", **NEMOTRON}),
    ("nemotron_h", {"layers": "MAM", "tied": False}),
    ("turbos", {"layers": "FMDAA", **NEMOTRON, "tied": True}),
    ("turbos", {"layers": "MFA", **NEMOTRON, "bias_update": "off"}),
    ("turbos", {"layers": "MFA", **NEMOTRON, "rope_theta": 1e4}),
    ("turbos", {"layers": "MFAF", "qk_norm": True}),
    ("turbos", {"layers": "MFAD"}),
]


@pytest.mark.parametrize(("family", "changes"), CHOICES, ids=str)
def test_the_configuration_decides(family: str, changes: dict[str, object]) -> None:
    assert family_of(tiny_config(**changes)).name == family


@pytest.mark.parametrize(
    ("family", "changes", "option"),
    [
        ("llama", {"rope_theta": None}, "rope_theta"),
        ("llama", {"rope_alpha": 2.0}, "rope_alpha"),
        ("llama", {"residual_multiplier": 0.5}, "residual_multiplier"),
        ("llama", {"attention_multiplier": 0.3}, "attention_multiplier"),
        ("llama", {"activation": "relu2"}, "activation"),
        ("llama", {"layers": "AMAD"}, "layers"),
        ("nemotron_h", {"tied": True}, "tied"),
        ("nemotron_h", {"shared_expert_size": 0}, "shared_expert_size"),
        ("nemotron_h", {"router": "softmax", "bias_update": "off"}, "router"),
        ("nemotron_h", {"embedding_multiplier": 2.0}, "embedding_multiplier"),
        ("nemotron_h", {"rope_theta": 1e4}, "rope_theta"),
        ("nemotron_h", {"num_experts": 1, "top_k": 1}, "num_experts"),
        ("granitemoehybrid", {"activation": "relu2"}, "activation"),
        ("granitemoehybrid", {"head_dim": 32}, "head_dim"),
    ],
)
def test_what_a_family_cannot_say_is_named(family: str, changes: dict[str, object], option: str) -> None:
    base = random_config(family, seed=3)
    if family == "nemotron_h":
        changes = {"router_normalise": True, "router_scale": 1.0, **changes}
    reasons = family_by_type(family, "here").obstacles(replace(base, **changes))  # type: ignore[arg-type]
    assert [reason for reason in reasons if option in reason], reasons
    assert family_by_type(family, "here").obstacles(base) == []


def test_llama_keeps_halves_of_the_input_matrix_apart(tmp_path: Path) -> None:
    model = tiny_model("AD", rope_theta=1e4)
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    both = torch.cat([stored[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(both, model.sublayers[1].mixer.w_in.weight)


def test_nemotron_config_is_what_others_want(tmp_path: Path) -> None:
    save_model(tiny_model("MFAD", **NEMOTRON), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["hybrid_override_pattern"] == "ME*-" and "layers_block_type" not in config
    assert config["time_step_min"] == 1e-30 and config["architectures"] == ["NemotronHForCausalLM"]
    names = stored_tensors(tmp_path)
    assert list(names["backbone.layers.1.mixer.experts.4.up_proj.weight"].shape) == [12, 24]
    assert "backbone.layers.1.mixer.gate.e_score_correction_bias" in names


def test_granite_layer_kinds_are_written_as_llama_cpp_reads_them(tmp_path: Path) -> None:
    save_model(tiny_model("MFAF"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["layer_types"] == ["mamba", "attention"]


def write_config(path: Path, **changes: object) -> None:
    """Change fields of a config.json; None removes one."""
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


SPELLINGS: list[tuple[str, dict[str, object]]] = [
    ("granitemoehybrid", {"layer_types": ["linear_attention", "full_attention"]}),
    ("granitemoehybrid", {"layer_types": None, "layers_block_type": ["mamba", "attention"]}),
    ("granitemoehybrid", {"num_local_experts": 5, "time_step_limit": [0.0, {"__float__": "Infinity"}]}),
    ("granitemoehybrid", {"mamba_d_head": "auto", "num_key_value_heads": 2, "rope_scaling": None}),
    ("nemotron_h", {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "moe", "attention", "mlp"]}),
    (
        "nemotron_h",
        {"hybrid_override_pattern": None, "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    ),
    ("nemotron_h", {"head_dim": None, "attention_head_dim": 6, "conv_kernel": None, "mamba_d_conv": 4}),
    ("nemotron_h", {"time_step_limit": [0.0, float("inf")], "time_step_min": 0.001, "partial_rotary_factor": 1.0}),
    ("llama", {"rope_parameters": None}),
    ("llama", {"rope_theta": None}),
    ("llama", {"head_dim": None, "rope_scaling": None}),
    ("llama", {"rope_theta": 500.0, "rope_parameters": {"rope_type": "default"}}),
    (
        "llama",
        {"rope_theta": 77.0, "rope_parameters": None, "rope_scaling": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    ("nemotron_h", {"layer_norm_epsilon": None, "norm_eps": 0.1}),
]
MODELS: dict[str, dict[str, object]] = {
    "granitemoehybrid": {"layers": "MFAF"},
    "nemotron_h": {"layers": "MFAD", **NEMOTRON},
    "llama": {"layers": "ADAD", "rope_theta": 500.0},
}


@pytest.mark.parametrize(("family", "changes"), SPELLINGS, ids=str)
def test_other_spellings_mean_the_same(family: str, changes: dict[str, object], tmp_path: Path) -> None:
    model = tiny_model(**MODELS[family])
    save_model(model, tmp_path)
    write_config(tmp_path / "config.json", **changes)
    tokens = random_tokens(20)
    assert torch.equal(logits_of(load_model(tmp_path), tokens, [20]), logits_of(model, tokens, [20]))


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, "rope_type 'llama3'"),
        ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear'"),
        ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor"),
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("granitemoehybrid", {"layer_types": ["mamba", "sliding"]}, r"layer_types\[1\]: layer kind 'sliding'"),
        ("granitemoehybrid", {"mamba_conv_bias": False}, "mamba_conv_bias"),
        ("granitemoehybrid", {"normalization_function": "layernorm"}, "normalization_function"),
        ("granitemoehybrid", {"shared_intermediate_size": 0}, "shared_intermediate_size 0"),
        ("granitemoehybrid", {"turbos": {"momentum": 1}}, "momentum"),
        ("granitemoehybrid", {"turbos": {"hidden_size": 48}}, "turbos.hidden_size: 48 contradicts"),
        ("granitemoehybrid", {"turbos": [1]}, "turbos"),
        ("nemotron_h", {"hybrid_override_pattern": "ME*X"}, r"hybrid_override_pattern\[3\]: layer kind 'X'"),
        ("nemotron_h", {"layers_block_type": ["mamba", "moe", "window", "mlp"]}, r"layers_block_type\[2\]"),
        ("nemotron_h", {"n_group": 2}, "n_group"),
        ("nemotron_h", {"n_shared_experts": 2}, "n_shared_experts"),
        ("nemotron_h", {"moe_latent_size": 12}, "moe_latent_size"),
        ("nemotron_h", {"moe_shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size 0"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ("nemotron_h", {"time_step_limit": [0.001, 0.1]}, "time_step_limit"),
        ("nemotron_h", {"use_bias": True}, "use_bias"),
        ("nemotron_h", {"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ("nemotron_h", {"tie_word_embeddings": True}, "tie_word_embeddings"),
    ],
)
def test_what_we_would_compute_otherwise_is_refused(
    family: str, changes: dict[str, object], said: str, tmp_path: Path
) -> None:
    save_model(tiny_model(**MODELS[family]), tmp_path)
    write_config(tmp_path / "config.json", **changes)
    with pytest.raises(UserError, match=said) as caught:
        load_model(tmp_path)
    assert str(caught.value).startswith(str(tmp_path / "config.json")) and "\n" not in str(caught.value)


GRANITE_TINY = {
    **{"model_type": "granitemoehybrid", "architectures": ["GraniteMoeHybridForCausalLM"], "attention_bias": False},
    **{"attention_dropout": 0.0, "attention_multiplier": 0.0078125, "bos_token_id": 100257, "embedding_multiplier": 12},
    **{"eos_token_id": 100257, "hidden_act": "silu", "hidden_size": 1536, "init_method": "mup", "logits_scaling": 6},
    **{"initializer_range": 0.1, "intermediate_size": 512, "mamba_chunk_size": 256, "mamba_conv_bias": True},
    "layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4,
    **{"mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1},
    **{"mamba_n_heads": 48, "mamba_proj_bias": False, "max_position_embeddings": 131072, "num_attention_heads": 12},
    **{"normalization_function": "rmsnorm", "num_experts_per_tok": 6, "num_hidden_layers": 40, "use_cache": True},
    **{"num_key_value_heads": 4, "num_local_experts": 64, "output_router_logits": False, "pad_token_id": 100256},
    **{"position_embedding_type": "nope", "residual_multiplier": 0.22, "rms_norm_eps": 1e-5, "rope_scaling": None},
    **{"rope_theta": 10000, "router_aux_loss_coef": 0.01, "shared_intermediate_size": 1024, "vocab_size": 100352},
    **{"tie_word_embeddings": True, "torch_dtype": "bfloat16"},
}
GRANITE_MICRO = {
    **GRANITE_TINY,
    **{"num_local_experts": 0, "num_experts_per_tok": 0, "hidden_size": 2048, "shared_intermediate_size": 8192},
    **{"mamba_n_heads": 64, "num_attention_heads": 32, "num_key_value_heads": 8, "attention_multiplier": 0.015625},
}
NEMOTRON_NANO = {
    **{"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], "attention_bias": False, "expand": 2},
    **{"auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}, "chunk_size": 128, "conv_kernel": 4},
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    **{"head_dim": 128, "hidden_dropout": 0.0, "hidden_size": 2688, "intermediate_size": 1856, "n_group": 1},
    **{"layer_norm_epsilon": 1e-5, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 64},
    **{"mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144},
    **{"mlp_bias": False, "mlp_hidden_act": "relu2", "moe_intermediate_size": 1856, "n_groups": 8, "norm_eps": 1e-5},
    **{"moe_shared_expert_intermediate_size": 3712, "n_routed_experts": 128, "n_shared_experts": 1, "topk_group": 1},
    **{"norm_topk_prob": True, "num_attention_heads": 32, "num_experts_per_tok": 6, "num_hidden_layers": 52},
    **{"num_key_value_heads": 2, "num_logits_to_keep": 1, "partial_rotary_factor": 1.0, "residual_in_fp32": False},
    **{"rescale_prenorm_residual": True, "rope_theta": 10000, "routed_scaling_factor": 2.5, "sliding_window": None},
    **{"ssm_state_size": 128, "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_max": 0.1},
    **{"time_step_limit": [0.0, float("inf")], "time_step_min": 0.001, "torch_dtype": "bfloat16", "use_bias": False},
    **{"use_cache": True, "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072},
}


@pytest.mark.parametrize(
    ("files", "layers", "total", "active"),
    [
        (GRANITE_TINY, "(MFMFMFMFMFAFMFMFMFMF)*4", 6.9e9, 1.5e9),
        (GRANITE_MICRO, "(MDMDMDMDMDADMDMDMDMD)*4", 3.2e9, 3.2e9),
        (NEMOTRON_NANO, "(MFMFMA)(FMFMFMA)*4(FMFMFMFMA)FMFMFMFMF", 31.6e9, 3.6e9),
    ],
    ids=["granite tiny", "granite micro", "nemotron nano"],
)
def test_released_shapes_are_read_whole(
    files: dict[str, object], layers: str, total: float, active: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(files))
    config = load_config(tmp_path)
    assert config.layers == expand_layers(layers).replace("(", "").replace(")", "")
    counts = describe(config)
    assert abs(counts.total_params / total - 1) < 0.02 and abs(counts.active_params / active - 1) < 0.1
    family = family_of(config)
    assert family.name == files["model_type"] and family.read_config(family.config_json(config)) == config
    with torch.device("meta"):
        state = LanguageModel(config).state_dict()
    stored = sum(name.place(state[name.ours]).numel() for name in family.tensor_names(config))
    assert stored == sum(tensor.numel() for tensor in state.values())


def change_tensors(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite the one weights file."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


EXPERT = "backbone.layers.1.mixer.experts.2.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop(EXPERT), f"{EXPERT} is missing"),
        (lambda tensors: tensors.update({EXPERT: tensors[EXPERT].T.contiguous()}), rf"{EXPERT} is \[12, 24\]"),
        (lambda tensors: tensors[EXPERT].view(-1)[3].fill_(float("nan")), f"{EXPERT} holds NaN"),
        (lambda tensors: tensors.update({EXPERT: tensors[EXPERT].to(torch.float8_e4m3fn)}), f"{EXPERT} holds F8_E4M3"),
        (lambda tensors: tensors.update({EXPERT.replace("2", "7"): tensors[EXPERT].clone()}), "no place for tensor"),
    ],
)
def test_one_expert_of_many_is_named(
    change: Callable[[dict[str, torch.Tensor]], object], said: str, tmp_path: Path
) -> None:
    save_model(tiny_model("MFAD", **NEMOTRON), tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(UserError, match=said) as caught:
        load_model(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def sharded(tmp_path: Path) -> Path:
    """A checkpoint in several files; returns its index."""
    save_model(tiny_model("MFAF"), tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2 and not (tmp_path / "model.safetensors").exists()
    return tmp_path / "model.safetensors.index.json"


def test_shards_are_written_read_and_counted(tmp_path: Path) -> None:
    index = json.loads(sharded(tmp_path).read_text())
    tensors = stored_tensors(tmp_path)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    tokens = random_tokens(20)
    assert torch.equal(logits_of(load_model(tmp_path), tokens, [20]), logits_of(tiny_model("MFAF"), tokens, [20]))


def test_broken_shards_are_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    good, content = index.read_text(), json.loads(index.read_text())
    name, shard = next(iter(content["weight_map"].items()))
    last = max(content["weight_map"].values())
    for change, said in (
        ({**content["weight_map"], "model.extra": shard}, "model.extra is missing"),
        ({**content["weight_map"], name: "model-9.safetensors"}, r"model-9\.safetensors: no such file"),
        ({}, "names no tensors"),
        ([1], "not an index"),
    ):
        index.write_text(json.dumps({"weight_map": change}))
        with pytest.raises(UserError, match=said):
            load_model(tmp_path)
    index.write_text(good)
    (tmp_path / last).write_bytes((tmp_path / last).read_bytes()[:50])
    with pytest.raises(UserError, match=f"{last}: broken safetensors file"):
        load_model(tmp_path)


def test_bf16_files_come_back_as_they_were(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    save_model(tiny_model("MFAD", **NEMOTRON).to(torch.bfloat16), first)
    assert json.loads((first / "config.json").read_text())["dtype"] == "bfloat16"
    model = load_model(first)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    save_model(model, second, dtypes=stored_dtypes(first))
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@st.composite
def configurations(draw: st.DrawFn) -> ModelConfig:
    """Any configuration: one of a family, or one that only our own files express."""
    family = draw(st.sampled_from([*FAMILIES, "turbos"]))
    if family != "turbos":
        return random_config(family, draw(st.integers(0, 10_000)))
    return tiny_config(
        draw(st.text("MAFD", min_size=1, max_size=6)),
        tied=draw(st.booleans()),
        rope_theta=draw(st.sampled_from([None, 1e4])),
        qk_norm=draw(st.booleans()),
        activation=draw(st.sampled_from(["swiglu", "relu2"])),
        router="sigmoid",
        bias_update=draw(st.sampled_from(["off", "freeze", "update"])),
        shared_expert_size=draw(st.sampled_from([0, 8])),
        z_loss=draw(st.sampled_from([0.0, 0.25])),
    )


@settings(max_examples=40, deadline=None)
@given(config=configurations(), seed=st.integers(0, 99))
def test_saving_and_loading_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, config: ModelConfig, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("saved")
    model: LanguageModel = tiny_model(seed=seed, **vars(config))
    save_model(model, folder)
    assert load_config(folder) == config
    loaded, tokens = load_model(folder), random_tokens(17, seed)
    assert torch.equal(logits_of(loaded, tokens, [9, 8]), logits_of(model, tokens, [9, 8]))
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs), name
