"""Root-mean-square normalisation, plain, and gated by groups as Mamba2 uses it. Sums run in fp32 or wider.

Shapes: T tokens, D width. The gated form normalises `y * silu(gate)` inside each of G equal groups of channels
(Zhang & Sennrich 2019, arXiv 1910.07467; Dao & Gu 2024, arXiv 2405.21060, section 7).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension."""
    if x_TD.dtype in (torch.float16, torch.bfloat16):
        return F.rms_norm(x_TD.float(), x_TD.shape[-1:], weight_D.float(), eps).to(x_TD.dtype)
    return F.rms_norm(x_TD, x_TD.shape[-1:], weight_D, eps)


def gated_rms_norm(y_TD: Tensor, gate_TD: Tensor, weight_D: Tensor, eps: float, groups: int = 1) -> Tensor:
    """`rms_norm(y * silu(gate))` with the mean taken inside each of `groups` groups."""
    gated = y_TD * F.silu(gate_TD)
    if groups == 1:
        return rms_norm(gated, weight_D, eps)
    ones = weight_D.new_ones(weight_D.shape[0] // groups)
    normed = rms_norm(gated.unflatten(-1, (groups, -1)), ones, eps).flatten(-2) * weight_D
    # The weight may be wider than what it weighs.
    return normed.to(y_TD.dtype)
