"""Grouped-query attention: packed, over a cache, and one token a step, against the float64 loop; rotary positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from op_cases import LENGTHS, assert_close, bit_equal, forward_and_gradients, poisoned_memory
from turbos.common.records import Documents
from turbos.ops import attention

HEADS, WIDTH, SCALE = 4, 6, 0.31
NAMES = ("q", "k", "v")


def make_inputs(tokens: int, kv_heads: int, seed: int = 0) -> list[Tensor]:
    """fp32 queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, heads, WIDTH, generator=generator) for heads in (HEADS, kv_heads, kv_heads)]


def packed(inputs: list[Tensor], lengths: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the packed form, under a fixed random weight."""
    documents = Documents.from_lengths(lengths)
    weight = torch.randn(sum(lengths), HEADS, WIDTH, generator=torch.Generator().manual_seed(3))
    return forward_and_gradients(
        lambda q, k, v: [attention.attention_packed(q, k, v, documents, SCALE)], inputs, [weight]
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_is_the_loop(lengths: tuple[int, ...], kv_heads: int) -> None:
    documents = Documents.from_lengths(lengths)
    inputs = make_inputs(sum(lengths), kv_heads)
    weight = torch.randn(sum(lengths), HEADS, WIDTH, generator=torch.Generator().manual_seed(3))
    outputs, gradients = forward_and_gradients(
        lambda q, k, v: [attention.attention_truth(q, k, v, documents, SCALE)], [x.double() for x in inputs], [weight]
    )
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        got, got_gradients = packed([x.to(dtype) for x in inputs], lengths)
        assert_close(got, outputs, tolerance, ("output",))
        assert_close(got_gradients, gradients, tolerance, NAMES)


def cached_case(earlier: tuple[int, ...], lengths: tuple[int, ...], kv_heads: int, filler: float):  # type: ignore[no-untyped-def]
    """Queries, a cache that holds earlier and own keys (and `filler` beyond), valid lengths, and the truth."""
    documents = Documents.from_lengths(lengths)
    q, k, v = (x.double() for x in make_inputs(sum(lengths), kv_heads))
    before = [tuple(x.double() for x in make_inputs(n, kv_heads, seed=n + 1)[1:]) for n in earlier]
    truth = attention.attention_truth(q, k, v, documents, SCALE, before)
    slots = max(old + new for old, new in zip(earlier, lengths, strict=True)) + 5
    cache = torch.full((2, len(lengths), slots, kv_heads, WIDTH), filler, dtype=torch.float64)
    for row, (start, end) in enumerate(zip(documents.borders, documents.borders[1:], strict=False)):
        for number, own in enumerate((k, v)):
            filled = torch.cat([before[row][number], own[start:end]])
            cache[number, row, : len(filled)] = filled
    totals = [old + new for old, new in zip(earlier, lengths, strict=True)]
    return q, cache[0], cache[1], totals, documents, truth


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("earlier", "lengths"), [((0,), (9,)), ((7,), (1,)), ((0, 31, 3), (5, 1, 40)), ((300, 0), (2, 290))], ids=str
)
def test_cached_is_the_loop(earlier: tuple[int, ...], lengths: tuple[int, ...], kv_heads: int) -> None:
    q, k, v, totals, documents, truth = cached_case(earlier, lengths, kv_heads, filler=float("nan"))
    got = attention.attention_cached(q, k, v, totals, documents, SCALE)
    assert_close([got], [truth], 1e-10, ("output",))


@pytest.mark.parametrize("rows", [1, 4, 7, 40, 100])
def test_blocks_of_queries_change_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, totals, documents, truth = cached_case((13, 0), (40, 6), 2, filler=0.0)
    monkeypatch.setattr(attention, "QUERY_ROWS", rows)
    assert_close([attention.attention_cached(q, k, v, totals, documents, SCALE)], [truth], 1e-10, ("output",))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("earlier", [(0,), (12, 0, 5), (3, 3)], ids=str)
def test_decode_is_the_loop(earlier: tuple[int, ...], kv_heads: int) -> None:
    lengths = (1,) * len(earlier)
    q, k, v, totals, _, truth = cached_case(earlier, lengths, kv_heads, filler=1e6)
    got = attention.attention_decode(q, k, v, torch.tensor(totals), max(totals), SCALE)
    assert_close([got], [truth], 1e-10, ("output",))


@pytest.mark.parametrize("poison", [3.0, float("nan")])
def test_a_document_cannot_touch_anothers_bits(poison: float) -> None:
    lengths = (30, 1, 17)
    outputs, gradients = packed(make_inputs(48, 2), lengths)
    inputs = make_inputs(48, 2)
    for tensor in inputs:
        tensor[11] = poison
    got, got_gradients = packed(inputs, lengths)
    assert bit_equal(outputs[0][30:], got[0][30:])
    for before, after, name in zip(gradients, got_gradients, NAMES, strict=True):
        assert bit_equal(before[30:], after[30:]), name


def test_the_future_does_not_matter() -> None:
    documents = Documents.from_lengths([40])
    q, k, v = make_inputs(40, 2)
    before = attention.attention_packed(q, k, v, documents, SCALE)
    k[25:] += 1.0
    v[25:] += 1.0
    after = attention.attention_packed(q, k, v, documents, SCALE)
    assert_close([after[:25]], [before[:25]], 1e-6, ("output",))
    assert not torch.equal(before[25:], after[25:])


def test_no_uninitialised_memory_is_read() -> None:
    lengths = (9, 1, 20)
    plain = packed(make_inputs(30, 2), lengths)
    with poisoned_memory():
        poisoned = packed(make_inputs(30, 2), lengths)
    for a, b in zip(plain[0] + plain[1], poisoned[0] + poisoned[1], strict=True):
        assert_close([b], [a], 1e-6, ("poisoned",))


@pytest.mark.parametrize("alpha", [1.0, 50.0])
def test_rotation_is_multiplication_of_complex_numbers(alpha: float) -> None:
    x = torch.randn(6, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 1, 2, 7, 0, 100])
    got = attention.rotate(x, positions, 10000.0, alpha)
    base = 10000.0 * alpha ** (8 / 6)
    for pair in range(4):
        angle = positions.double() * base ** (-2 * pair / 8)
        turned = torch.complex(x[..., pair], x[..., pair + 4]) * torch.exp(1j * angle)[:, None]
        # Angles are fp32 by design: 100 rad keeps about 1e-5.
        assert_close([got[..., pair], got[..., pair + 4]], [turned.real, turned.imag], 2e-5, ("real", "imaginary"))
    assert torch.equal(got[0], x[0]), "position 0 must not turn"


def test_rotated_products_depend_on_the_distance_only() -> None:
    q, k, _ = make_inputs(1, 4)
    products = []
    for shift in (0, 5, 90):
        rotated = [attention.rotate(x, torch.tensor([at + shift]), 10000.0) for x, at in ((q, 9), (k, 4))]
        products.append((rotated[0] * rotated[1]).sum(-1))
    assert_close(products[1:], products[:1] * 2, 1e-5, ("shift 5", "shift 90"))
    assert math.isclose(float(q.norm()), float(attention.rotate(q, torch.tensor([77]), 1e4).norm()), rel_tol=1e-5)
