"""Working memory of the step: named buffers in one block, and lists of the addresses of their rows.

>>> workspace = Workspace()
>>> x = workspace.buffer(2, 3)
>>> [row - x for row in workspace.rows_of(x, 2, 3)]
[0, 12]
"""

from __future__ import annotations

import torch
from torch import Tensor

LINE = 64
"""Bytes of a cache line: buffers begin on one, so that threads do not share it by mistake."""


class Workspace:
    """Keeps all memory alive that it has handed an address of; `buffers` are uninitialised."""

    def __init__(self) -> None:
        """Empty."""
        self.kept: list[Tensor] = []
        self.buffers: list[Tensor] = []

    def keep(self, tensor: Tensor) -> int:
        """The address of a tensor that must stay where it is."""
        self.kept.append(tensor)
        return tensor.data_ptr()

    def buffer(self, rows: int, width: int, dtype: torch.dtype = torch.float32) -> int:
        """The address of a buffer `[rows, width]`."""
        numbers = rows * width + 2 * LINE // dtype.itemsize
        self.buffers.append(torch.empty(numbers, dtype=dtype))
        address = self.keep(self.buffers[-1])
        return -(-address // LINE) * LINE

    def rows_of(self, address: int, rows: int, width: int) -> list[int]:
        """Addresses of the rows of an fp32 buffer."""
        return [address + 4 * width * row for row in range(rows)]

    def listed(self, addresses: list[int]) -> int:
        """The address of a list of addresses."""
        return self.keep(torch.tensor(addresses, dtype=torch.int64))
