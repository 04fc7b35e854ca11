"""The families in order of preference, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families import granite, native
from turbos.model.families.names import TensorName


@dataclass(frozen=True)
class Family:
    """One way of writing a model to files."""

    name: str
    module: ModuleType

    def config_json(self, config: ModelConfig) -> dict[str, object]:
        """Content of config.json."""
        return self.module.to_files(config)

    def read_config(self, files: Mapping[str, object]) -> ModelConfig:
        """The configuration that a config.json describes."""
        return self.module.from_files(files)

    def tensor_names(self, config: ModelConfig) -> list[TensorName]:
        """File name of each parameter and persistent buffer."""
        return self.module.tensor_names(config)


_FAMILIES = (Family("granitemoehybrid", granite), Family("turbos", native))


def family_of(config: ModelConfig) -> Family:
    """The first family that expresses the model exactly; `turbos` expresses all."""
    return next(family for family in _FAMILIES if not list(family.module.obstacles(config)))


def family_by_type(model_type: str, where: str) -> Family:
    """The family of a config.json's `model_type`; `where` names the file in the error."""
    for family in _FAMILIES:
        if family.name == model_type:
            return family
    known = ", ".join(family.name for family in _FAMILIES)
    raise UserError(f"{where}: model_type {model_type!r} is none of {known}")
