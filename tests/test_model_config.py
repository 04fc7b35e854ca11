"""Configurations: layer strings, and every impossible combination refused in one line that names the option."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from model_cases import tiny_config, tiny_model
from turbos.common.errors import UserError
from turbos.model.config import ModelConfig, expand_layers
from turbos.model.families import family_of
from turbos.model.lm import LanguageModel
from turbos.model.parameters import parameter_spec, parameter_table


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("MF", "MF"),
        ("(MF)*3AF", "MFMFMFAF"),
        ("MF(AF)*1", "MFAF"),
        ("((MF)*2A)*2D", "MFMFAMFMFAD"),
        ("(M)*0A", "A"),
        (" (MF)*2 AF ", "MFMFAF"),
        ("(MF)*12", "MF" * 12),
        ("((MF)*8AF)*7MF", ("MF" * 8 + "AF") * 7 + "MF"),
    ],
)
def test_layer_strings_expand(text: str, expanded: str) -> None:
    assert expand_layers(text) == expanded == ModelConfig(vocab_size=8, hidden_size=8, layers=text).layers


@pytest.mark.parametrize(
    "layers",
    [
        "",
        "  ",
        "(MF)*0",
        "X",
        "MFx",
        "mf",
        "M-F",
        "(MF",
        "MF)",
        "(MF)3",
        "(MF)*",
        "()*3",
        "(MF)*-1",
        "M,F",
        "MF\nAF",
        "(MF)*2.5",
    ],
)
def test_impossible_layers_are_refused(layers: str) -> None:
    with pytest.raises(UserError, match="layers") as caught:
        tiny_config(layers)
    assert "\n" not in str(caught.value)


IMPOSSIBLE: list[tuple[str, dict[str, object]]] = [
    ("vocab_size", {"vocab_size": 0}),
    ("hidden_size", {"hidden_size": -1}),
    ("ffn_size", {"ffn_size": 0}),
    ("max_positions", {"max_positions": 0}),
    ("num_kv_heads", {"num_heads": 4, "num_kv_heads": 3}),
    ("num_kv_heads", {"num_heads": 4, "num_kv_heads": 0}),
    ("num_kv_heads", {"num_heads": 2, "num_kv_heads": 4}),
    ("num_heads", {"num_heads": 0}),
    ("num_heads", {"num_heads": -4}),
    ("head_dim", {"head_dim": 0}),
    ("head_dim", {"head_dim": 5, "rope_theta": 1e4}),
    ("head_dim", {"head_dim": 2, "rope_theta": 1e4}),
    ("rope_theta", {"rope_theta": 0.0}),
    ("rope_theta", {"rope_theta": -1e4}),
    ("rope_alpha", {"rope_theta": 1e4, "rope_alpha": 0.0}),
    ("mamba_groups", {"mamba_heads": 4, "mamba_groups": 3}),
    ("mamba_groups", {"mamba_groups": 0}),
    ("mamba_heads", {"mamba_heads": 0}),
    ("mamba_head_dim", {"mamba_head_dim": 0}),
    ("mamba_state", {"mamba_state": 0}),
    ("mamba1_inner", {"mamba1_inner": 0}),
    ("mamba1_state", {"mamba1_state": -1}),
    ("dt_rank", {"mamba1_dt_rank": 0}),
    ("conv_kernel", {"conv_kernel": 1}),
    ("conv_kernel", {"conv_kernel": 0}),
    ("chunk_size", {"chunk_size": 0}),
    ("capacity_factor", {"capacity_factor": 0.9}),
    ("capacity_factor", {"capacity_factor": 0.0}),
    ("capacity_factor", {"capacity_factor": float("nan")}),
    ("capacity_factor", {"capacity_factor": float("inf")}),
    ("top_k", {"top_k": 0}),
    ("top_k", {"top_k": 6}),
    ("num_experts", {"num_experts": 0}),
    ("expert_size", {"expert_size": 0}),
    ("shared_expert_size", {"shared_expert_size": -1}),
    ("bias_update", {"bias_update": "update"}),
    ("bias_update", {"bias_update": "freeze", "router": "softmax"}),
    ("bias_update", {"bias_update": "on", "router": "sigmoid"}),
    ("activation", {"activation": "gelu"}),
    ("router", {"router": "hash"}),
    ("norm_eps", {"norm_eps": -1e-5}),
    ("logits_scaling", {"logits_scaling": 0.0}),
    ("logits_scaling", {"logits_scaling": float("nan")}),
    ("init_std", {"init_std": -0.1}),
]


@pytest.mark.parametrize(("option", "changes"), IMPOSSIBLE, ids=lambda value: str(value))
def test_impossible_combinations_name_the_option(option: str, changes: dict[str, object]) -> None:
    with pytest.raises(UserError, match=option) as caught:
        tiny_config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("rope_alpha", {"rope_alpha": 50.0}),
        ("router_scale", {"router_scale": 2.5}),
        ("router_normalise", {"router_normalise": False}),
    ],
)
def test_an_option_that_nothing_reads_is_refused(option: str, changes: dict[str, object]) -> None:
    # NoPE has no alpha, and the softmax router neither scale nor a choice of normalisation.
    with pytest.raises(UserError, match=option):
        tiny_config(**changes)


def test_sizes_of_absent_kinds_do_not_matter() -> None:
    assert tiny_config("MF", num_heads=4, num_kv_heads=3).layers == "MF"
    assert tiny_config("AF", mamba_heads=4, mamba_groups=3, mamba1_inner=0, conv_kernel=0).layers == "AF"
    assert tiny_config("MA", mamba1_state=0, capacity_factor=0.0).layers == "MA"
    assert tiny_config("MA", top_k=9).layers == "MA"


def test_the_rank_of_dt_is_a_sixteenth_of_the_width_unless_told() -> None:
    assert [tiny_config("S", hidden_size=size, mamba1_dt_rank=None).dt_rank for size in (1, 16, 17, 256)] == [
        *(1, 1, 2, 16)
    ]
    assert tiny_config("S", mamba1_dt_rank=7).dt_rank == 7


def test_mamba1_begins_as_its_reference_does() -> None:
    mixer = LanguageModel(tiny_config("S", hidden_size=64)).init_weights(0).sublayers[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 6.0).expand(14, 5))
    dt = torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert (mixer.D == 1).all() and dt.min() >= 0.999e-3 and dt.max() <= 0.1001 and dt.std() > 0.01
    assert 0.5 * 3**-0.5 < mixer.dt_proj.weight.abs().max() <= 3**-0.5


def test_configurations_are_frozen_and_compare_by_value() -> None:
    config = tiny_config("(MF)*2")
    assert config == tiny_config("MFMF") and hash(config) == hash(tiny_config("MFMF"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3  # type: ignore[misc]


GRANITE = {"mamba_heads": 4, "mamba_head_dim": 6}


@pytest.mark.parametrize(
    ("family", "layers", "changes"),
    [
        ("granitemoehybrid", "MFAF", GRANITE),
        ("granitemoehybrid", "MDAD", GRANITE),
        ("granitemoehybrid", "MFAF", {**GRANITE, "rope_theta": 1e4, "tied": False}),
        ("turbos", "SFAF", GRANITE),
        ("turbos", "SDAD", GRANITE),
        ("granitemoehybrid", "MFAF", {**GRANITE, "capacity_factor": 1.5}),
        ("nemotron_h", "MAMA", {"tied": False}),
        ("turbos", "MASA", {"tied": False}),
        ("turbos", "MFAD", GRANITE),
        ("turbos", "MFA", GRANITE),
        ("turbos", "FMFA", GRANITE),
        ("turbos", "MAF", GRANITE),
        ("turbos", "MFAF", {**GRANITE, "qk_norm": True}),
        ("turbos", "MFAF", {**GRANITE, "activation": "relu2"}),
        ("turbos", "MFAF", {**GRANITE, "router": "sigmoid"}),
        ("turbos", "MFAF", {**GRANITE, "shared_expert_size": 0}),
        ("turbos", "MFAF", {**GRANITE, "rope_theta": 1e4, "rope_alpha": 50.0}),
        ("turbos", "MFAF", {**GRANITE, "head_dim": 8}),
        ("turbos", "MFAF", {"mamba_heads": 4, "mamba_head_dim": 5}),
    ],
    ids=str,
)
def test_the_family_is_decided_by_the_configuration(family: str, layers: str, changes: dict[str, object]) -> None:
    assert family_of(tiny_config(layers, **changes)).name == family


def test_every_parameter_is_in_the_table_and_filled() -> None:
    for changes in ({}, {"tied": False, "qk_norm": True, "router": "sigmoid", "activation": "relu2"}):
        model = tiny_model(**changes)
        table = parameter_table(model)
        assert [spec.name for spec in table] == [name for name, _ in model.named_parameters()]
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    with pytest.raises(KeyError, match="surprise"):
        parameter_spec("sublayers.0.mixer.surprise")
