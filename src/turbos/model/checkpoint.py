"""A model's files: `config.json` and `model.safetensors`, in the names of the family that expresses it exactly.

Writing and reading only; atomic replacement of whole checkpoint directories is the trainer's business, because it also
holds the tokenizer and the optimizer's state.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families import Family, TensorName, family_by_type, family_of
from turbos.model.lm import LanguageModel
from turbos.model.parameters import parameter_spec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FP32_BUFFERS = ("selection_bias",)


def save_model(model: LanguageModel, directory: Path) -> None:
    """Write config.json and model.safetensors into an existing directory."""
    family = family_of(model.config)
    state = model.state_dict()
    tensors = {}
    for name in family.tensor_names(model.config):
        tensor = state.pop(name.ours).detach()
        tensors[name.file] = (tensor if name.shape is None else tensor.view(name.shape)).contiguous().cpu()
    if state:
        raise RuntimeError(f"family {family.name} has no name for {', '.join(state)}")
    text = json.dumps(family.config_json(model.config), indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})


def load_config(directory: Path) -> ModelConfig:
    """The configuration of a checkpoint directory."""
    return _read_config(directory)[1]


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a checkpoint directory, in `dtype`; every tensor must be there with its shape, and none more.

    What the parameter table declares fp32 stays at least fp32 in a model of a narrower dtype.
    """
    family, config = _read_config(directory)
    with torch.device("meta"):
        model = LanguageModel(config)
    files = _weight_files(directory)
    expected = model.state_dict()
    state = {}
    for name in family.tensor_names(config):
        path = files.pop(name.file, None)
        if path is None:
            raise UserError(f"{directory / WEIGHTS_FILE}: tensor {name.file} is missing")
        tensor = _read_tensor(path, name, expected[name.ours])
        state[name.ours] = tensor.view(expected[name.ours].shape).to(_kept_dtype(name.ours, dtype))
    if files:
        surplus, path = sorted(files.items())[0]
        raise UserError(f"{path}: the configuration has no place for tensor {surplus} ({len(files)} such tensors)")
    model.load_state_dict(state, assign=True)
    # Loaded tensors come without gradients when assigned; training wants them.
    return model.requires_grad_(True)


def _kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    wide = name.endswith(FP32_BUFFERS) or parameter_spec(name).precision == "fp32"
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def _read_config(directory: Path) -> tuple[Family, ModelConfig]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no checkpoint here ({CONFIG_FILE} is missing); name the directory that holds it")
    try:
        files = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(files, dict):
            raise UserError(f"{path}: not a model configuration (it is no object)")
        family = family_by_type(str(files.get("model_type")), str(path))
        return family, family.read_config(files)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path}: not a model configuration ({error!r})") from error


def _weight_files(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor: one file, or the shards that an index names."""
    index = directory / INDEX_FILE
    if not index.is_file():
        path = directory / WEIGHTS_FILE
        if not path.is_file():
            raise UserError(f"{path}: no such file; a checkpoint directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): directory / Path(shard).name for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open safetensors file; a missing or broken one is the user's to mend."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file, though the index names it") from error
    except SafetensorError as error:
        raise UserError(f"{path}: broken safetensors file ({error}); copy or save the checkpoint again") from error


def _read_tensor(path: Path, name: TensorName, expected: Tensor) -> Tensor:
    """One tensor of a file, checked against the shape that the configuration wants (in the file's layout)."""
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(name.file)
    wanted = expected.shape if name.shape is None else expected.view(name.shape).shape
    if tensor.shape != wanted:
        raise UserError(f"{path}: tensor {name.file} is {list(tensor.shape)}, the configuration wants {list(wanted)}")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: tensor {name.file} holds {tensor.dtype}, not floating-point numbers")
    if not torch.isfinite(tensor).all():
        raise UserError(f"{path}: tensor {name.file} holds NaN or infinity")
    return tensor
