"""A parameter's name here and in a family's files, and the names that families share.

>>> import torch
>>> name = TensorName("sublayers.0.mixer.w_in", "experts.1.up_proj.weight", shape=(3, 2), part=(1, 4))
>>> name.place(torch.arange(24).view(4, 3, 2)).tolist()
[[6, 7], [8, 9], [10, 11]]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TensorName:
    """Where the tensor `file` of a checkpoint lies in our parameter or buffer `ours`.

    `part` (k, n) says that it is the k-th of n equal pieces along the first axis; `shape` is the file's where it
    differs from the piece's (same order of numbers).
    """

    ours: str
    file: str
    shape: tuple[int, ...] | None = None
    part: tuple[int, int] | None = None

    def place(self, tensor: Tensor) -> Tensor:
        """The view of our tensor that the file's tensor fills."""
        if self.part is not None:
            piece, count = self.part
            rows = tensor.shape[0] // count
            tensor = tensor.narrow(0, piece * rows, rows)
        return tensor if self.shape is None else tensor.view(self.shape)


def mamba_names(ours: str, theirs: str, conv_channels: int) -> Iterator[TensorName]:
    """A Mamba2 sublayer's parameters; both hybrid families spell them alike."""
    yield TensorName(f"{ours}.conv_weight", f"{theirs}.conv1d.weight", (conv_channels, 1, -1))
    yield TensorName(f"{ours}.conv_bias", f"{theirs}.conv1d.bias")
    yield TensorName(f"{ours}.norm_weight", f"{theirs}.norm.weight")
    for name in ("in_proj.weight", "dt_bias", "A_log", "D", "out_proj.weight"):
        yield TensorName(f"{ours}.{name}", f"{theirs}.{name}")


def attention_names(ours: str, theirs: str) -> Iterator[TensorName]:
    """An attention sublayer's parameters."""
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield TensorName(f"{ours}.{name}.weight", f"{theirs}.{name}.weight")
