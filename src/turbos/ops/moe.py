"""Mixture of experts: routing, dispatch by sorting, grouped matrix products, balancing losses.

Tokens are sorted by expert and multiplied in one grouped product; no padding, no dropped tokens (a capacity, which only
training knows, sends tokens elsewhere: `ops.recycle`). Where torch's `grouped_mm` cannot run, a loop over experts does
the same sum, and `grouped_path` says which one runs.

Shapes: T tokens, D width, E experts, K experts per token, F expert width, S = T * K dispatched rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Literal["swiglu", "relu2"]


@dataclass(frozen=True)
class Routing:
    """Which experts each token goes to, and with what weight."""

    experts_TK: Tensor
    gates_TK: Tensor


def route_softmax(logits_TE: Tensor, top_k: int) -> Routing:
    """Softmax over the top-k logits (Granite, Hunyuan-Large): the gates of a token sum to 1."""
    top_TK, experts_TK = logits_TE.topk(top_k, dim=-1)
    return Routing(experts_TK, torch.softmax(top_TK, -1))


def softmax_gates(logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
    """Gates of given experts under the softmax router, `[T, K]`."""
    return torch.softmax(logits_TE.gather(-1, experts_TK), -1)


def route_sigmoid(
    logits_TE: Tensor, selection_bias_E: Tensor, top_k: int, *, normalise: bool = True, scale: float = 1.0
) -> Routing:
    """Sigmoid scores; the bias decides the choice only, not the gates (DeepSeek-V3, arXiv 2412.19437, eq. 16)."""
    scores_TE = torch.sigmoid(logits_TE)
    experts_TK = (scores_TE + selection_bias_E).topk(top_k, dim=-1).indices
    return Routing(experts_TK, _weigh(scores_TE, experts_TK, normalise, scale))


def sigmoid_gates(logits_TE: Tensor, experts_TK: Tensor, *, normalise: bool = True, scale: float = 1.0) -> Tensor:
    """Gates of given experts under the sigmoid router, `[T, K]`."""
    return _weigh(torch.sigmoid(logits_TE), experts_TK, normalise, scale)


def _weigh(scores_TE: Tensor, experts_TK: Tensor, normalise: bool, scale: float) -> Tensor:
    gates_TK = scores_TE.gather(-1, experts_TK)
    if normalise:
        gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
    return gates_TK * scale


def expert_load(experts_TK: Tensor, num_experts: int) -> Tensor:
    """Tokens sent to each expert, int64 `[E]`."""
    return torch.bincount(experts_TK.flatten(), minlength=num_experts)


def expert_load_fixed(experts_TK: Tensor, num_experts: int) -> Tensor:
    """`expert_load` for a few tokens without asking a device for the largest number, as `bincount` does."""
    numbers_E = torch.arange(num_experts, device=experts_TK.device)
    return (experts_TK.flatten()[:, None] == numbers_E).sum(0)


def balance_loss(logits_TE: Tensor, load_E: Tensor) -> Tensor:
    """`E * sum(share of load * mean probability)`: 1 when even (Switch Transformer, arXiv 2101.03961, eq. 4)."""
    share_E = load_E.to(logits_TE.dtype) / load_E.sum()
    return logits_TE.shape[-1] * (share_E * torch.softmax(logits_TE, -1).mean(0)).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-partition of the router (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return torch.logsumexp(logits_TE, -1).square().mean()


def activate(hidden_SF: Tensor, activation: Activation) -> Tensor:
    """SwiGLU on `[gate | up]` halves, or squared relu."""
    if activation == "relu2":
        return F.relu(hidden_SF).square()
    gate, up = hidden_SF.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_path(rows_SD: Tensor, weight_EDF: Tensor) -> Literal["grouped_mm", "loop"]:
    """Which grouped product runs: `grouped_mm` takes fp32/bf16/fp16 rows whose size in bytes is a multiple of 16."""
    size = rows_SD.element_size()
    aligned = rows_SD.shape[1] * size % 16 == 0 and weight_EDF.shape[2] * size % 16 == 0
    return "grouped_mm" if aligned and rows_SD.dtype != torch.float64 else "loop"


def grouped_matmul(rows_SD: Tensor, weight_EDF: Tensor, load_E: Tensor) -> Tensor:
    """Rows sorted by expert times their expert's matrix: `[S, F]`; `load_E` counts the rows of each expert."""
    if grouped_path(rows_SD, weight_EDF) == "grouped_mm":
        return F.grouped_mm(rows_SD, weight_EDF, offs=load_E.cumsum(0).to(torch.int32))
    pieces = rows_SD.split(load_E.tolist())
    return torch.cat([piece @ weight for piece, weight in zip(pieces, weight_EDF.unbind(0), strict=True)])


def mix_experts(
    x_TD: Tensor, routing: Routing, load_E: Tensor, w_in_EFD: Tensor, w_out_EDF: Tensor, activation: Activation
) -> Tensor:
    """Gate-weighted sum of each token's experts: `[T, D]`.

    `w_in_EFD` is `[E, 2F, D]` for SwiGLU (gate rows first) or `[E, F, D]`; `w_out_EDF` is `[E, D, F]`.
    """
    tokens, top_k = routing.experts_TK.shape
    order_S = routing.experts_TK.flatten().argsort(stable=True)
    rows_SD = x_TD.index_select(0, order_S // top_k)
    hidden_SF = activate(grouped_matmul(rows_SD, w_in_EFD.transpose(1, 2), load_E), activation)
    out_SD = grouped_matmul(hidden_SF, w_out_EDF.transpose(1, 2), load_E)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=order_S.device))
    out_TKD = out_SD.index_select(0, place_S).view(tokens, top_k, -1)
    return torch.bmm(routing.gates_TK.to(out_TKD.dtype)[:, None], out_TKD)[:, 0]


def mix_experts_fixed(
    x_TD: Tensor, routing: Routing, w_in_EFD: Tensor, w_out_EDF: Tensor, activation: Activation
) -> Tensor:
    """`mix_experts` for a few tokens, by operations whose shapes and launches depend on no choice of a router.

    The matrices of the chosen experts are gathered where choices are fewer than experts; else every expert works on
    every token, which reads each matrix once, and the chosen outputs are picked.
    """
    experts_TK = routing.experts_TK
    tokens, top_k = experts_TK.shape
    if tokens * top_k < w_in_EFD.shape[0]:
        hidden_TKF = torch.matmul(w_in_EFD[experts_TK], x_TD[:, None, :, None])[..., 0]
        out_TKD = torch.matmul(w_out_EDF[experts_TK], activate(hidden_TKF, activation)[..., None])[..., 0]
    else:
        hidden_ETF = activate(torch.matmul(x_TD, w_in_EFD.transpose(1, 2)), activation)
        out_ETD = torch.matmul(hidden_ETF, w_out_EDF.transpose(1, 2))
        out_TKD = out_ETD[experts_TK, torch.arange(tokens, device=x_TD.device)[:, None]]
    return torch.bmm(routing.gates_TK.to(out_TKD.dtype)[:, None], out_TKD)[:, 0]


def mix_experts_truth(
    x_TD: Tensor, routing: Routing, w_in_EFD: Tensor, w_out_EDF: Tensor, activation: Activation
) -> Tensor:
    """The same sum, one token and one expert at a time: the truth."""
    outputs = []
    for t in range(x_TD.shape[0]):
        total_D = torch.zeros_like(x_TD[t])
        for expert, gate in zip(routing.experts_TK[t].tolist(), routing.gates_TK[t], strict=True):
            hidden_F = activate((w_in_EFD[expert] @ x_TD[t])[None], activation)[0]
            total_D = total_D + gate * (w_out_EDF[expert] @ hidden_F)
        outputs.append(total_D)
    return torch.stack(outputs)
