"""`x @ W^T` by either matrix library: values and gradients against float64, and which path is said to run."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from static_cases import Watch
from turbos.ops.attention import _attend_in_two_parts, _attend_masked, _heads_first
from turbos.ops.linear import linear, linear_path, product, wide_linear


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 8, 8), (7, 5, 3), (64, 33, 17), (300, 128, 96)])
def test_product_and_gradients_equal_float64(rows: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(rows)
    x, w, dy = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    results = []
    for dtype in (torch.float64, torch.float32):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, w)]
        y = linear(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))))
    for truth, ours in zip(*results, strict=True):
        assert float((ours - truth).abs().max() / truth.abs().max()) < 2e-6


def test_only_the_wanted_gradients_are_computed() -> None:
    x, w = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True)
    linear(x, w).sum().backward()
    assert x.grad is None and torch.allclose(w.grad, x.sum(0).expand(2, 3))


def test_a_transposed_weight_is_read_as_it_lies() -> None:
    x, w = torch.randn(9, 6), torch.randn(6, 11)
    assert torch.allclose(product(x, w.T), x @ w, atol=1e-5)


def test_the_path_is_named() -> None:
    fast = "onednn" if torch.backends.mkldnn.is_available() else "torch"
    assert linear_path(torch.zeros(2, 2)) == fast
    assert linear_path(torch.zeros(2, 2, dtype=torch.float64)) == "torch"
    assert linear_path(torch.zeros(2, 2, device="meta")) == "torch"


def test_one_row_of_a_product_does_not_feel_the_others() -> None:
    x, w = torch.randn(40, 24), torch.randn(16, 24)
    changed = x.clone()
    changed[5] = float("nan")
    others = [row for row in range(40) if row != 5]
    assert torch.equal(linear(x, w)[others], linear(changed, w)[others])


@pytest.mark.parametrize(("own", "earlier"), [(1, 1), (5, 3), (300, 17), (64, 500)])
def test_two_part_attention_equals_the_masked_one(own: int, earlier: int) -> None:
    """Devices without the two-part kernel take the mask; both are the same attention."""
    torch.manual_seed(own)
    q_LHE = torch.randn(own, 6, 8)
    k_SKE, v_SKE = (torch.randn(own + earlier, 2, 8) for _ in range(2))
    two = _attend_in_two_parts(q_LHE, k_SKE, v_SKE, earlier, 0.3)
    q, k, v = q_LHE.transpose(0, 1)[None], _heads_first(k_SKE, 6), _heads_first(v_SKE, 6)
    masked = _attend_masked(q, k, v, earlier, 0.3)[0].transpose(0, 1)
    assert float((two - masked).abs().max()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_a_wide_product_is_not_rounded_to_its_factors(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(9, 33).to(dtype), torch.randn(17, 33).to(dtype)
    truth = x.double() @ w.double().T
    wide = wide_linear(x, w)
    assert wide.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float((wide - truth).abs().max() / truth.abs().max()) < 2e-6
    leaf = w.clone().requires_grad_()
    wide_linear(x, leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == dtype


def test_on_cuda_the_product_itself_is_wide() -> None:
    """By shape and kind only: fake tensors have the device and no numbers."""
    with FakeTensorMode(), torch.no_grad():
        x, w = (torch.empty(rows, 8, device="cuda", dtype=torch.bfloat16) for rows in (3, 5))
        with Watch() as watch:
            wide = wide_linear(x, w)
    assert wide.shape == (3, 5) and wide.dtype == torch.float32 and wide.device.type == "cuda"
    assert [str(func) for func, *_ in watch.calls if "mm" in str(func)] == ["aten.mm.dtype"], "the weight was copied"
