"""How a model is written in the names and configuration of a Hugging Face family, and read back.

`family_of` decides by the configuration alone. A family module has four functions: `obstacles(config)` (why it cannot
express the model; empty if it can), `to_files(config)` / `from_files(json)` for config.json, and `tensor_names(config)`
(where each tensor of the files lies). Here: `llama`, `granitemoehybrid`, `nemotron_h`, and `turbos` for the rest.
"""

from turbos.model.families.names import TensorName
from turbos.model.families.registry import FAMILIES, NATIVE, Family, family_by_type, family_of

__all__ = ["FAMILIES", "NATIVE", "Family", "TensorName", "family_by_type", "family_of"]
