"""Sampling noise: finite, Gumbel-distributed, independent across seeds and positions, blind to the batch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from turbos.model.generate import sample
from turbos.ops.sampling import gumbel_noise, hash_bits

# A place (seed, position, token) where the 24 highest bits of the hash are all ones, found by search.
TOP_BITS = (10, 51, 7526)


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean (degrees of freedom: cells - 1)."""
    freedom = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


def draw(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: float = 1.0) -> Tensor:
    """One token per seed and position from the same logits."""
    return sample(logits.expand(len(seeds), -1), temperature, seeds, positions)[0]


def test_hash_is_splitmix64() -> None:
    # First outputs of the reference generator (Vigna's splitmix64.c) with state 0 and 1234567.
    got = [value % (1 << 64) for value in hash_bits(torch.tensor([0, 1234567])).tolist()]
    assert got == [0xE220A8397B1DCDAF, 6457827717110365317]


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_samples_follow_the_softmax(vary: str) -> None:
    count = 40_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -3.0, 1.5])
    numbers, fixed = torch.arange(count), torch.full((count,), 3)
    seeds, positions = (numbers, fixed) if vary == "seed" else (fixed, numbers)
    for temperature in (1.0, 0.6):
        tokens = draw(logits, seeds, positions, temperature)
        expected = torch.softmax(logits / temperature, -1) * count
        assert chi_square(torch.bincount(tokens, minlength=7).float(), expected) < 5.0


def test_noise_has_gumbels_moments_and_tails() -> None:
    noise = gumbel_noise(torch.arange(500), torch.full((500,), 11), 2000).double()
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)
    for level in (-1.5, 0.0, 3.0, 8.0):
        share = 1 - math.exp(-math.exp(-level))
        spread = math.sqrt(share * (1 - share) / noise.numel())
        assert abs((noise > level).double().mean().item() - share) < 5 * spread


def test_noise_is_finite_even_where_all_bits_are_ones() -> None:
    seed, position, token = TOP_BITS
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), token + 1)
    assert noise.isfinite().all(), "an infinite draw wins against any logits"


def test_a_hopeless_token_is_never_drawn() -> None:
    seed, position, token = TOP_BITS
    logits = torch.zeros(1, token + 1)
    logits[0, token] = -1000.0
    assert int(draw(logits, torch.tensor([seed]), torch.tensor([position]))) != token


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, -1), (1 << 40, 0)])
def test_neighbouring_seeds_and_positions_are_independent(step: tuple[int, int]) -> None:
    vocabulary, numbers = 64, torch.arange(400)
    a = gumbel_noise(numbers, numbers + 10, vocabulary).flatten().double()
    b = gumbel_noise(numbers + step[0], numbers + 10 + step[1], vocabulary).flatten().double()
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(len(a))


def test_consecutive_samples_are_independent() -> None:
    count, vocabulary = 20_000, 4
    tokens = draw(torch.zeros(vocabulary), torch.full((count,), 5), torch.arange(count))
    pairs = torch.bincount(tokens[:-1] * vocabulary + tokens[1:], minlength=vocabulary**2).float()
    assert chi_square(pairs, torch.full((vocabulary**2,), (count - 1) / vocabulary**2)) < 5.0


def test_tokens_do_not_share_noise() -> None:
    noise = gumbel_noise(torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64), 8).double()
    correlations = torch.corrcoef(noise.T) - torch.eye(8)
    assert correlations.abs().max().item() < 5 / math.sqrt(20_000)


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    seeds, positions = torch.tensor([3, -1, 3, 1 << 62]), torch.tensor([0, 5, 1, 100_000])
    together = gumbel_noise(seeds, positions, 100)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(gumbel_noise(seeds[order], positions[order], 100), together[order])
    for row in range(4):
        assert torch.equal(gumbel_noise(seeds[row : row + 1], positions[row : row + 1], 100)[0], together[row])
    # A longer vocabulary (padding of the head) does not change the draws of the tokens there are.
    assert torch.equal(gumbel_noise(seeds, positions, 130)[:, :100], together)


def test_greedy_ignores_seeds_and_reports_its_logprob() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 0.0]])
    tokens, logprobs = sample(logits, 0.0, torch.tensor([1, 2]), torch.tensor([0, 0]))
    assert tokens.tolist() == [1, 0]
    assert logprobs.tolist() == pytest.approx(torch.log_softmax(logits, -1).amax(-1).tolist())


def test_sampled_logprobs_are_of_the_tempered_distribution() -> None:
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = sample(logits, 0.5, torch.arange(50), torch.arange(50))
    want = torch.log_softmax(logits / 0.5, -1).gather(1, tokens[:, None])[:, 0]
    assert torch.equal(logprobs, want)
