"""Recycle routing against the one-by-one truth, what it conserves, and its gradients through the experts."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from op_cases import assert_close, forward_and_gradients
from turbos.ops import moe
from turbos.ops.recycle import capacity_of, recycle, recycle_truth


def skewed_choices(tokens: int, num_experts: int, top_k: int, skew: float, seed: int) -> Tensor:
    """Choices of a router that likes late experts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=generator) + torch.linspace(0, skew, num_experts)
    return logits.topk(top_k).indices


def seeded(seed: int) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


CASES = st.tuples(
    st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.floats(0, 12), st.sampled_from([1.0, 1.25, 1.5, 3.0])
)


@settings(max_examples=150, deadline=None)
@given(case=CASES, seed=st.integers(0, 2**31))
def test_all_at_once_is_one_by_one(case: tuple[int, int, int, float, float], seed: int) -> None:
    tokens, num_experts, top_k, skew, factor = case
    top_k = min(top_k, num_experts)
    chosen = skewed_choices(tokens, num_experts, top_k, skew, seed)
    before = chosen.clone()
    capacity = capacity_of(tokens, top_k, num_experts, factor)
    got = recycle(chosen, num_experts, capacity, seeded(seed))
    assert torch.equal(got, recycle_truth(chosen, num_experts, capacity, seeded(seed)))
    assert torch.equal(chosen, before), "the router's own choices were changed"
    assert_conserved(chosen, got, num_experts, capacity)


def assert_conserved(chosen_TK: Tensor, got_TK: Tensor, num_experts: int, capacity: int) -> None:
    """Every token keeps distinct experts; no expert is above capacity while another could take one of its tokens."""
    assert got_TK.shape == chosen_TK.shape and int(got_TK.min()) >= 0 and int(got_TK.max()) < num_experts
    assert all(len(set(row)) == len(row) for row in got_TK.tolist())
    before, after = moe.expert_load(chosen_TK, num_experts), moe.expert_load(got_TK, num_experts)
    assert int(after.sum()) == chosen_TK.numel()
    # Who was within capacity keeps its tokens and may only gain; who was above it only loses.
    assert (after >= before.clamp(max=capacity)).all() and (after <= before.clamp(min=capacity)).all()
    roomy = {expert for expert, load in enumerate(after.tolist()) if load < capacity}
    for expert in (after > capacity).nonzero()[:, 0].tolist():
        stranded = [row for row, first in zip(got_TK.tolist(), chosen_TK.tolist(), strict=True) if expert in row]
        # At least as many tokens as are above capacity use every expert that still has room.
        stuck = sum(roomy <= set(row) for row in stranded)
        assert stuck >= int(after[expert]) - capacity, f"expert {expert} is above capacity beside room in {roomy}"


def test_with_room_for_all_nothing_moves_and_nothing_is_drawn() -> None:
    chosen = skewed_choices(50, 6, 2, 4.0, 0)
    generator = seeded(7)
    before = generator.get_state()
    assert recycle(chosen, 6, 50, generator) is chosen
    assert torch.equal(generator.get_state(), before)


def test_first_choices_are_kept_before_second_ones() -> None:
    # Expert 0 takes two. Token 0 has it second, but tokens 1 and 2 have it first.
    chosen = torch.tensor([[1, 0], [0, 2], [0, 3], [4, 5], [4, 5], [5, 4]])
    got = recycle(chosen, 6, 2, seeded(0))
    assert got[1, 0] == got[2, 0] == 0 and got[0, 0] == 1
    assert got[0, 1] not in (0, 1), "the second choice of token 0 came too late"
    assert int(moe.expert_load(got, 6).max()) == 2


def test_where_only_the_own_expert_has_room_a_token_stays() -> None:
    # Two experts, two choices each: every token uses both, nobody can go anywhere.
    chosen = torch.tensor([[0, 1]] * 5)
    assert torch.equal(recycle(chosen, 2, 1, seeded(0)), chosen)


def test_one_seed_gives_one_answer_and_others_give_others() -> None:
    chosen = skewed_choices(200, 8, 2, 4.0, 1)
    capacity = capacity_of(200, 2, 8, 1.25)
    answers = [recycle(chosen, 8, capacity, seeded(seed)) for seed in (0, 0, 1, 2)]
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2]) and not torch.equal(answers[2], answers[3])


def test_destinations_are_even_among_experts_with_room() -> None:
    # One token too many at expert 0, and three experts with all room: each gets a third of 3000 draws (sd 26).
    chosen = torch.zeros(2, 1, dtype=torch.int64)
    counts = Counter(int(recycle(chosen, 4, 1, seeded(seed))[1]) for seed in range(3000))
    assert set(counts) == {1, 2, 3} and all(abs(count - 1000) < 130 for count in counts.values())


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts", "factor", "capacity"),
    [(100, 2, 8, 1.0, 25), (100, 2, 8, 1.5, 38), (3, 1, 8, 1.0, 1), (7, 2, 4, 1.25, 5)],
)
def test_capacity_is_the_even_share_times_the_factor(
    tokens: int, top_k: int, num_experts: int, factor: float, capacity: int
) -> None:
    assert capacity_of(tokens, top_k, num_experts, factor) == capacity


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "sigmoid, not normalised"])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_recycled_experts_against_the_slow_truth_forward_and_gradient(top_k: int, router: str) -> None:
    tokens, width, num_experts, size = 37, 8, 6, 12
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, width), (tokens, num_experts), (num_experts, 2 * size, width), (num_experts, width, size))
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    inputs[1] += torch.linspace(0, 4, num_experts)
    capacity = capacity_of(tokens, top_k, num_experts, 1.0)
    weight = torch.randn(inputs[0].shape, generator=generator)
    normalise = router == "sigmoid"

    def slow_gates(logits: Tensor, experts: Tensor) -> Tensor:
        rows = []
        for row, chosen in zip(logits, experts.tolist(), strict=True):
            picked = torch.stack([row[expert] for expert in chosen])
            scores = torch.exp(picked) if router == "softmax" else 1 / (1 + torch.exp(-picked))
            rows.append(scores / scores.sum() if router == "softmax" or normalise else scores)
        return torch.stack(rows)

    def slow(x: Tensor, logits: Tensor, w_in: Tensor, w_out: Tensor) -> list[Tensor]:
        experts = recycle_truth(logits.detach().topk(top_k).indices, num_experts, capacity, seeded(3))
        routing = moe.Routing(experts, slow_gates(logits, experts))
        return [moe.mix_experts_truth(x, routing, w_in, w_out, "swiglu")]

    def fast(x: Tensor, logits: Tensor, w_in: Tensor, w_out: Tensor) -> list[Tensor]:
        chosen = logits.detach().topk(top_k).indices
        experts = recycle(chosen, num_experts, capacity, seeded(3))
        assert (experts != chosen).any(), "nothing is recycled: take other logits, this proves nothing"
        if router == "softmax":
            gates = moe.softmax_gates(logits, experts)
        else:
            gates = moe.sigmoid_gates(logits, experts, normalise=normalise)
        load = moe.expert_load(experts, num_experts)
        return [moe.mix_experts(x, moe.Routing(experts, gates), load, w_in, w_out, "swiglu")]

    outputs, gradients = forward_and_gradients(slow, [x.double() for x in inputs], [weight])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        got, got_gradients = forward_and_gradients(fast, [x.to(dtype) for x in inputs], [weight])
        assert_close(got, outputs, tolerance, ("y",))
        assert_close(got_gradients, gradients, tolerance, ("x", "logits", "w_in", "w_out"), floor=1.0)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
def test_gates_of_the_routers_own_experts_are_the_routers_gates(router: str) -> None:
    logits = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    if router == "softmax":
        routing = moe.route_softmax(logits, 2)
        again = moe.softmax_gates(logits, routing.experts_TK)
    else:
        routing = moe.route_sigmoid(logits, torch.linspace(-1, 1, 6), 2, scale=2.5)
        again = moe.sigmoid_gates(logits, routing.experts_TK, scale=2.5)
    assert torch.equal(again, routing.gates_TK)
