"""TurboS: train, reason with and serve hybrid Mamba-Transformer mixture-of-experts language models.

Nothing is imported here: each room (`turbos.ops`, `turbos.model`, ...) is imported by its own name.
"""

__version__ = "0.1.0"
