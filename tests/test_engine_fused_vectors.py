"""Vectors of the fused step: exponentials against float64, orders of sums, ends of rows; other widths of vector."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from numba import njit
from torch import Tensor

from turbos.engine.fused import huge
from turbos.engine.fused.step import COMPILING
from turbos.engine.fused.tiles import BF16, FP32, INT8, mixing_tile, product_tile
from turbos.engine.fused.vectors import LANES, exp, lanes_of, load, silu, store, store_totals, total
from turbos.engine.fused.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent


@njit
def _apply_exp(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(0, count, LANES):
        store(target, i, count, exp(load(source, i, count)))


@njit
def _apply_silu(source, target, count):  # type: ignore[no-untyped-def]
    for i in range(0, count, LANES):
        store(target, i, count, silu(load(source, i, count)))


@njit
def _totals(source, target):  # type: ignore[no-untyped-def]
    vectors = (
        load(source, 0, 4 * LANES),
        load(source, LANES, 4 * LANES),
        load(source, 2 * LANES, 4 * LANES),
        load(source, 3 * LANES, 4 * LANES),
    )
    store_totals(target, 0, vectors[0], vectors[1], vectors[2], vectors[3])
    return total(vectors[0]), total(vectors[1]), total(vectors[2]), total(vectors[3])


def test_exponentials_are_within_two_units_of_float64() -> None:
    x = torch.cat([torch.linspace(-86.9, 88.0, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    y = torch.empty_like(x)
    _apply_exp(x.data_ptr(), y.data_ptr(), len(x))
    exact = x.double().exp()
    assert float(((y.double() - exact) / exact).abs().max()) < 2 * 2**-23


def test_exponentials_at_the_ends() -> None:
    x, y = torch.tensor([-float("inf"), -88.0, 200.0, float("nan")]), torch.empty(4)
    _apply_exp(x.data_ptr(), y.data_ptr(), 4)
    assert y[0] == 0 and y[1] == 0 and y[2] > 1e38
    x, y = torch.tensor([-1e4, -200.0, 0.0, 1e4]), torch.empty(4)
    _apply_silu(x.data_ptr(), y.data_ptr(), 4)
    assert torch.allclose(y, torch.nn.functional.silu(x), atol=1e-30)


@pytest.mark.parametrize("count", [1, LANES - 1, LANES, LANES + 1, 3 * LANES + 2])
def test_nothing_beyond_the_end_is_written(count: int) -> None:
    x, y = torch.randn(count), torch.full((count + 2 * LANES,), 7.0)
    _apply_silu(x.data_ptr(), y.data_ptr(), count)
    assert torch.allclose(y[:count], torch.nn.functional.silu(x), rtol=1e-6, atol=1e-7)
    assert torch.equal(y[count:], torch.full((2 * LANES,), 7.0))


def test_four_sums_at_once_have_the_bits_of_single_sums() -> None:
    x, sums = torch.randn(4 * LANES) * torch.logspace(-6, 6, 4 * LANES), torch.empty(4)
    single = _totals(x.data_ptr(), sums.data_ptr())
    assert sums.tolist() == list(single)
    assert torch.allclose(sums.double(), x.double().view(4, LANES).sum(1), rtol=1e-4)


@lru_cache
def _compiled_product(kind: int, rows: int, batch: int) -> Callable[..., None]:
    tile = product_tile(kind, rows, batch)

    @njit
    def run(weights, width, scales, sources, targets):  # type: ignore[no-untyped-def]
        tile(weights, width, width, scales, sources, targets, 0, weights)

    return run


def _product(kind: int, rows: int, batch: int, weights: Tensor, scales: Tensor, x_BI: Tensor) -> Tensor:
    workspace, y_BR = Workspace(), torch.full((batch, rows), float("nan"))
    sources = workspace.listed(workspace.rows_of(x_BI.data_ptr(), batch, x_BI.shape[1]))
    targets = workspace.listed(workspace.rows_of(y_BR.data_ptr(), batch, rows))
    _compiled_product(kind, rows, batch)(weights.data_ptr(), x_BI.shape[1], scales.data_ptr(), sources, targets)
    return y_BR


@pytest.mark.parametrize("width", [1, LANES, 2 * LANES + 3])
@pytest.mark.parametrize(("kind", "dtype"), [(FP32, torch.float32), (BF16, torch.bfloat16), (INT8, torch.int8)])
def test_product_tiles_of_every_kind(kind: int, dtype: torch.dtype, width: int) -> None:
    x_BI, scales = torch.randn(2, width), torch.rand(4) + 0.5
    weights = torch.randint(-127, 128, (4, width)).to(dtype)
    exact = x_BI.double() @ weights.double().T * (scales.double() if kind == INT8 else 1)
    four = _product(kind, 4, 2, weights, scales, x_BI)
    assert torch.allclose(four.double(), exact, rtol=1e-5, atol=1e-3)
    for row in range(4):
        for b in range(2):
            alone = _product(kind, 1, 1, weights[row].clone(), scales[row:].clone(), x_BI[b : b + 1].clone())
            assert torch.equal(alone[0, 0], four[b, row])


@pytest.mark.parametrize("width", [LANES + 1, 2 * LANES])
def test_mixing_tiles_add_weighted_rows(width: int) -> None:
    tile = mixing_tile(2, 2)

    @njit
    def run(rows, count, width, sources, targets):  # type: ignore[no-untyped-def]
        tile(rows, width, count, sources, targets, 0, width, rows)

    rows_SE, shares_BS, sums_BE = torch.randn(5, width), torch.randn(2, 5), torch.ones(2, width)
    workspace = Workspace()
    sources = workspace.listed(workspace.rows_of(shares_BS.data_ptr(), 2, 5))
    targets = workspace.listed(workspace.rows_of(sums_BE.data_ptr(), 2, width))
    run(rows_SE.data_ptr(), 5, width, sources, targets)
    assert torch.allclose(sums_BE, 1 + shares_BS @ rows_SE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numbers", [1, 1000, 3 << 20])
def test_large_pages_change_no_number(numbers: int) -> None:
    tensor = huge.empty(numbers, torch.float32)
    assert tensor.shape == (numbers,)
    tensor.copy_(torch.arange(numbers))
    huge.prefer(tensor, collapse=True)
    assert torch.equal(tensor, torch.arange(numbers).float())


def test_width_of_vectors_by_processor() -> None:
    assert lanes_of("znver4", "+avx2,+avx512f,+avx512bw,+avx512vl") == 16
    assert lanes_of("haswell", "+avx,+avx2,-avx512f") == 8
    assert lanes_of("apple-m1", "+neon,+fullfp16") == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "features", "lanes"),
    [("haswell", "+avx,+avx2,+fma,+bmi,+bmi2,+f16c", 8), ("nehalem", "+sse4.2", 4)],
)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="imitates x86 processors")
def test_other_processors_compute_the_same(name: str, features: str, lanes: int, tmp_path: Path) -> None:
    """The tests of options, odd sizes and bits, compiled for a processor with narrower vectors: once, and said."""
    settings = {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment = {**os.environ, **settings}
    warm = "from turbos.engine.fused import step, vectors; step.warm_up(1); print(vectors.LANES)"
    for said in (True, False):
        printed, complained = run_at_a_terminal([sys.executable, "-c", warm], environment)
        assert printed.strip() == str(lanes)
        assert (COMPILING in complained) == said
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_engine_fused.py"]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_at_a_terminal(command: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """What a command prints, and what it says on its error output where that is a terminal."""
    ours, theirs = os.openpty()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True, check=True
    )
    os.write(theirs, b"\n")
    os.close(theirs)
    said = os.read(ours, 10_000).decode()
    os.close(ours)
    return done.stdout, said
