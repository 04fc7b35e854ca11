"""`x @ W^T` by the faster of the machine's two matrix libraries, and its gradients.

In fp32 on the CPU, oneDNN multiplies by a weight 5 to 50 % faster than the library behind `torch.mm` (measured on two
Zen4 cores for 64 to 2048 rows), but a weight's own gradient slower; so the product and the gradient of `x` go through
oneDNN, the gradient of `W` through `torch.mm`. Everything else (other dtypes, other devices, builds of torch without
oneDNN) is `torch.nn.functional.linear`; `linear_path` says which one runs.

Shapes: T rows, I inputs, O outputs.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear_path(x: Tensor) -> Literal["onednn", "torch"]:
    """Which product runs for rows like `x`."""
    fast = x.dtype == torch.float32 and x.device.type == "cpu" and torch.backends.mkldnn.is_available()
    return "onednn" if fast else "torch"


def product(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """`x @ W^T`, `[T, O]`, without gradients; `W` may be a transposed view."""
    if linear_path(x_TI) == "torch":
        return F.linear(x_TI, w_OI)
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, w_OI, None, "none", [], "")
    return y_TO


class _Linear(torch.autograd.Function):
    """The product with its gradients."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, w_OI: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x_TI, w_OI)
        return product(x_TI, w_OI)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TO: Tensor):  # type: ignore[no-untyped-def]
        x_TI, w_OI = ctx.saved_tensors
        dx_TI = product(dy_TO, w_OI.T) if ctx.needs_input_grad[0] else None
        dw_OI = dy_TO.T @ x_TI if ctx.needs_input_grad[1] else None
        return dx_TI, dw_OI


def linear(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """`x @ W^T`, `[T, O]`, differentiable."""
    if linear_path(x_TI) == "torch":
        return F.linear(x_TI, w_OI)
    y_TO: Tensor = _Linear.apply(x_TI, w_OI)
    return y_TO


def wide_linear(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """`x @ W^T` in fp32 (float64 for float64): products of half-precision numbers are summed and left in fp32.

    Differentiable. On CUDA the product itself writes fp32; elsewhere, and where gradients are wanted, a half-precision
    weight is widened first, which takes memory for a copy.
    """
    if x_TI.dtype in (torch.float32, torch.float64):
        return linear(x_TI, w_OI)
    if x_TI.device.type == "cuda" and not torch.is_grad_enabled():
        return torch.mm(x_TI, w_OI.T, out_dtype=torch.float32)
    return linear(x_TI.float(), w_OI.float())
