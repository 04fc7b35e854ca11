"""A model's files: `config.json` and `model.safetensors`, in the names of the family that expresses it exactly.

Writing and reading only; atomic replacement of whole checkpoint directories is the trainer's business, because it also
holds the tokenizer and the optimizer's state.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families import Family, family_by_type, family_of
from turbos.model.lm import LanguageModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


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
    """The model of a checkpoint directory, in `dtype`; every tensor must be there with its shape, and none more."""
    family, config = _read_config(directory)
    with torch.device("meta"):
        model = LanguageModel(config)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path}: no such file; a checkpoint directory holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        with safe_open(path, framework="pt") as file:
            state = _read_tensors(file, path, family, config, model.state_dict(), dtype)
    except SafetensorError as error:
        raise UserError(f"{path}: broken safetensors file ({error}); copy or save the checkpoint again") from error
    model.load_state_dict(state, assign=True)
    # Loaded tensors come without gradients when assigned; training wants them.
    return model.requires_grad_(True)


def _read_config(directory: Path) -> tuple[Family, ModelConfig]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no checkpoint here ({CONFIG_FILE} is missing); name the directory that holds it")
    try:
        files: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        family = family_by_type(str(files.get("model_type")), str(path))
        return family, family.read_config(files)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a model configuration ({error!r})") from error


def _read_tensors(
    file: Any, path: Path, family: Family, config: ModelConfig, expected: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    surplus = set(file.keys())
    state = {}
    for name in family.tensor_names(config):
        if name.file not in surplus:
            raise UserError(f"{path}: tensor {name.file} is missing")
        surplus.remove(name.file)
        tensor = file.get_tensor(name.file)
        wanted = expected[name.ours].shape
        if tensor.numel() != wanted.numel() or (name.shape is None and tensor.shape != wanted):
            raise UserError(
                f"{path}: tensor {name.file} is {list(tensor.shape)}, the configuration wants {list(wanted)}"
            )
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name.file} holds NaN or infinity")
        state[name.ours] = tensor.view(wanted).to(dtype)
    if surplus:
        raise UserError(f"{path}: tensors that the configuration has no place for: {', '.join(sorted(surplus)[:5])}")
    return state
