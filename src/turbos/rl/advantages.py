"""Group-relative advantages: how much better each of a prompt's answers was than its siblings.

Pure functions of the rewards. Which groups to sample, and the loss, are elsewhere. Shapes: G groups, N samples each.

>>> rewards_GN = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
>>> result = group_advantages(rewards_GN, eps=0.0)
>>> result.advantages_GN[0].round(decimals=3).tolist(), result.kept_G.tolist()
([0.866, -0.866, -0.866, 0.866], [True, False])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPS = 1e-4
"""Added to the standard deviation, as TRL does."""


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages, and which groups have any: those that are not kept have zeros and teach nothing."""

    advantages_GN: Tensor
    kept_G: Tensor


def group_advantages(rewards_GN: Tensor, pass_mark: float | None = None, eps: float = EPS) -> GroupAdvantages:
    """`(R - baseline) / (std + eps)` in each group; N >= 2, std with N - 1 in the denominator.

    The baseline is the group's mean (GRPO, arXiv 2402.03300, eq. 4), or with `pass_mark` the larger of mean and pass
    mark, so that in a group whose best is below the mark nothing is reinforced. A group of equal rewards says nothing
    about its members and is not kept, whatever the baseline.
    """
    if rewards_GN.ndim != 2 or rewards_GN.shape[1] < 2:
        raise ValueError(f"rewards must be [groups, samples >= 2], got {list(rewards_GN.shape)}")
    baseline_G1 = rewards_GN.mean(1, keepdim=True)
    if pass_mark is not None:
        baseline_G1 = baseline_G1.clamp(min=pass_mark)
    std_G1 = rewards_GN.std(1, keepdim=True)
    # Compared exactly: the deviation of equal rewards may round to something else than 0.
    kept_G = rewards_GN.amax(1) > rewards_GN.amin(1)
    scaled_GN = (rewards_GN - baseline_G1) / (std_G1 + eps)
    return GroupAdvantages(torch.where(kept_G[:, None], scaled_GN, torch.zeros_like(scaled_GN)), kept_G)
