"""The slow truth of sampling: every change of logits in float64 with plain loops and sorts, shared by several tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from turbos.engine.sampling_params import SamplingParams
from turbos.ops.sampling import gumbel_noise


def true_distribution(
    logits: np.ndarray, params: SamplingParams, prompt: Sequence[int], written: Sequence[int]
) -> np.ndarray:
    """Probabilities, float64 `[V]`, after bias, penalties, temperature, top-k, top-p and min-p."""
    z = logits.astype(np.float64)
    for token, bias in params.logit_bias.items():
        z[token] += bias
    for token in set(prompt) | set(written):
        z[token] = z[token] / params.repetition_penalty if z[token] > 0 else z[token] * params.repetition_penalty
    for token, count in Counter(written).items():
        z[token] -= params.presence_penalty + params.frequency_penalty * count
    if params.temperature == 0:
        return (np.arange(len(z)) == z.argmax()).astype(np.float64)
    p = np.exp((z - z.max()) / params.temperature)
    p /= p.sum()
    if params.top_k:
        p[p < np.sort(p)[::-1][: params.top_k][-1]] = 0
        p /= p.sum()
    if params.top_p < 1:
        largest = np.sort(p)[::-1]
        count = next(count for count in range(1, len(p) + 1) if largest[:count].sum() >= params.top_p - 1e-12)
        p[p < largest[count - 1]] = 0
        p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    return p / p.sum()


def true_token(probabilities: np.ndarray, seed: int, position: int) -> int:
    """The token that wins with the noise of (seed, position)."""
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), len(probabilities))[0].double().numpy()
    with np.errstate(divide="ignore"):
        return int((np.log(probabilities) + noise).argmax())


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; cells that expect fewer than five are one cell."""
    expected = probabilities * counts.sum()
    large = expected >= 5
    cells = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    kept = wanted > 0
    return float(((cells[kept] - wanted[kept]) ** 2 / wanted[kept]).sum()), int(kept.sum()) - 1
