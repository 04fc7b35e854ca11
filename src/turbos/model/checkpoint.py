"""A model's files: `config.json` and safetensors, in the names of the family that expresses it exactly.

Writing and reading only; atomic replacement of whole checkpoint directories is the trainer's business, because it also
holds the tokenizer and the optimizer's state. Tokenizer, token ids and card are added by `package.py`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families import Family, TensorName, family_by_type, family_of
from turbos.model.lm import LanguageModel
from turbos.model.parameters import parameter_spec
from turbos.model.token_ids import TokenIds
from turbos.model.weight_files import SHARD_BYTES, Weights, open_weights, write_weights

CONFIG_FILE = "config.json"
FP32_BUFFERS = ("selection_bias",)


def save_model(
    model: LanguageModel,
    directory: Path,
    *,
    family: Family | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    token_ids: TokenIds | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config.json and the weights into an existing directory.

    `family` None takes the first that expresses the model. `dtypes` gives the numbers of a file's tensor by its name
    (default: the model's own); `stored_dtypes` of another checkpoint writes it back bit for bit.
    """
    family = family or family_of(model.config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    names = family.tensor_names(model.config)
    if unnamed := set(state) - {name.ours for name in names}:
        raise RuntimeError(f"family {family.name} has no name for {', '.join(sorted(unnamed))}")
    dtypes = dtypes or {}
    counts: Counter[torch.dtype] = Counter()
    for name in names:
        counts[dtypes.get(name.file, state[name.ours].dtype)] += name.place(state[name.ours]).numel()
    commonest = str(counts.most_common(1)[0][0]).removeprefix("torch.")
    ids = {} if token_ids is None else token_ids.as_json()
    text = json.dumps({**family.config_json(model.config), "dtype": commonest, **ids}, indent=2)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    write_weights(directory, _file_tensors(names, state, dtypes), shard_bytes)


def _file_tensors(
    names: list[TensorName], state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        tensor = name.place(state[name.ours])
        dtype = dtypes.get(name.file, tensor.dtype)
        stored = tensor.to(dtype)
        if dtype != tensor.dtype and not stored.isfinite().all():
            largest = float(tensor.abs().max())
            raise UserError(f"tensor {name.file} holds {largest:.3g}, beyond {dtype}: store it as float32 or bfloat16")
        yield name.file, stored


def load_config(directory: Path) -> ModelConfig:
    """The configuration of a checkpoint directory."""
    return read_family(directory)[1]


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model of a checkpoint directory, in `dtype`; every tensor must be there with its shape, and none more.

    What the parameter table declares fp32 stays at least fp32 in a model of a narrower dtype.
    """
    family, config = read_family(directory)
    with torch.device("meta"):
        model = LanguageModel(config)
    state = {name: torch.empty(meta.shape, dtype=_kept_dtype(name, dtype)) for name, meta in model.state_dict().items()}
    names = family.tensor_names(config)
    with open_weights(directory) as weights:
        _check_names(names, weights)
        for name in names:
            _fill(name.place(state[name.ours]), name.file, weights)
    model.load_state_dict(state, assign=True)
    # Loaded tensors come without gradients when assigned; training wants them.
    return model.requires_grad_(True)


def stored_dtypes(directory: Path) -> dict[str, torch.dtype]:
    """How each tensor of a checkpoint is stored, by its name in the files."""
    with open_weights(directory) as weights:
        return {name: weights.dtype(name) for name in weights.names}


def read_family(directory: Path) -> tuple[Family, ModelConfig]:
    """The family of a checkpoint directory and its configuration; UserError naming file and field."""
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


def _kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    wide = name.endswith(FP32_BUFFERS) or parameter_spec(name).precision == "fp32"
    return torch.promote_types(dtype, torch.float32) if wide else dtype


def _check_names(names: list[TensorName], weights: Weights) -> None:
    wanted = {name.file for name in names}
    if missing := sorted(wanted - weights.names):
        count = f" ({len(missing)} such tensors)" if len(missing) > 1 else ""
        raise UserError(f"{weights.path_of(missing[0])}: tensor {missing[0]} is missing{count}")
    if surplus := sorted(weights.names - wanted):
        where, first = weights.path_of(surplus[0]), surplus[0]
        raise UserError(f"{where}: the configuration has no place for tensor {first} ({len(surplus)} such tensors)")


def _fill(place: Tensor, name: str, weights: Weights) -> None:
    """Copy one tensor of the files into its place, checked against the shape that the configuration wants."""
    weights.dtype(name)
    shape, wanted = weights.shape(name), list(place.shape)
    if shape != wanted:
        raise UserError(f"{weights.path_of(name)}: tensor {name} is {shape}, the configuration wants {wanted}")
    place.copy_(weights.read(name))
