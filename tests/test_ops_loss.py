"""Cross-entropy and token log-probabilities by blocks: against all logits at once, and never holding them all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from op_cases import assert_close, bit_equal, forward_and_gradients, poisoned_memory
from turbos.common.records import IGNORED
from turbos.ops import loss

TOKENS, WIDTH, VOCABULARY = 41, 9, 53


def make_case(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states and head, targets (some ignored), and weights (some zero, one negative as in RL)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).to(dtype)
    head = torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.rand(TOKENS, generator=generator)
    targets[3::10] = IGNORED
    weights[5::7] = 0.0
    weights[1] = -0.5
    return [hidden, head], targets, weights


def entropy_truth(hidden: Tensor, head: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies from all logits at once."""
    logprobs = torch.log_softmax(hidden @ head.T * scale, -1)
    picked = logprobs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return picked, -(logprobs.exp() * logprobs).sum(-1)


@pytest.fixture(params=[1, VOCABULARY, 7 * VOCABULARY + 5, TOKENS * VOCABULARY, 1 << 21], ids=lambda n: f"block {n}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Logits per block: below one row, one row, seven rows, all rows, and far more."""
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", request.param)
    return request.param


@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_cross_entropy_is_the_truth(block: int, scale: float) -> None:
    inputs, targets, weights = make_case()
    outputs, gradients = forward_and_gradients(
        lambda h, w: [loss.cross_entropy_truth(h, w, targets, weights.double(), scale)], inputs, [torch.tensor(0.7)]
    )
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got, got_gradients = forward_and_gradients(
            lambda h, w: [loss.chunked_cross_entropy(h, w, targets, weights, scale)],
            make_case(dtype)[0],
            [torch.tensor(0.7)],
        )
        assert_close(got + got_gradients, outputs + gradients, tolerance, ("loss", "hidden", "head"))


def test_cross_entropy_gradient_by_differences() -> None:
    (hidden, head), targets, weights = make_case()
    inputs = (hidden[:6].requires_grad_(), head.requires_grad_())
    targets, weights = targets[:6], weights[:6].double()
    assert torch.autograd.gradcheck(lambda h, w: loss.chunked_cross_entropy(h, w, targets, weights, 0.5), inputs)


@pytest.mark.parametrize("case", ["all ignored", "all weights zero", "no tokens"])
def test_nothing_to_predict_costs_nothing(case: str) -> None:
    inputs, targets, weights = make_case(torch.float32)
    if case == "all ignored":
        targets = torch.full_like(targets, IGNORED)
    elif case == "all weights zero":
        weights = torch.zeros_like(weights)
    else:
        inputs, targets, weights = [inputs[0][:0], inputs[1]], targets[:0], weights[:0]
    got, gradients = forward_and_gradients(
        lambda h, w: [loss.chunked_cross_entropy(h, w, targets, weights)], inputs, [torch.tensor(1.0)]
    )
    assert float(got[0]) == 0.0
    assert not any(gradient.any() for gradient in gradients)


def test_ignored_tokens_are_not_even_read() -> None:
    inputs, targets, weights = make_case(torch.float32)
    skipped = (targets == IGNORED) | (weights == 0)
    assert skipped.sum() > 5
    dirty = [inputs[0].masked_fill(skipped[:, None], float("nan")), inputs[1]]

    def op(hidden: Tensor, head: Tensor) -> list[Tensor]:
        return [loss.chunked_cross_entropy(hidden, head, targets, weights)]

    clean, clean_gradients = forward_and_gradients(op, inputs, [torch.tensor(1.0)])
    got, gradients = forward_and_gradients(op, dirty, [torch.tensor(1.0)])
    assert bit_equal(clean[0], got[0])
    assert all(bit_equal(a, b) for a, b in zip(clean_gradients, gradients, strict=True))


def test_logits_of_thousands_do_not_overflow() -> None:
    inputs, targets, weights = make_case(torch.float32)
    hidden = inputs[0] * 3000
    got, gradients = forward_and_gradients(
        lambda h, w: [loss.chunked_cross_entropy(h, w, targets, weights)], [hidden, inputs[1]], [torch.tensor(1.0)]
    )
    want = loss.cross_entropy_truth(hidden.double(), inputs[1].double(), targets, weights.double())
    assert_close(got, [want], 1e-5, ("loss",))
    assert all(gradient.isfinite().all() for gradient in gradients)
    logprobs, entropies = loss.token_logprobs(hidden, inputs[1], targets)
    assert logprobs.isfinite().all() and entropies.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any tensor made by an operation had."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("op", ["chunked_cross_entropy", "token_logprobs", "cross_entropy_truth"])
def test_all_logits_are_never_held(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, width, vocabulary = 200, 4, 300
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", 10 * vocabulary)
    hidden, head = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets, weights = torch.randint(vocabulary, (tokens,)), torch.ones(tokens)
    with LargestTensor() as largest:
        if op == "token_logprobs":
            sum(loss.token_logprobs(hidden, head, targets)).sum().backward()
        else:
            getattr(loss, op)(hidden, head, targets, weights).backward()
    # The truth holds them all, and the measure sees it; the blocks hold ten rows.
    rows = tokens if op == "cross_entropy_truth" else 10
    assert largest.elements == rows * vocabulary


@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.125, 1.0), (0.5, 0.7)])
def test_token_logprobs_are_the_truth(block: int, scale: float, temperature: float) -> None:
    inputs, targets, weights = make_case()
    cotangents = [weights, weights.flip(0)]
    outputs, gradients = forward_and_gradients(
        lambda h, w: entropy_truth(h, w, targets, scale / temperature), inputs, cotangents
    )
    names = ("logprobs", "entropies", "hidden", "head")
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        got, got_gradients = forward_and_gradients(
            lambda h, w: loss.token_logprobs(h, w, targets, scale, temperature), make_case(dtype)[0], cotangents
        )
        assert_close(got + got_gradients, outputs + gradients, tolerance, names)


def test_token_logprobs_gradient_by_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "BLOCK_ELEMENTS", 2 * VOCABULARY)
    (hidden, head), targets, _ = make_case()
    inputs = (hidden[:5].requires_grad_(), head.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: loss.token_logprobs(h, w, targets[:5], 0.5, 0.8), inputs)


def test_half_precision_is_summed_in_fp32() -> None:
    inputs, targets, weights = make_case(torch.bfloat16)
    total = loss.chunked_cross_entropy(*inputs, targets, weights)
    logprobs, entropies = loss.token_logprobs(*inputs, targets)
    assert total.dtype == logprobs.dtype == entropies.dtype == torch.float32
    wide = [x.double() for x in inputs]
    assert_close([total], [loss.cross_entropy_truth(*wide, targets, weights.double())], 2e-2, ("loss",))


def test_no_uninitialised_memory_is_read(block: int) -> None:
    inputs, targets, weights = make_case(torch.float32)

    def op(hidden: Tensor, head: Tensor) -> list[Tensor]:
        total = loss.chunked_cross_entropy(hidden, head, targets, weights)
        return [total, *loss.token_logprobs(hidden, head, targets)]

    cotangents = [torch.tensor(1.0), weights, weights]
    plain = forward_and_gradients(op, inputs, cotangents)
    with poisoned_memory():
        poisoned = forward_and_gradients(op, inputs, cotangents)
    names = ("loss", "logprobs", "entropies", "hidden", "head")
    assert_close(poisoned[0] + poisoned[1], plain[0] + plain[1], 1e-6, names)
