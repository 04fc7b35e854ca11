"""How a model is written in the names and configuration of a Hugging Face family, and read back.

`family_of` decides by the configuration alone. A family module has three functions: `obstacles(config)` (why it cannot
express the model; empty if it can), `to_files(config)` / `from_files(json)` for config.json, and `tensor_names(config)`
(file name of each parameter). Here: `granitemoehybrid`, and `turbos` for everything else.
"""

from turbos.model.families.registry import Family, TensorName, family_by_type, family_of

__all__ = ["Family", "TensorName", "family_by_type", "family_of"]
