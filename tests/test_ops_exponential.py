"""`e^x` by powers of two against `torch.exp` in float64."""

from __future__ import annotations

import pytest
import torch

from turbos.ops.exponential import exponential, exponential_


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_exponential(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-80, 80, 20_001), torch.tensor([0.0, -1e-7, 1e-7])]).to(dtype)
    truth = torch.exp(x.double())
    error = ((exponential(x).double() - truth) / truth).abs()
    assert bool((error <= torch.finfo(dtype).eps * (1 + x.double().abs())).all())
    assert torch.equal(exponential_(x.clone()), exponential(x))


def test_edges() -> None:
    x = torch.tensor([-float("inf"), -200.0, 0.0, 89.0, float("inf"), float("nan")])
    y = exponential(x)
    assert y[:3].tolist() == [0.0, 0.0, 1.0] and y[3:5].tolist() == [float("inf")] * 2 and y[5].isnan()


def test_its_gradient_is_itself() -> None:
    x = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    exponential(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, torch.exp(x.detach()), rtol=1e-12)
