"""Mixture of experts: dispatch against the one-by-one truth, both routers, loads and balancing losses by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from op_cases import assert_close, bit_equal, forward_and_gradients, poisoned_memory
from turbos.ops import moe

TOKENS, WIDTH, EXPERTS, SIZE = 37, 8, 6, 12
NAMES = ("x", "logits", "w_in", "w_out")
ROUTERS = ("softmax", "sigmoid", "sigmoid, not normalised")


def make_inputs(activation: str, width: int = WIDTH, size: int = SIZE) -> list[Tensor]:
    """fp32 tokens, router logits and expert matrices; nobody likes expert 2 and everybody likes expert 4."""
    generator = torch.Generator().manual_seed(0)
    rows = size * (2 if activation == "swiglu" else 1)
    shapes = ((TOKENS, width), (TOKENS, EXPERTS), (EXPERTS, rows, width), (EXPERTS, width, size))
    x, logits, w_in, w_out = (torch.randn(shape, generator=generator) for shape in shapes)
    logits[:, 2] -= 20.0
    logits[:, 4] += 4.0
    return [x, logits, w_in, w_out]


def route(router: str, logits: Tensor, top_k: int) -> moe.Routing:
    """One of the ways to route, with a selection bias where there is one."""
    if router == "softmax":
        return moe.route_softmax(logits, top_k)
    bias = torch.linspace(-0.1, 0.1, EXPERTS, dtype=logits.dtype)
    return moe.route_sigmoid(logits, bias, top_k, normalise=router == "sigmoid", scale=2.5)


def mixed(inputs: list[Tensor], router: str, top_k: int, activation: moe.Activation, slow: bool):  # type: ignore[no-untyped-def]
    """Output and gradients (through the gates too) of the dispatched form, or of the truth."""

    def op(x: Tensor, logits: Tensor, w_in: Tensor, w_out: Tensor) -> list[Tensor]:
        routing = route(router, logits, top_k)
        if slow:
            return [moe.mix_experts_truth(x, routing, w_in, w_out, activation)]
        load = moe.expert_load(routing.experts_TK, EXPERTS)
        return [moe.mix_experts(x, routing, load, w_in, w_out, activation)]

    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(4))
    return forward_and_gradients(op, inputs, [weight])


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_dispatched_is_one_by_one(activation: moe.Activation, router: str, top_k: int) -> None:
    inputs = make_inputs(activation)
    outputs, gradients = mixed([x.double() for x in inputs], router, top_k, activation, slow=True)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        got, got_gradients = mixed([x.to(dtype) for x in inputs], router, top_k, activation, slow=False)
        assert_close(got, outputs, tolerance, ("y",))
        # With one normalised expert the gate is 1 whatever the logit: that gradient is exactly zero.
        assert_close(got_gradients, gradients, tolerance, NAMES, floor=1.0)


def test_an_expert_without_tokens_gets_zero_gradient() -> None:
    load = moe.expert_load(route("softmax", make_inputs("swiglu")[1], 2).experts_TK, EXPERTS)
    assert load[2] == 0 and load[4] == TOKENS
    for dtype in (torch.float32, torch.float64):
        _, gradients = mixed([x.to(dtype) for x in make_inputs("swiglu")], "softmax", 2, "swiglu", slow=False)
        assert not gradients[2][2].any() and not gradients[3][2].any()
        assert gradients[2][4].any()


@pytest.mark.parametrize(
    ("width", "size", "dtype", "path"),
    [
        (8, 12, torch.float32, "grouped_mm"),
        (8, 8, torch.bfloat16, "grouped_mm"),
        (8, 12, torch.float64, "loop"),
        (7, 12, torch.float32, "loop"),
        (8, 5, torch.float32, "loop"),
        (4, 8, torch.bfloat16, "loop"),
    ],
)
def test_grouped_path_says_what_runs(width: int, size: int, dtype: torch.dtype, path: str) -> None:
    rows, weight = torch.randn(5, width).to(dtype), torch.randn(3, width, size).to(dtype)
    assert moe.grouped_path(rows, weight) == path
    load = torch.tensor([2, 0, 3])
    got = moe.grouped_matmul(rows, weight, load)
    want = torch.cat([rows[:2].double() @ weight[0].double(), rows[2:].double() @ weight[2].double()])
    assert_close([got], [want], 2e-2 if dtype == torch.bfloat16 else 1e-5, ("product",))


@pytest.mark.parametrize(("width", "size"), [(7, 12), (8, 5), (7, 5)])
def test_odd_widths_take_the_loop_and_agree(width: int, size: int) -> None:
    inputs = make_inputs("swiglu", width, size)
    outputs, gradients = mixed([x.double() for x in inputs], "softmax", 2, "swiglu", slow=True)
    got, got_gradients = mixed(inputs, "softmax", 2, "swiglu", slow=False)
    assert_close(got + got_gradients, outputs + gradients, 2e-5, ("y", *NAMES))


def test_softmax_gates_are_the_softmax_of_the_chosen_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    routing = moe.route_softmax(logits, 2)
    assert routing.experts_TK.tolist() == [[1, 2]]
    first = math.exp(3) / (math.exp(3) + math.exp(2))
    assert routing.gates_TK[0].tolist() == pytest.approx([first, 1 - first], rel=1e-6)


def test_selection_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    routing = moe.route_sigmoid(logits, torch.tensor([0.0, 0.0, 5.0]), 2, normalise=False)
    assert sorted(routing.experts_TK[0].tolist()) == [0, 2]
    gates = dict(zip(routing.experts_TK[0].tolist(), routing.gates_TK[0].tolist(), strict=True))
    assert gates[2] == pytest.approx(0.5) and gates[0] == pytest.approx(1 / (1 + math.exp(-2.0)))
    normalised = moe.route_sigmoid(logits, torch.zeros(3), 2, scale=3.0)
    assert float(normalised.gates_TK.sum()) == pytest.approx(3.0)


def test_sigmoid_scores_that_underflow_stay_finite() -> None:
    routing = moe.route_sigmoid(torch.full((1, 4), -200.0), torch.zeros(4), 2)
    assert routing.gates_TK.isfinite().all()


@pytest.mark.parametrize("router", ROUTERS)
def test_ties_choose_distinct_experts_and_always_the_same(router: str) -> None:
    logits = torch.zeros(TOKENS, EXPERTS)
    first, again = (route(router, logits, 3) for _ in range(2))
    assert torch.equal(first.experts_TK, again.experts_TK)
    assert all(len(set(row)) == 3 for row in first.experts_TK.tolist())
    assert torch.equal(first.experts_TK[0].expand(TOKENS, 3), first.experts_TK), "a token's place decides a tie"
    if router == "softmax":
        assert torch.allclose(first.gates_TK, torch.full_like(first.gates_TK, 1 / 3))


def test_load_counts_tokens_per_expert() -> None:
    load = moe.expert_load(torch.tensor([[0, 3], [3, 1], [3, 0]]), 5)
    assert load.tolist() == [2, 1, 0, 3, 0] and load.dtype == torch.int64


def test_balance_loss_by_hand() -> None:
    assert float(moe.balance_loss(torch.zeros(8, 4), torch.tensor([4, 4, 4, 4]))) == pytest.approx(1.0)
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]]))
    load = torch.tensor([2, 1, 1])
    want = 3 * (2 / 4 * 0.6 + 1 / 4 * 0.25 + 1 / 4 * 0.15)
    assert float(moe.balance_loss(logits, load)) == pytest.approx(want, rel=1e-6)


def test_balance_loss_pushes_the_overloaded_expert_down() -> None:
    logits = torch.zeros(6, 3, dtype=torch.float64, requires_grad=True)
    moe.balance_loss(logits, torch.tensor([10, 1, 1])).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


def test_z_loss_by_hand_and_gradient() -> None:
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    want = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert float(moe.router_z_loss(logits.detach())) == pytest.approx(want, rel=1e-12)
    assert torch.autograd.gradcheck(moe.router_z_loss, (logits,))


def test_no_uninitialised_memory_is_read() -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = [x.to(dtype) for x in make_inputs("swiglu")]
        plain = mixed(inputs, "softmax", 2, "swiglu", slow=False)
        with poisoned_memory():
            poisoned = mixed(inputs, "softmax", 2, "swiglu", slow=False)
        assert_close(poisoned[0] + poisoned[1], plain[0] + plain[1], 1e-6, ("y", *NAMES))


def test_a_nan_token_spoils_only_itself() -> None:
    inputs = make_inputs("swiglu")
    routing = moe.route_softmax(inputs[1], 2)
    load = moe.expert_load(routing.experts_TK, EXPERTS)
    before = moe.mix_experts(inputs[0], routing, load, *inputs[2:], "swiglu")
    inputs[0][9] = float("nan")
    after = moe.mix_experts(inputs[0], routing, load, *inputs[2:], "swiglu")
    others = torch.arange(TOKENS) != 9
    assert bit_equal(before[others], after[others]) and after[9].isnan().all()


@pytest.mark.parametrize("tokens", [1, 2, TOKENS], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_the_fixed_form_is_one_by_one(activation: moe.Activation, router: str, top_k: int, tokens: int) -> None:
    """Fewer choices than experts, and more: both of its ways."""
    x, logits, w_in, w_out = make_inputs(activation)
    routing = route(router, logits[:tokens].double(), top_k)
    truth = moe.mix_experts_truth(x[:tokens].double(), routing, w_in.double(), w_out.double(), activation)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        weights = (w_in.to(dtype), w_out.to(dtype))
        assert_close(
            [moe.mix_experts_fixed(x[:tokens].to(dtype), routing, *weights, activation)], [truth], tolerance, "y"
        )
    counts = moe.expert_load_fixed(routing.experts_TK, EXPERTS)
    assert torch.equal(counts, moe.expert_load(routing.experts_TK, EXPERTS)) and counts.dtype == torch.int64


@pytest.mark.parametrize("tokens", [2, TOKENS], ids=str)
def test_a_nan_token_spoils_only_itself_in_the_fixed_form(tokens: int) -> None:
    x, logits, *weights = (x[:tokens] if place < 2 else x for place, x in enumerate(make_inputs("swiglu")))
    routing = moe.route_softmax(logits, 2)
    before = moe.mix_experts_fixed(x, routing, *weights, "swiglu")
    x[1] = float("nan")
    after = moe.mix_experts_fixed(x, routing, *weights, "swiglu")
    others = torch.arange(tokens) != 1
    assert bit_equal(before[others], after[others]) and after[1].isnan().all()
