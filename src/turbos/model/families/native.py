"""The `turbos` family: every option, our own names. For what no other family expresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields

import torch

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families.names import TensorName

_FRAME = {"model_type": "turbos", "architectures": ["TurbosForCausalLM"]}
# Fields that describe files and tokens, not the model.
_ASIDE = {"torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id"}


def obstacles(config: ModelConfig) -> Iterator[str]:
    """Nothing stands in the way."""
    return iter(())


def to_files(config: ModelConfig) -> dict[str, object]:
    """config.json: the configuration's own fields."""
    return {**_FRAME, **asdict(config)}


def from_files(files: Mapping[str, object]) -> ModelConfig:
    """The configuration in a config.json."""
    known = {field.name for field in fields(ModelConfig)}
    unknown = sorted(set(files) - known - set(_FRAME) - _ASIDE)
    if unknown:
        raise UserError(f"config.json: unknown fields {', '.join(unknown)}; written by another version?")
    return ModelConfig(**{name: value for name, value in files.items() if name in known})  # type: ignore[arg-type]


def tensor_names(config: ModelConfig) -> list[TensorName]:
    """Every parameter and persistent buffer under its own name."""
    from turbos.model.lm import LanguageModel

    with torch.device("meta"):
        return [TensorName(name, name) for name in LanguageModel(config).state_dict()]
