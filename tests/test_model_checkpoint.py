"""Checkpoint files: what is saved comes back to the bit, and broken files are named in one line.

Transformers' side of the same files is in test_model_transformers.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model_cases import logits_of, random_tokens, tiny_model
from turbos.common.errors import UserError
from turbos.common.records import Documents
from turbos.model.checkpoint import load_config, load_model, save_model
from turbos.model.lm import LanguageModel
from turbos.model.parameters import parameter_table

EXPRESSIBLE: dict[str, dict[str, object]] = {
    "granite": {"layers": "MFAFMF"},
    "granite dense": {"layers": "MDADMD"},
    "granite, capacity": {"layers": "MFAF", "capacity_factor": 1.5},
    "granite, rope, untied": {"layers": "AFMF", "rope_theta": 5000.0, "tied": False},
    "granite, mamba only": {"layers": "MFMF", "mamba_groups": 1},
    "granite, attention only": {"layers": "AFAF", "num_kv_heads": 4},
    "turbos, mixed": {"layers": "MFAFMDAD", "qk_norm": True, "rope_theta": 1e4, "rope_alpha": 50.0},
    "turbos, sigmoid": {
        "layers": "MFAF",
        "router": "sigmoid",
        "bias_update": "update",
        "activation": "relu2",
        "shared_expert_size": 0,
    },
    "turbos, untied": {"layers": "FMDA", "tied": False},
    "turbos, Mamba-1": {"layers": "SFAF", "capacity_factor": 1.5},
    "turbos, Mamba-1 with a rank": {"layers": "SDMD", "mamba1_dt_rank": 5},
}


def save(path: Path, name: str = "granite", **changes: object) -> LanguageModel:
    """Save a tiny model of the named kind; returns it."""
    model = tiny_model(**{**EXPRESSIBLE[name], **changes})
    save_model(model, path)
    return model


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_logits_come_back_to_the_bit(name: str, tmp_path: Path) -> None:
    model = save(tmp_path, name)
    loaded = load_model(tmp_path)
    tokens = random_tokens(30)
    assert torch.equal(logits_of(loaded, tokens, [20, 10]), logits_of(model, tokens, [20, 10]))
    for (key, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert key == other and torch.equal(a, b) and a.dtype == b.dtype, key
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith(name.split()[0].strip(","))


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_saving_what_was_loaded_writes_the_same_files(name: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    save(first, name)
    save_model(load_model(first), second)
    assert (first / "config.json").read_text() == (second / "config.json").read_text()
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert load_config(first) == load_config(second) == load_model(second).config


@pytest.mark.parametrize("name", [name for name in EXPRESSIBLE if name.startswith("turbos")])
def test_native_files_keep_every_option(name: str, tmp_path: Path) -> None:
    model = save(
        tmp_path, name, aux_loss=0.03, z_loss=0.5, bias_rate=0.7, router_scale=1.25 if "sigmoid" in name else 1.0
    )
    assert load_config(tmp_path) == model.config


def test_granite_files_keep_the_training_options(tmp_path: Path) -> None:
    model = save(tmp_path, "granite", aux_loss=0.03, z_loss=0.5, init_std=0.07, norm_eps=1e-6, max_positions=77)
    assert load_config(tmp_path) == model.config


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    save(tmp_path, "turbos, mixed")
    model = load_model(tmp_path)
    model.logits(model(random_tokens(9), Documents.from_lengths([9])).hidden_TD).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_another_dtype_can_be_asked_for(tmp_path: Path) -> None:
    model = save(tmp_path, "granite")
    wide = load_model(tmp_path, torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    tokens = random_tokens(20)
    difference = (logits_of(wide, tokens, [20]) - logits_of(model, tokens, [20])).abs().max()
    assert float(difference) <= 1e-4


@pytest.mark.parametrize("name", ["granite", "turbos, sigmoid"])
def test_half_precision_keeps_what_the_table_declares_fp32(name: str, tmp_path: Path) -> None:
    save(tmp_path, name)
    model = load_model(tmp_path, torch.bfloat16)
    for spec, parameter in zip(parameter_table(model), model.parameters(), strict=True):
        assert parameter.dtype == (torch.float32 if spec.precision == "fp32" else torch.bfloat16), spec.name
    # A selection bias moves by thousandths: bf16 would lose its steps.
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    assert logits_of(model, random_tokens(20), [20]).isfinite().all()


def test_files_are_those_of_the_family(tmp_path: Path) -> None:
    save(tmp_path, "granite, rope, untied")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["layer_types"] == ["attention", "mamba"] and config["architectures"] == [
        "GraniteMoeHybridForCausalLM"
    ]
    assert config["attention_multiplier"] == pytest.approx(6**-0.5)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("model.layers.0.block_sparse_moe.input_linear.weight").get_shape() == [5, 24, 24]
        assert len(file.get_slice("model.layers.1.mamba.conv1d.weight").get_shape()) == 3
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= names


TENSOR = "model.layers.0.mamba.in_proj.weight"


def _change_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return apply


def _poison(value: float) -> Callable[[Path], None]:
    return _change_tensors(lambda tensors: tensors[TENSOR].view(-1)[5].fill_(value))


def _truncate(share: float) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[: int(len(content) * share)])

    return apply


BROKEN_WEIGHTS: list[tuple[str, Callable[[Path], None], tuple[str, ...]]] = [
    ("missing", _change_tensors(lambda t: t.pop(TENSOR)), (TENSOR, "missing")),
    ("surplus", _change_tensors(lambda t: t.update({"model.extra.weight": torch.ones(2)})), ("model.extra.weight",)),
    ("shape", _change_tensors(lambda t: t.update({TENSOR: t[TENSOR][:-1].clone()})), (TENSOR, r"\[")),
    ("transposed", _change_tensors(lambda t: t.update({TENSOR: t[TENSOR].T.contiguous()})), (TENSOR,)),
    ("nan", _poison(float("nan")), (TENSOR, "NaN")),
    ("infinity", _poison(float("-inf")), (TENSOR, "infinity")),
    ("integers", _change_tensors(lambda t: t.update({TENSOR: t[TENSOR].long()})), (TENSOR,)),
    ("half a file", _truncate(0.5), ()),
    ("half a header", _truncate(0.001), ()),
    ("an empty file", _truncate(0.0), ()),
    ("not safetensors", lambda path: (path / "model.safetensors").write_text("hello " * 99) and None, ()),
    ("no weights", lambda path: (path / "model.safetensors").unlink(), ()),
]


@pytest.mark.parametrize(("case", "harm", "words"), BROKEN_WEIGHTS, ids=[case[0] for case in BROKEN_WEIGHTS])
def test_broken_weights_name_file_and_tensor(
    case: str, harm: Callable[[Path], None], words: tuple[str, ...], tmp_path: Path
) -> None:
    save(tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=r"model\.safetensors") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    for word in words:
        assert caught.match(word)


def test_a_reshaped_conv_weight_of_the_wrong_layout_is_refused(tmp_path: Path) -> None:
    # Same number of elements, other axes: taking it would scramble the filter.
    save(tmp_path)
    name = "model.layers.0.mamba.conv1d.weight"
    _change_tensors(lambda t: t.update({name: t[name].permute(2, 1, 0).contiguous()}))(tmp_path)
    with pytest.raises(UserError, match=name):
        load_model(tmp_path)


def _edit(**changes: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


def _without(name: str) -> Callable[[str], str]:
    return lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != name})


BROKEN_CONFIGS: list[tuple[str, Callable[[str], str], str]] = [
    ("unknown model_type", _edit(model_type="mixtral"), "mixtral"),
    ("no model_type", _without("model_type"), "model_type"),
    ("invalid json", lambda text: text[: len(text) // 2], "config.json"),
    ("empty", lambda text: "", "config.json"),
    ("a list", lambda text: "[]", "config.json"),
    ("a string", lambda text: '"granitemoehybrid"', "config.json"),
    ("no vocab_size", _without("vocab_size"), "vocab_size"),
    ("vocab_size a word", _edit(vocab_size="many"), "config.json"),
    ("hidden_size null", _edit(hidden_size=None), "config.json"),
    ("no heads", _edit(num_attention_heads=0), "config.json"),
    ("unknown layer kind", _edit(layer_types=["mamba", "window", "mamba"]), "window"),
    ("no layers", _edit(layer_types=[]), "layers"),
    ("layers a number", _edit(layer_types=7), "config.json"),
    ("unknown training option", _edit(turbos={"momentum": 1}), "momentum"),
    ("top-k beyond experts", _edit(num_experts_per_tok=99), "top_k"),
]


@pytest.mark.parametrize(("case", "change", "word"), BROKEN_CONFIGS, ids=[case[0] for case in BROKEN_CONFIGS])
def test_broken_configurations_are_named(case: str, change: Callable[[str], str], word: str, tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=word) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_binary_rubbish_as_configuration(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(UserError, match=r"config\.json"):
        load_model(tmp_path)


@pytest.mark.parametrize("layers", [5, "MFQ", ""])
def test_native_configurations_are_checked_too(layers: object, tmp_path: Path) -> None:
    save(tmp_path, "turbos, mixed")
    path = tmp_path / "config.json"
    path.write_text(_edit(layers=layers)(path.read_text()))
    with pytest.raises(UserError):
        load_model(tmp_path)


def test_unknown_native_fields_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "turbos, mixed")
    path = tmp_path / "config.json"
    path.write_text(_edit(moe_capacity=1.5)(path.read_text()))
    with pytest.raises(UserError, match="moe_capacity"):
        load_config(tmp_path)


def test_a_missing_configuration_names_the_directory(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=str(directory)):
            load_model(directory)
