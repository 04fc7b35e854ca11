"""The two hard parts of choosing a token: the largest perturbed score, and where a truncated distribution ends.

With numba they are kernels that look at each token once; without it, or on another device, they are torch. Both give
the same tokens: the kernel leaves what rounding decides to the noise of `ops/sampling` itself.

>>> scores_BV = torch.log_softmax(torch.tensor([[1.0, 2.0, 0.5]] * 2), -1)
>>> one, two = (perturbed_argmax(scores_BV, [5, 6], [0, 0], compiled) for compiled in (False, COMPILED))
>>> one == two
True
>>> smallest_kept(torch.tensor([0.5, 0.3, 0.2]), top_k=0, top_p=0.7, compiled=False)
0.30000001192092896
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from turbos.ops.sampling import gumbel_noise

try:
    from turbos.engine import sampling_kernels
except ImportError:
    COMPILED = False
else:
    COMPILED = True


def perturbed_argmax(
    scores_BV: Tensor, seeds: Sequence[int], positions: Sequence[int], compiled: bool = COMPILED
) -> list[int]:
    """Token with the largest `scores + gumbel_noise` of each row; each has a score above -inf, and -inf never wins."""
    seeds_B, positions_B = torch.tensor(seeds, dtype=torch.int64), torch.tensor(positions, dtype=torch.int64)
    if not compiled or scores_BV.device.type != "cpu":
        noise_BV = gumbel_noise(seeds_B.to(scores_BV.device), positions_B.to(scores_BV.device), scores_BV.shape[1])
        return [int(token) for token in (scores_BV + noise_BV).argmax(-1)]
    scores_BV = scores_BV.contiguous()
    tensors = (scores_BV, scores_BV.amax(-1), seeds_B, positions_B)
    found = sampling_kernels.perturbed_argmax(*(tensor.numpy() for tensor in tensors)).tolist()
    for row in (row for row, token in enumerate(found) if token < 0):
        one = slice(row, row + 1)
        found[row] = int((scores_BV[one] + gumbel_noise(seeds_B[one], positions_B[one], scores_BV.shape[1])).argmax(-1))
    return [int(token) for token in found]


def warm_up() -> None:
    """Compile the kernels (seconds, once on a machine) or read them from numba's cache; nothing to do without numba."""
    scores_BV = torch.log_softmax(torch.zeros(1, 8), -1)
    perturbed_argmax(scores_BV, [0], [0])
    smallest_kept(scores_BV[0].exp(), 2, 0.5)


def smallest_kept(probabilities_V: Tensor, top_k: int, top_p: float, compiled: bool = COMPILED) -> float:
    """Smallest probability, fp32 `[V]`, that top-k (0: all) and then top-p leave; equal ones stay together.

    Top-p keeps the fewest likeliest tokens that together have at least `top_p` of what top-k left, and never none.
    """
    if compiled and probabilities_V.device.type == "cpu":
        return sampling_kernels.smallest_kept(probabilities_V.numpy(), top_k, top_p)
    sorted_V = probabilities_V.sort(descending=True).values
    if 0 < top_k < len(sorted_V):
        sorted_V = sorted_V[sorted_V >= sorted_V[top_k - 1]]
    edge = sorted_V[-1]
    if top_p < 1.0:
        mass_V = sorted_V.double().cumsum(0)
        edge = sorted_V[min(int(torch.searchsorted(mass_V, top_p * mass_V[-1])), len(sorted_V) - 1)]
    return float(edge)
