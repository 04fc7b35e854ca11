"""What the tests of the ops share: document lengths worth trying, exact comparison, gradients, poisoned memory.

Not a test file. A comparison takes the largest absolute difference against the largest value of the truth, so that a
tolerance states "relative to the size of the answer" and one tiny entry does not decide.

>>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]))
0.2
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

LENGTHS: tuple[tuple[int, ...], ...] = (
    (1,),
    (300,),
    (1, 1),
    (64, 17, 128),
    (5, 127, 1, 66),
    (33, 2, 1, 65, 3),
)
"""One to five documents, odd lengths, and lengths at, below and above the chunk sizes 16, 64 and 128."""


def relative_error(got: Tensor, truth: Tensor, floor: float = 1e-300) -> float:
    """Largest absolute difference over the largest absolute value of the truth; NaN in `got` gives NaN.

    `floor` is the least size to measure against, for truths that vanish exactly (a gradient that is zero).
    """
    assert got.shape == truth.shape, f"{tuple(got.shape)} is not {tuple(truth.shape)}"
    if truth.numel() == 0:
        return 0.0
    scale = truth.double().abs().max().clamp_min(floor)
    return float((got.double() - truth.double()).abs().max() / scale)


def assert_close(
    got: Sequence[Tensor], truth: Sequence[Tensor], tolerance: float, names: Sequence[str], floor: float = 1e-300
) -> None:
    """Every tensor within the relative tolerance of its truth; the failing ones are named."""
    errors = {name: relative_error(a, b, floor) for name, a, b in zip(names, got, truth, strict=True)}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"beyond {tolerance}: {wrong}"


def forward_and_gradients(
    op: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of `op(*inputs)` and the gradients of `sum(weight * output)`; weight None leaves an output out."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = list(op(*leaves))
    loss = sum((o * w.to(o.dtype)).sum() for o, w in zip(outputs, weights, strict=True) if w is not None)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, leaves, strict=True)]
    return [o.detach() for o in outputs], filled


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch fills what it would leave uninitialised (`empty`, `empty_like`, `new_empty`, ...) with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def bit_equal(a: Tensor, b: Tensor) -> bool:
    """Same shape and the same bits (NaN equals NaN, 0.0 is not -0.0)."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and bool((a.contiguous().view(kind) == b.contiguous().view(kind)).all())
