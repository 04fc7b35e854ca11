"""Numba kernels of sampling: the winner of `scores + Gumbel noise` without making the noise, and the edge of a nucleus.

Both answer what a slower function answers (`ops/sampling.gumbel_noise`, a sort); `choosing.py` decides which runs. Row
by row and on one thread, so a row's answer does not depend on its batch. Shapes: B rows, V vocabulary.

Most tokens are out of the running by the largest noise in the cell that their random bits fall into: a look-up. The two
logarithms are computed for a handful.

>>> scores_BV = np.array([[0.0, -60.0], [-60.0, 0.0]], np.float32)
>>> perturbed_argmax(scores_BV, scores_BV.max(-1), np.array([7, 7]), np.array([3, 4])).tolist()
[0, 1]
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

MARGIN = 1e-4
"""Two best perturbed scores nearer than this: fp32 rounding decides, which is torch's."""

GOLDEN, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
U27, U30, U31, U41, U11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(41), np.uint64(11)

SMALLEST_NOISE = -np.log(24 * np.log(2.0))
CELLS = 4096
"""The 23 random bits of a token fall into so many cells by their upper 12."""

# Noise falls as the bits grow: -log(-log1p(-u)) <= -log(u), at the lower end of each cell.
CELL_NOISE = np.append(24 * np.log(2.0), -np.log(np.arange(1, CELLS) / CELLS)).astype(np.float32) + np.float32(1e-5)

BUCKETS = (0x3F800000 >> 16) + 1
"""Probabilities share a bucket when the upper half of their fp32 bits is the same; the largest is 1."""


@njit(cache=True, nogil=True)
def _mixed(x: np.uint64) -> np.uint64:
    """splitmix64, as `ops/sampling.hash_bits`."""
    x = x + GOLDEN
    x = (x ^ (x >> U30)) * FIRST
    x = (x ^ (x >> U27)) * SECOND
    return x ^ (x >> U31)


@njit(cache=True, nogil=True)
def _perturbed_argmax(
    scores_BV: np.ndarray,
    best_B: np.ndarray,
    seeds_B: np.ndarray,
    positions_B: np.ndarray,
    cell_noise: np.ndarray,
    found_B: np.ndarray,
) -> None:
    for row in range(scores_BV.shape[0]):
        scores_V = scores_BV[row]
        stream = _mixed(_mixed(np.uint64(seeds_B[row])) + np.uint64(positions_B[row]))
        best, second, winner = -np.inf, -np.inf, -1
        floor = best_B[row] + SMALLEST_NOISE - MARGIN
        for token in range(scores_V.shape[0]):
            score = scores_V[token]
            bits = _mixed(stream + np.uint64(token)) >> U41
            if score + cell_noise[np.int64(bits >> U11)] < floor:
                continue
            value = score - np.log(-np.log1p(-(np.float64(bits) + 0.5) * 2.0**-23))
            if value > best:
                best, second, winner = value, best, token
                floor = max(floor, best - MARGIN)
            elif value > second:
                second = value
        found_B[row] = winner if best - second > MARGIN else -1


def perturbed_argmax(
    scores_BV: NDArray[np.floating],
    best_B: NDArray[np.floating],
    seeds_B: NDArray[np.int64],
    positions_B: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Token with the largest score + noise for each row, int64 `[B]`; -1 where the second is within `MARGIN`.

    `best_B` are the largest scores (a vectorised pass of the caller: here it would be a slow one), above -inf.
    """
    found_B = np.empty(len(scores_BV), np.int64)
    _perturbed_argmax(scores_BV, best_B, seeds_B, positions_B, CELL_NOISE, found_B)
    return found_B


@njit(cache=True, nogil=True)
def _members(probabilities_V: np.ndarray, bucket: int) -> np.ndarray:
    """Probabilities of a bucket, largest first."""
    bits_V = probabilities_V.view(np.int32)
    members = np.empty(len(bits_V), np.float32)
    count = 0
    for token in range(len(bits_V)):
        if bits_V[token] >> 16 == bucket:
            members[count] = probabilities_V[token]
            count += 1
    return np.sort(members[:count])[::-1]


@njit(cache=True, nogil=True)
def _smallest_kept(probabilities_V: np.ndarray, top_k: int, top_p: float) -> float:
    bits_V = probabilities_V.view(np.int32)
    counts, masses = np.zeros(BUCKETS + 1, np.int64), np.zeros(BUCKETS + 1, np.float64)
    for token in range(len(bits_V)):
        bucket = bits_V[token] >> 16
        counts[bucket] += 1
        masses[bucket] += probabilities_V[token]
    edge = np.float32(0.0)
    total = 0.0
    if 0 < top_k < len(bits_V):
        kept, bucket = 0, BUCKETS
        while kept + counts[bucket] < top_k:
            kept += counts[bucket]
            total += masses[bucket]
            bucket -= 1
        members = _members(probabilities_V, bucket)
        edge = members[top_k - kept - 1]
        for member in members:
            if member >= edge:
                total += member
    else:
        for bucket in range(BUCKETS, -1, -1):
            total += masses[bucket]
    if top_p < 1.0:
        target, mass, bucket = top_p * total, 0.0, BUCKETS
        while bucket > 0 and (counts[bucket] == 0 or mass + masses[bucket] < target):
            mass += masses[bucket]
            bucket -= 1
        for member in _members(probabilities_V, bucket):
            nucleus_edge = member
            mass += member
            if mass >= target:
                edge = max(edge, nucleus_edge)
                break
    return float(edge)


def smallest_kept(probabilities_V: NDArray[np.float32], top_k: int, top_p: float) -> float:
    """Smallest probability that top-k (0: all) and then top-p leave; equal ones stay together."""
    return float(_smallest_kept(probabilities_V, top_k, top_p))
