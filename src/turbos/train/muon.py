"""Muon: a matrix steps by the orthogonal matrix nearest to its momentum (Jordan, kellerjordan.github.io/posts/muon).

Single matrices go through `torch.optim.Muon`; the experts' stacks `[E, F, D]`, which that refuses, through a batched
Newton-Schulz here, each expert a matrix of its own. Everything else (embeddings, head, router, norms, convolutions,
vectors) goes through AdamW. The step's size follows Moonlight (arXiv 2502.16982, eq. 4): `0.2 * sqrt(max(rows,
columns))` gives it AdamW's usual root mean square, so that both share one rate and one weight decay. Which parameter
is which is decided in `optim.py`.

>>> orthogonal_ES = orthogonalise(torch.diag(torch.tensor([1.0, 0.5, 0.1]))[None], steps=5)
>>> bool(((0.6 < orthogonal_ES[0].diagonal()) & (orthogonal_ES[0].diagonal() < 1.3)).all())
True
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's quintic: steep at 0, so that few steps suffice; singular values end near 1 (about 0.7 to 1.2), not at it."""
STEPS = 5
SMALLEST_NORM = 1e-7
MATCHED_RMS = 0.2


def orthogonalise(
    matrices_EFD: Tensor,
    steps: int = STEPS,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
    product_dtype: torch.dtype | None = None,
) -> Tensor:
    """Each matrix `U S V'` of a stack with its singular values driven towards 1, by Newton-Schulz: `[E, F, D]`.

    One step is `X -> a X + (b G + c G^2) X` with `G = X X'` on the shorter side; products run in `product_dtype`.
    """
    a, b, c = coefficients
    dtype = matrices_EFD.dtype
    x_ESL = matrices_EFD.to(product_dtype or dtype)
    is_tall = x_ESL.shape[-2] > x_ESL.shape[-1]
    if is_tall:
        x_ESL = x_ESL.mT
    # The Frobenius norm bounds the largest singular value, so the iteration starts inside its basin.
    x_ESL = x_ESL / torch.linalg.matrix_norm(x_ESL, keepdim=True).clamp_min(SMALLEST_NORM)
    for _ in range(steps):
        gram_ESS = x_ESL @ x_ESL.mT
        update_ESS = torch.baddbmm(gram_ESS, gram_ESS, gram_ESS, beta=b, alpha=c)
        x_ESL = torch.baddbmm(x_ESL, update_ESS, x_ESL, beta=a)
    return (x_ESL.mT if is_tall else x_ESL).to(dtype)


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it, as in Jordan's own code; else fp32.

    A CPU without such products is about 20 times slower in bfloat16 than in fp32.
    """
    if device.type != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def matrix_path(device: torch.device) -> Literal["torch", "batched"]:
    """Which code takes single matrices: torch's Muon, which always multiplies in bfloat16, or the batched one."""
    return "torch" if product_dtype(device) == torch.bfloat16 else "batched"


def matched_rate(lr: float, rows: int, columns: int) -> float:
    """Factor on an orthogonal `[rows, columns]` for a step of AdamW's size (arXiv 2502.16982, eq. 4)."""
    return lr * MATCHED_RMS * math.sqrt(max(rows, columns))


class BatchedMuon(torch.optim.Optimizer):
    """Muon over stacks of matrices `[..., F, D]`: the last two axes are a matrix, Nesterov momentum, decoupled decay.

    On a single matrix it is `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, up to the precision of its products.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95
    ) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every parameter that has a gradient; there is no closure."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        buffer = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        rows, columns = parameter.shape[-2:]
        stack_EFD = grad.lerp(buffer, group["momentum"]).reshape(-1, rows, columns)
        step_EFD = orthogonalise(stack_EFD, product_dtype=product_dtype(parameter.device))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(step_EFD.view_as(parameter), alpha=-matched_rate(group["lr"], rows, columns))


class JointOptimizer(torch.optim.Optimizer):
    """Several optimizers as one: one list of groups, one table of states, one step.

    So whoever sets rates, saves or restores need not know that there are several.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = list(parts)
        for part in parts:
            part.state = self.state

    def step(self, closure: Any = None) -> Any:
        """One step of each part; there is no closure."""
        for part in self.parts:
            part.step()
