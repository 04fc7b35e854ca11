"""Losses over a large vocabulary that never hold all logits: cross-entropy, and per-token log-probability and entropy.

Rows are taken in blocks of about `BLOCK_ELEMENTS` logits. The cross-entropy computes its gradient in the forward pass,
block by block, so the head's product is done once each way.

Shapes: T tokens, D width, V vocabulary. Logits are `logit_scale * hidden @ weight^T`, in fp32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbos.common.records import IGNORED
from turbos.ops.exponential import exponential, exponential_
from turbos.ops.linear import product

BLOCK_ELEMENTS = 1 << 22


def cross_entropy_truth(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, logit_scale: float = 1.0
) -> Tensor:
    """Weighted sum of `-log p(target)`, all logits at once: the truth."""
    logprobs_TV = torch.log_softmax(hidden_TD @ weight_VD.T * logit_scale, -1)
    picked_T = logprobs_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    return -(picked_T * loss_weights_T * (targets_T != IGNORED)).sum()


def _block_rows(vocabulary: int) -> int:
    return max(1, BLOCK_ELEMENTS // vocabulary)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _CrossEntropy(torch.autograd.Function):
    """Loss and gradients block by block."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T, loss_weights_T, logit_scale):  # type: ignore[no-untyped-def]
        rows_T = torch.nonzero((targets_T != IGNORED) & (loss_weights_T != 0))[:, 0]
        dhidden_TD = torch.zeros_like(hidden_TD) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=_wide(weight_VD).dtype) if ctx.needs_input_grad[1] else None
        total = _wide(hidden_TD).new_zeros(())
        for rows in rows_T.split(_block_rows(weight_VD.shape[0])):
            hidden_RD = hidden_TD[rows]
            logits_RV = _wide(product(hidden_RD, weight_VD))
            if logit_scale != 1.0:
                logits_RV *= logit_scale
            scale_R = loss_weights_T[rows].to(logits_RV.dtype)
            picked_R = logits_RV.gather(1, targets_T[rows, None])[:, 0]
            top_R1 = logits_RV.amax(1, keepdim=True)
            exp_RV = exponential_(logits_RV.sub_(top_R1))
            sum_R = exp_RV.sum(1)
            total += ((sum_R.log() + top_R1[:, 0] - picked_R) * scale_R).sum()
            if dhidden_TD is None and dweight_VD is None:
                continue
            dlogits_RV = exp_RV.mul_((scale_R * logit_scale / sum_R)[:, None])
            dlogits_RV.scatter_add_(1, targets_T[rows, None], (-logit_scale * scale_R)[:, None])
            dlogits_RV = dlogits_RV.to(hidden_RD.dtype)
            if dhidden_TD is not None:
                dhidden_TD[rows] = product(dlogits_RV, weight_VD.T)
            if dweight_VD is not None:
                dweight_VD.addmm_(dlogits_RV.T.to(dweight_VD.dtype), hidden_RD.to(dweight_VD.dtype))
        ctx.save_for_backward(dhidden_TD, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal):  # type: ignore[no-untyped-def]
        dhidden_TD, dweight_VD = ctx.saved_tensors
        dhidden = None if dhidden_TD is None else dhidden_TD * dtotal.to(dhidden_TD.dtype)
        dweight = None if dweight_VD is None else (dweight_VD * dtotal).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None


def chunked_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, loss_weights_T: Tensor, logit_scale: float = 1.0
) -> Tensor:
    """Sum over tokens of `loss_weights_T * -log p(targets_T)`, nats; `IGNORED` or zero weight costs nothing."""
    total: Tensor = _CrossEntropy.apply(hidden_TD, weight_VD, targets_T, loss_weights_T, logit_scale)
    return total


class _TokenLogprobs(torch.autograd.Function):
    """Log-probability and entropy block by block; the backward computes each block's logits again."""

    @staticmethod
    def forward(ctx, hidden_TD, weight_VD, targets_T, scale):  # type: ignore[no-untyped-def]
        logprobs, entropies = [], []
        for hidden_RD, targets_R in _blocks(hidden_TD, targets_T, weight_VD.shape[0]):
            log_RV = torch.log_softmax(_wide(product(hidden_RD, weight_VD)) * scale, -1)
            logprobs.append(log_RV.gather(1, targets_R[:, None])[:, 0])
            entropies.append(-(exponential(log_RV) * log_RV).sum(1))
        ctx.save_for_backward(hidden_TD, weight_VD, targets_T, torch.cat(entropies))
        ctx.scale = scale
        return torch.cat(logprobs), torch.cat(entropies)

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogprobs_T, dentropies_T):  # type: ignore[no-untyped-def]
        hidden_TD, weight_VD, targets_T, entropies_T = ctx.saved_tensors
        dhidden_TD = torch.empty_like(hidden_TD)
        dweight_VD = torch.zeros_like(weight_VD)
        start = 0
        for hidden_RD, targets_R in _blocks(hidden_TD, targets_T, weight_VD.shape[0]):
            rows = slice(start, start + len(hidden_RD))
            log_RV = torch.log_softmax(_wide(product(hidden_RD, weight_VD)) * ctx.scale, -1)
            prob_RV = exponential(log_RV)
            # d logp(target) = onehot - p;  d entropy = -p * (log p + entropy)
            drows_RV = -(dentropies_T[rows, None] * (log_RV + entropies_T[rows, None]) + dlogprobs_T[rows, None])
            dlogits_RV = drows_RV.mul_(prob_RV)
            dlogits_RV.scatter_add_(1, targets_R[:, None], dlogprobs_T[rows, None])
            dlogits_RV = (dlogits_RV * ctx.scale).to(hidden_RD.dtype)
            dhidden_TD[rows] = product(dlogits_RV, weight_VD.T)
            dweight_VD.addmm_(dlogits_RV.T, hidden_RD)
            start += len(hidden_RD)
        return dhidden_TD, dweight_VD, None, None


def _blocks(hidden_TD: Tensor, targets_T: Tensor, vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    rows = _block_rows(vocabulary)
    targets = targets_T.where(targets_T != IGNORED, 0).split(rows)
    return list(zip(hidden_TD.split(rows), targets, strict=True))


def token_logprobs(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, logit_scale: float = 1.0, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`log p(targets_T)` and the entropy at each token, nats, differentiable, fp32 or wider.

    At `IGNORED` targets the log-probability is that of token 0: give it no weight.
    """
    logprobs_T, entropies_T = _TokenLogprobs.apply(hidden_TD, weight_VD, targets_T, logit_scale / temperature)
    return logprobs_T, entropies_T
