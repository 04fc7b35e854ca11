"""A capture for the CPU that has the rules of a CUDA graph, and tensors without numbers: what static steps must bear.

Not a test file. `record` runs a step once and notes every operation that reaches torch; its replay repeats just these
on the same tensors, so whatever Python decided is frozen as it was. What a capture on CUDA forbids is refused: asking
for a number, and shapes that depend on numbers. `NUMBERLESS` are two ways to have no numbers at all: the device `meta`,
which is not the host's, and torch's fake tensors.

>>> x = torch.ones(2)
>>> replay = record(lambda: x.mul_(2.0))
>>> replay()
>>> x.tolist()
[4.0, 4.0]
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

FORBIDDEN = ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "repeat_interleave", "equal")
"""Operations for which a device must tell the host a number."""


class NotCapturable(RuntimeError):
    """What a CUDA graph could not hold."""


class Watch(TorchDispatchMode):
    """Refuses what cannot be captured; keeps all operations, with their tensors, in `calls`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # In inference mode whole compositions arrive (`item`, say): what they are made of comes back here.
        if func.namespace == "aten":
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        name = func._schema.name.split("::")[1]
        if name in FORBIDDEN:
            raise NotCapturable(f"{name} asks the device for a number")
        if name == "index" or name.startswith("index_put"):
            for place in args[1]:
                if place is not None and place.dtype in (torch.bool, torch.uint8):
                    raise NotCapturable(f"{name} by a mask: its shape depends on numbers")
        result = func(*args, **kwargs)
        moved = [x for x in [*args, *kwargs.values(), result] if isinstance(x, Tensor)]
        if len({x.device.type for x in moved}) > 1:
            raise NotCapturable(f"{name} moves numbers between host and device")
        self.calls.append((func, args, kwargs, result))
        return result


def record(step: Callable[[], object]) -> Callable[[], None]:
    """Run a step once and return what repeats its operations."""
    with Watch() as watch:
        step()

    def replay() -> None:
        made: dict[int, Tensor] = {}

        def present(tensor: Tensor) -> Tensor:
            return made.get(id(tensor), tensor)

        for func, args, kwargs, result in watch.calls:
            again = func(*tree_map_only(Tensor, present, args), **tree_map_only(Tensor, present, kwargs))
            for old, new in zip(_tensors(result), _tensors(again), strict=True):
                # An operation in place gives back what it was given.
                if old is not new:
                    made[id(old)] = new

    return replay


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, list | tuple) else [result]
    return [one for one in found if isinstance(one, Tensor)]


NUMBERLESS: dict[str, tuple[str, Callable[[], AbstractContextManager[object]]]] = {
    "meta": ("meta", nullcontext),
    "fake": ("cpu", lambda: FakeTensorMode(allow_non_fake_inputs=False)),
}
"""By name: a device, and a context in which tensors on it have shape and kind but no numbers."""
