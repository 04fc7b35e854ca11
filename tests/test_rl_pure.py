"""Advantages and losses against hand formulas, TRL's published formula and finite differences, all in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from turbos.common.errors import UserError
from turbos.rl.advantages import EPS, group_advantages
from turbos.rl.losses import LossConfig, k3, mismatch, policy_loss

rewards = st.integers(1, 6).flatmap(
    lambda groups: st.integers(2, 9).flatmap(
        lambda samples: st.lists(
            st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=samples, max_size=samples),
            min_size=groups,
            max_size=groups,
        )
    )
)
few = settings(max_examples=60, deadline=None)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(rewards)
@few
def test_advantages_equal_trl(values):
    rewards_GN = tensor(values)
    samples = rewards_GN.shape[1]
    # TRL's GRPOTrainer: rewards grouped by prompt, minus the group's mean, over (the group's std + 1e-4).
    flat = rewards_GN.flatten()
    mean = flat.view(-1, samples).mean(dim=1).repeat_interleave(samples)
    std = flat.view(-1, samples).std(dim=1).repeat_interleave(samples)
    expected = ((flat - mean) / (std + 1e-4)).view(-1, samples)
    result = group_advantages(rewards_GN)
    torch.testing.assert_close(result.advantages_GN, expected, rtol=1e-12, atol=1e-11)


@given(rewards, st.sampled_from([None, 0.0, 0.5, 1.0]))
@few
def test_advantages_keep_exactly_the_groups_that_differ(values, pass_mark):
    rewards_GN = tensor(values)
    result = group_advantages(rewards_GN, pass_mark)
    assert result.kept_G.tolist() == [len(set(group)) > 1 for group in values]
    assert (result.advantages_GN[~result.kept_G] == 0).all()
    assert result.advantages_GN.isfinite().all()
    # A better answer never gets less than a worse one of the same group.
    order_GN = rewards_GN.argsort(1)
    assert (result.advantages_GN.gather(1, order_GN).diff(dim=1) >= 0).all()


@given(rewards)
@few
def test_plain_advantages_sum_to_zero_with_unit_deviation(values):
    result = group_advantages(tensor(values), eps=0.0)
    assert result.advantages_GN.sum(1).abs().max() < 1e-9
    for group in result.advantages_GN[result.kept_G]:
        assert group.std().item() == pytest.approx(1.0)


@given(rewards, st.sampled_from([0.25, 0.5, 1.0]))
@few
def test_pass_mark_reinforces_nothing_below_it(values, pass_mark):
    rewards_GN = tensor(values)
    adjusted, plain = group_advantages(rewards_GN, pass_mark), group_advantages(rewards_GN)
    assert (adjusted.advantages_GN[rewards_GN <= pass_mark] <= 0).all()
    assert (adjusted.advantages_GN <= plain.advantages_GN).all()
    passing_G = rewards_GN.mean(1) >= pass_mark
    assert torch.equal(adjusted.advantages_GN[passing_G], plain.advantages_GN[passing_G])


def test_pass_mark_by_hand():
    rewards_GN = tensor([[0.0, 0.2, 0.2, 0.4]])
    std = math.sqrt((0.04 + 0.04) / 3)
    expected = [(reward - 0.5) / (std + EPS) for reward in rewards_GN[0].tolist()]
    assert group_advantages(rewards_GN, 0.5).advantages_GN[0].tolist() == pytest.approx(expected)


def test_an_abstention_drops_its_group_only():
    result = group_advantages(tensor([[1.0, math.nan], [1.0, 0.0]]))
    assert result.kept_G.tolist() == [False, True]
    assert result.advantages_GN[0].tolist() == [0.0, 0.0]


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match="samples >= 2"):
        group_advantages(tensor([[1.0]]))


def trl_loss(
    logps: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, beta: float, ref: Tensor
):
    """TRL's `GRPOTrainer._compute_loss` with loss_type "bnpo"/"dapo" (token level); rows are completions."""
    coef_1 = torch.exp(logps - old)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    per_token_loss = -torch.min(coef_1 * advantages.unsqueeze(1), coef_2 * advantages.unsqueeze(1))
    if beta:
        per_token_loss = per_token_loss + beta * (torch.exp(ref - logps) - (ref - logps) - 1)
    return (per_token_loss * mask).sum() / mask.sum()


def drawn(seed: int, rows: int = 4, columns: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logps = -torch.rand(rows, columns, generator=generator, dtype=torch.float64) * 3
    old = logps + 0.4 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    reference = logps + 0.3 * torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = (torch.rand(rows, columns, generator=generator) < 0.7).double()
    return logps, old, reference, advantages, mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_loss_and_gradient_equal_trl(seed, beta):
    logps, old, reference, advantages, mask = drawn(seed)
    ours, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    config = LossConfig(0.2, 0.28, kl_coefficient=beta)
    flat_advantages = advantages[:, None].expand_as(logps).flatten()
    reference_T = reference.flatten() if beta else None
    loss = policy_loss(ours.flatten(), old.flatten(), flat_advantages, mask.flatten(), config, reference_T)
    mean = loss.loss_sum / mask.sum()
    expected = trl_loss(theirs, old, advantages, mask, 0.2, 0.28, beta, reference)
    torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-12)
    mean.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_gradient_equals_finite_differences(beta):
    logps, old, reference, advantages, mask = drawn(7)
    flat_advantages = advantages[:, None].expand_as(logps).flatten()
    reference_T = reference.flatten() if beta else None

    def total(logprobs_T: Tensor) -> Tensor:
        config = LossConfig(kl_coefficient=beta)
        return policy_loss(logprobs_T, old.flatten(), flat_advantages, mask.flatten(), config, reference_T).loss_sum

    assert torch.autograd.gradcheck(total, logps.flatten().requires_grad_(), eps=1e-7, atol=1e-6)


def test_gradient_equals_hand_formula():
    """-ratio * advantage; 0 where the ratio has left the range in the direction that the advantage pushes."""
    ratio_T = tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages_T = tensor([1.0, 1.0, -1.0, 1.0, -1.0])
    logprobs_T = ratio_T.log().requires_grad_()
    loss = policy_loss(logprobs_T, torch.zeros_like(ratio_T), advantages_T, torch.ones_like(ratio_T), LossConfig())
    loss.loss_sum.backward()
    assert logprobs_T.grad.tolist() == pytest.approx([-1.0, 0.0, 1.5, -0.5, 0.0])
    assert loss.clipped_sum.item() == 2
    assert loss.loss_sum.item() == pytest.approx(-(1.0 + 1.28 - 1.5 + 0.5 - 0.8))


def test_on_policy_gradient_is_reinforce():
    logps, _, _, advantages, mask = drawn(3)
    logprobs_T = logps.flatten().requires_grad_()
    flat_advantages = advantages[:, None].expand_as(logps).flatten()
    policy_loss(logprobs_T, logps.flatten(), flat_advantages, mask.flatten(), LossConfig()).loss_sum.backward()
    torch.testing.assert_close(logprobs_T.grad, -flat_advantages * mask.flatten())


@given(st.floats(-20, 20), st.floats(-20, 20))
@few
def test_k3_is_never_negative_and_zero_at_equality(one, other):
    assert k3(tensor(one), tensor(other)) >= 0
    assert k3(tensor(one), tensor(one)) == 0


def test_reference_pull_is_limited():
    logprobs_T = tensor([-30.0]).requires_grad_()
    config = LossConfig(kl_coefficient=2.0, kl_limit=10.0)
    loss = policy_loss(logprobs_T, tensor([-30.0]), tensor([0.0]), tensor([1.0]), config, tensor([-1.0]))
    loss.loss_sum.backward()
    assert (loss.kl_sum.item(), loss.loss_sum.item(), logprobs_T.grad.item()) == (10.0, 20.0, 0.0)


def test_reference_is_wanted_exactly_with_a_coefficient():
    one = tensor([1.0])
    with pytest.raises(ValueError, match="if and only if"):
        policy_loss(one, one, one, one, LossConfig(), one)
    with pytest.raises(ValueError, match="if and only if"):
        policy_loss(one, one, one, one, LossConfig(kl_coefficient=0.1))


def test_mismatch_by_hand():
    gap = mismatch(tensor([-1.0, -2.0, -3.0]), tensor([-1.1, -1.8, 5.0]), tensor([1.0, 1.0, 0.0]))
    assert gap.absolute_sum == pytest.approx(0.3)
    assert gap.largest == pytest.approx(0.2)
    assert gap.k3_sum == pytest.approx(math.exp(0.1) - 1.1 + math.exp(-0.2) - 0.8)


def test_mismatch_k3_estimates_the_divergence_of_sampler_and_trainer():
    """Its mean over tokens drawn by the sampler is KL(sampler || trainer)."""
    generator = torch.Generator().manual_seed(0)
    sampler_V, trainer_V = (torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    probabilities_V = sampler_V.exp()
    gap = mismatch(trainer_V, sampler_V, probabilities_V)
    divergence = (probabilities_V * (sampler_V - trainer_V)).sum().item()
    assert gap.k3_sum == pytest.approx(divergence)


@pytest.mark.parametrize("bad", [{"clip_low": 0.0}, {"clip_low": 1.0}, {"clip_high": 0.0}, {"kl_coefficient": -1.0}])
def test_impossible_loss_options_are_refused(bad):
    with pytest.raises(UserError):
        LossConfig(**bad)


def test_best_of_n_adds_the_likelihood_of_better_samples_only() -> None:
    """Report p.12: `- best_of_n * log p` on tokens of positive advantage, beside the policy loss."""
    logprobs_T = torch.tensor([-0.5, -1.0, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    advantages_T = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    weights_T = torch.tensor([1.0, 1.0, 0.5, 1.0], dtype=torch.float64)
    arguments = (logprobs_T, logprobs_T.detach(), advantages_T, weights_T)
    plain = policy_loss(*arguments, LossConfig()).loss_sum
    added = policy_loss(*arguments, LossConfig(best_of_n=2.0)).loss_sum - plain
    assert added.item() == pytest.approx(2.0 * (0.5 * 1.0 + 2.0 * 0.5))
    (gradient_T,) = torch.autograd.grad(added, logprobs_T)
    assert gradient_T.tolist() == [-2.0, 0.0, -1.0, 0.0]


def test_a_negative_best_of_n_is_refused() -> None:
    with pytest.raises(UserError, match="best_of_n"):
        LossConfig(best_of_n=-1.0)
