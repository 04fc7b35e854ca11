"""The token-level policy loss of GRPO with DAPO's asymmetric clipping, and how far trainer and sampler disagree.

Pure functions of per-token tensors `[T]`; each returns sums over tokens times `weights_T`, and the trainer divides by
the weight of all tokens of the step (token-level normalisation: a long answer counts by its tokens). Per token, with
`ratio = exp(logprobs - sampled)`:

    loss = -min(ratio * advantage, clip(ratio, 1 - clip_low, 1 + clip_high) * advantage) + kl_coefficient * k3
           - best_of_n * logprobs   where advantage > 0

Sources: TurboS report p.12 (token-level loss, clipped k3, best-of-N likelihood of samples of positive advantage),
GRPO arXiv 2402.03300, DAPO arXiv 2503.14476 (clip-higher, token level), k3: Schulman, "Approximating KL".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from turbos.common.errors import UserError


@dataclass(frozen=True)
class LossConfig:
    """Clipping of the ratio below and above 1, and the weights of two further terms.

    `kl_coefficient` pulls towards the reference (0 = none, no reference is held); `best_of_n` raises the likelihood of
    samples that did better than their group.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coefficient: float = 0.0
    kl_limit: float = 10.0
    best_of_n: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.clip_low < 1 and self.clip_high > 0):
            raise UserError("loss: clip_low lies between 0 and 1, clip_high is above 0")
        if not (0 <= self.kl_coefficient < math.inf and self.kl_limit > 0):
            raise UserError("loss: kl_coefficient must not be below 0, and finite; kl_limit must be above 0")
        if not 0 <= self.best_of_n < math.inf:
            raise UserError("loss: best_of_n must not be below 0, and finite")


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over tokens times weight: the loss (differentiable), tokens that were clipped, k3 to the reference."""

    loss_sum: Tensor
    clipped_sum: Tensor
    kl_sum: Tensor


@dataclass(frozen=True)
class Mismatch:
    """Trainer against sampler on sampled tokens: sum of |difference| and of k3, and the largest |difference|, nats."""

    absolute_sum: float
    k3_sum: float
    largest: float


def k3(logprobs_T: Tensor, other_T: Tensor) -> Tensor:
    """`exp(d) - d - 1` with `d = other - logprobs`: an unbiased, never negative estimate of KL(policy || other)."""
    difference_T = other_T - logprobs_T
    return torch.expm1(difference_T) - difference_T


def policy_loss(
    logprobs_T: Tensor,
    sampled_T: Tensor,
    advantages_T: Tensor,
    weights_T: Tensor,
    config: LossConfig,
    reference_T: Tensor | None = None,
) -> PolicyLoss:
    """The clipped loss of tokens whose sampler's log-probabilities are `sampled_T`; see the head of this file.

    `reference_T` are the reference's log-probabilities, wanted exactly if `kl_coefficient` is above 0.
    """
    if (reference_T is not None) != (config.kl_coefficient > 0):
        raise ValueError("policy_loss takes reference log-probabilities if and only if kl_coefficient is above 0")
    ratio_T = torch.exp(logprobs_T - sampled_T)
    free_T = ratio_T * advantages_T
    clipped_T = ratio_T.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages_T
    loss_sum = -(torch.minimum(free_T, clipped_T) * weights_T).sum()
    if config.best_of_n:
        loss_sum = loss_sum - config.best_of_n * (logprobs_T * weights_T * (advantages_T > 0)).sum()
    kl_sum = torch.zeros_like(loss_sum)
    if reference_T is not None:
        kl_sum = (k3(logprobs_T, reference_T).clamp(0.0, config.kl_limit) * weights_T).sum()
    clipped_sum = ((clipped_T < free_T) * weights_T).sum()
    return PolicyLoss(loss_sum + config.kl_coefficient * kl_sum, clipped_sum, kl_sum.detach())


def mismatch(logprobs_T: Tensor, sampled_T: Tensor, weights_T: Tensor) -> Mismatch:
    """How far trainer and sampler disagree before any update; k3 estimates KL(sampler || trainer)."""
    difference_T = (logprobs_T - sampled_T).detach().abs()
    k3_sum = float((k3(sampled_T, logprobs_T.detach()) * weights_T).sum())
    counted_T = difference_T * (weights_T > 0)
    return Mismatch(float((difference_T * weights_T).sum()), k3_sum, float(counted_T.max()))
