"""The families in order of preference, the choice among them, and what config.json keeps for us alone.

A family's fields say all that other programs compute. What only we read (training options, sizes of sublayers that the
model does not have) is kept under a `turbos` key, which the others ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType

from turbos.common.errors import UserError
from turbos.model.config import FIELDS_OF_SUBLAYERS, TRAINING_FIELDS, ModelConfig
from turbos.model.families import granite, llama, native, nemotron
from turbos.model.families.names import TensorName

OURS = "turbos"
"""The key of config.json for what no family has a name for; also the family that has a name for everything."""


@dataclass(frozen=True)
class Family:
    """One way of writing a model to files."""

    name: str
    module: ModuleType

    def obstacles(self, config: ModelConfig) -> list[str]:
        """Why the family cannot express the model, the option named; empty if it can."""
        return list(self.module.obstacles(config))

    def config_json(self, config: ModelConfig) -> dict[str, object]:
        """Content of config.json; whatever the family's fields lose must be ours alone."""
        files: dict[str, object] = self.module.to_files(config)
        read = self.module.from_files(files)
        names = [field.name for field in fields(config) if getattr(read, field.name) != getattr(config, field.name)]
        lost = set(names) - _ours_alone(config)
        if lost:
            raise RuntimeError(f"family {self.name} loses {', '.join(sorted(lost))}")
        return files | ({OURS: {name: getattr(config, name) for name in names}} if names else {})

    def read_config(self, files: Mapping[str, object]) -> ModelConfig:
        """The configuration that a config.json describes."""
        config: ModelConfig = self.module.from_files({name: files[name] for name in files if name != OURS})
        kept = files.get(OURS, {})
        if not isinstance(kept, Mapping):
            raise UserError(f"{OURS}: not an object")
        for name, value in kept.items():
            if name not in {field.name for field in fields(ModelConfig)}:
                raise UserError(f"{OURS}.{name}: unknown option; written by another version?")
            if name not in _ours_alone(config) and value != getattr(config, name):
                raise UserError(f"{OURS}.{name}: {value!r} contradicts the {self.name} fields")
        return replace(config, **kept)

    def tensor_names(self, config: ModelConfig) -> list[TensorName]:
        """Where each tensor of the files lies in our parameters and persistent buffers."""
        names: list[TensorName] = self.module.tensor_names(config)
        return names


FAMILIES = (
    Family("llama", llama),
    Family("granitemoehybrid", granite),
    Family("nemotron_h", nemotron),
    Family(OURS, native),
)
NATIVE = FAMILIES[-1]
"""The family that only this project loads."""


def family_of(config: ModelConfig) -> Family:
    """The first family that expresses the model exactly; `turbos` expresses all."""
    return next(family for family in FAMILIES if not family.obstacles(config))


def family_by_type(model_type: str, where: str) -> Family:
    """The family of a config.json's `model_type`; `where` names the file in the error."""
    for family in FAMILIES:
        if family.name == model_type:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UserError(f"{where}: model_type {model_type!r} is none of {known}")


def _ours_alone(config: ModelConfig) -> set[str]:
    """Fields that change nothing of what the model computes."""
    absent = {name for letters, names in FIELDS_OF_SUBLAYERS if not set(letters) & set(config.layers) for name in names}
    return absent | set(TRAINING_FIELDS)
