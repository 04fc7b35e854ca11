"""Causal depthwise convolution over packed documents, its slow truth and its one-token step.

`y[t] = bias + sum_k weight[k] * x[t - (K - 1) + k]`, where inputs before a document's start are its initial rows, or
zero. Shapes: T tokens, D documents, C channels, K kernel width. The carried state is the last K - 1 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbos.common.records import Documents


def conv_recurrent(
    x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents, initial_DKC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The convolution, token by token: the truth. Returns `y_TC` and the last K - 1 inputs of each document."""
    width = weight_CK.shape[1]
    outputs, finals = [], []
    for document, (start, end) in enumerate(pairwise(documents.borders)):
        window_KC = x_TC.new_zeros(width - 1, x_TC.shape[1]) if initial_DKC is None else initial_DKC[document]
        for t in range(start, end):
            window_KC = torch.cat([window_KC, x_TC[t : t + 1]])
            y_C = (window_KC * weight_CK.T).sum(0)
            outputs.append(y_C if bias_C is None else y_C + bias_C)
            window_KC = window_KC[1:]
        finals.append(window_KC)
    return torch.stack(outputs), torch.stack(finals)


def conv_step(x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, state_BKC: Tensor) -> tuple[Tensor, Tensor]:
    """One token for each of B sequences: returns `y_BC` and the next state; the given state is not changed."""
    window_BKC = torch.cat([state_BKC, x_BC[:, None]], dim=1)
    y_BC = (window_BKC * weight_CK.T).sum(1)
    return (y_BC if bias_C is None else y_BC + bias_C), window_BKC[:, 1:]


@dataclass(frozen=True)
class _Margins:
    """Rows of documents in a tile where each is preceded by K - 1 rows of what came before it."""

    token_rows_T: Tensor
    margin_rows: Tensor  # [D * (K - 1)]
    last_rows: Tensor  # [D * (K - 1)]: the last K - 1 inputs of each document
    total: int


@lru_cache(maxsize=64)
def _margins_of(borders: tuple[int, ...], margin: int, device: torch.device) -> _Margins:
    cu = torch.tensor(borders)
    documents = len(borders) - 1
    lengths = cu[1:] - cu[:-1]
    index_T = torch.arange(documents).repeat_interleave(lengths)
    token_rows_T = torch.arange(borders[-1]) + (index_T + 1) * margin
    offsets = torch.arange(margin)
    starts = cu[:-1] + torch.arange(documents) * margin
    ends = starts + margin + lengths
    margin_rows = (starts[:, None] + offsets).flatten()
    last_rows = (ends[:, None] - margin + offsets).flatten()
    total = borders[-1] + documents * margin
    return _Margins(token_rows_T.to(device), margin_rows.to(device), last_rows.to(device), total)


def _column_dots(a_RC: Tensor, b_RC: Tensor, block: int = 128) -> Tensor:
    """Sum over rows of `a * b`, `[C]`, in blocks that stay in the cache."""
    total = a_RC.new_zeros(block, a_RC.shape[1])
    for a, b in zip(a_RC.split(block), b_RC.split(block), strict=True):
        total[: len(a)].addcmul_(a, b)
    return total.sum(0)


class _CausalConv(torch.autograd.Function):
    """One pass per tap, no transposes; the backward needs only the padded input and the weight."""

    @staticmethod
    def forward(ctx, x_TC, weight_CK, bias_C, initial_DKC, margins, documents):  # type: ignore[no-untyped-def]
        width = weight_CK.shape[1]
        padded = x_TC.new_zeros(margins.total, x_TC.shape[1])
        padded.index_copy_(0, margins.token_rows_T, x_TC)
        if initial_DKC is not None:
            padded.index_copy_(0, margins.margin_rows, initial_DKC.to(x_TC.dtype).flatten(0, 1))
        rows = margins.total - width + 1
        taps_KC = weight_CK.T.contiguous()
        y = padded[width - 1 :] * taps_KC[-1]
        if bias_C is not None:
            y += bias_C
        for tap in range(width - 1):
            y.addcmul_(padded[tap : tap + rows], taps_KC[tap])
        final_DKC = padded[margins.last_rows].view(documents, width - 1, -1)
        ctx.save_for_backward(padded, taps_KC)
        ctx.margins, ctx.with_bias, ctx.with_initial = margins, bias_C is not None, initial_DKC is not None
        return y.index_select(0, margins.token_rows_T - (width - 1)), final_DKC

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TC, dfinal_DKC):  # type: ignore[no-untyped-def]
        padded, taps_KC = ctx.saved_tensors
        margins, width = ctx.margins, taps_KC.shape[0]
        rows = margins.total - width + 1
        dy = padded.new_zeros(rows, dy_TC.shape[1]).index_copy_(0, margins.token_rows_T - (width - 1), dy_TC)
        dpadded = torch.zeros_like(padded)
        dtaps_KC = torch.empty_like(taps_KC)
        for tap in range(width):
            dpadded[tap : tap + rows].addcmul_(dy, taps_KC[tap])
            dtaps_KC[tap] = _column_dots(padded[tap : tap + rows], dy)
        dpadded.index_add_(0, margins.last_rows, dfinal_DKC.flatten(0, 1).to(dpadded.dtype))
        dinitial = None
        if ctx.with_initial:
            dinitial = dpadded[margins.margin_rows].view(dfinal_DKC.shape)
        dbias_C = dy_TC.sum(0) if ctx.with_bias else None
        return dpadded.index_select(0, margins.token_rows_T), dtaps_KC.T, dbias_C, dinitial, None, None


def causal_conv(
    x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, documents: Documents, initial_DKC: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The convolution over packed documents; same meaning and shapes as `conv_recurrent`."""
    margins = _margins_of(tuple(documents.borders), weight_CK.shape[1] - 1, x_TC.device)
    y_TC, final_DKC = _CausalConv.apply(x_TC, weight_CK, bias_C, initial_DKC, margins, documents.count)
    return y_TC, final_DKC
