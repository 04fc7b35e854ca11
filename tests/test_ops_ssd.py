"""The selective-state-space scan: chunked and one-step forms against the float64 recurrence.

Sizes are odd on purpose (head width 5, state 6). Tolerances are relative to the largest value of the truth.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from op_cases import LENGTHS, assert_close, bit_equal, forward_and_gradients, poisoned_memory
from turbos.common.records import Documents
from turbos.ops.ssd import ssd_chunked, ssd_recurrent, ssd_step

HEADS, WIDTH, STATE = 4, 5, 6
INPUTS = ("x", "dt", "A", "B", "C", "initial")
FLOAT32, FLOAT64 = 2e-5, 1e-10


def make_inputs(lengths: tuple[int, ...], groups: int, initial: bool, seed: int = 0) -> list[Tensor]:
    """fp32 inputs of the scan (as a list: x, dt, A, B, C and, if wanted, the initial state)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dt = torch.rand(tokens, HEADS, generator=generator) * 0.5 + 1e-3
    A = -torch.rand(HEADS, generator=generator) * 4 - 0.05
    inputs = [normal(tokens, HEADS, WIDTH), dt, A, normal(tokens, groups, STATE), normal(tokens, groups, STATE)]
    return [*inputs, normal(len(lengths), HEADS, WIDTH, STATE)] if initial else inputs


def make_weights(lengths: tuple[int, ...]) -> list[Tensor]:
    """Weights of the outputs y and final state in the loss whose gradient is compared."""
    generator = torch.Generator().manual_seed(99)
    shapes = ((sum(lengths), HEADS, WIDTH), (len(lengths), HEADS, WIDTH, STATE))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@lru_cache(maxsize=64)
def truth(lengths: tuple[int, ...], groups: int, initial: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the float64 recurrence."""
    documents = Documents.from_lengths(lengths)
    inputs = [x.double() for x in make_inputs(lengths, groups, initial)]
    return forward_and_gradients(
        lambda x, dt, A, B, C, *s: ssd_recurrent(x, dt, A, B, C, documents, *s), inputs, make_weights(lengths)
    )


def chunked(inputs: list[Tensor], lengths: tuple[int, ...], chunk_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the chunked form."""
    documents = Documents.from_lengths(lengths)

    def op(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *s: Tensor) -> tuple[Tensor, Tensor]:
        return ssd_chunked(x, dt, A, B, C, documents, *s, chunk_size=chunk_size)

    return forward_and_gradients(op, inputs, make_weights(lengths))


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
@pytest.mark.parametrize("initial", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunked_is_the_recurrence(lengths: tuple[int, ...], groups: int, initial: bool, chunk_size: int) -> None:
    outputs, gradients = truth(lengths, groups, initial)
    inputs = make_inputs(lengths, groups, initial)
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        got, got_gradients = chunked([x.to(dtype) for x in inputs], lengths, chunk_size)
        assert all(tensor.dtype == dtype for tensor in got + got_gradients)
        assert_close(got, outputs, tolerance, ("y", "final"))
        # The gradient in A and dt sums differences over a document, and may vanish: five times the tolerance, floor 1.
        assert_close(got_gradients, gradients, tolerance * 5, INPUTS[: len(inputs)], floor=1.0)


@pytest.mark.parametrize("unused", [0, 1], ids=["final state only", "y only"])
def test_a_loss_on_one_output_only(unused: int) -> None:
    lengths = (33, 2, 70)
    documents = Documents.from_lengths(lengths)
    inputs = [x.double() for x in make_inputs(lengths, 2, True)]
    weights: list[Tensor | None] = [*make_weights(lengths)]
    weights[unused] = None
    _, want = forward_and_gradients(lambda *a: ssd_recurrent(*a[:5], documents, a[5]), inputs, weights)
    _, got = forward_and_gradients(lambda *a: ssd_chunked(*a[:5], documents, a[5], chunk_size=16), inputs, weights)
    assert_close(got, want, FLOAT64, INPUTS)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_any_chunk_size_gives_the_same(chunk_size: int) -> None:
    lengths = (19, 1, 8)
    outputs, gradients = truth(lengths, 2, True)
    got, got_gradients = chunked([x.double() for x in make_inputs(lengths, 2, True)], lengths, chunk_size)
    assert_close(got, outputs, FLOAT64, ("y", "final"))
    assert_close(got_gradients, gradients, FLOAT64, INPUTS)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_steps_are_the_chunked_form(groups: int, dtype: torch.dtype, tolerance: float) -> None:
    batch, length = 3, 37
    x, dt, A, B, C, state = (x.to(dtype) for x in make_inputs((length,) * batch, groups, True))
    y, final = ssd_chunked(x, dt, A, B, C, Documents.from_lengths([length] * batch), state, chunk_size=16)
    by_row = [tensor.view(batch, length, *tensor.shape[1:]) for tensor in (x, dt, B, C)]
    outputs = []
    for t in range(length):
        x_t, dt_t, B_t, C_t = (tensor[:, t] for tensor in by_row)
        kept = state.clone()
        y_t, following = ssd_step(x_t, dt_t, A, B_t, C_t, state)
        assert torch.equal(state, kept), "the given state was changed"
        outputs.append(y_t)
        state = following
    assert_close([torch.stack(outputs, 1).flatten(0, 1), state], [y, final], tolerance, ("y", "state"))


def test_a_document_in_two_calls_is_the_document_in_one() -> None:
    cut, lengths = 29, (100,)
    x, dt, A, B, C, state = (x.double() for x in make_inputs(lengths, 2, True))
    y, final = ssd_chunked(x, dt, A, B, C, Documents.from_lengths(lengths), state, chunk_size=16)
    parts = []
    for piece in (slice(0, cut), slice(cut, 100)):
        documents = Documents.from_lengths([len(range(100)[piece])])
        part, state = ssd_chunked(x[piece], dt[piece], A, B[piece], C[piece], documents, state, chunk_size=16)
        parts.append(part)
    assert_close([torch.cat(parts), state], [y, final], FLOAT64, ("y", "final"))


def extreme(kind: str, inputs: list[Tensor]) -> list[Tensor]:
    """Inputs with steps and decays at the ends of what softplus and exp can give."""
    x, dt, A, *rest = inputs
    if kind == "instant decay":
        dt, A = torch.full_like(dt, 60.0), torch.full_like(A, -16.0)
    elif kind == "no step":
        dt = torch.zeros_like(dt)
    elif kind == "no decay":
        dt, A = torch.full_like(dt, 0.5), torch.full_like(A, -1e-8)
    elif kind == "one huge step":
        dt = dt.clone()
        dt[::7] = 300.0
    else:
        dt = torch.where(torch.arange(dt.shape[0])[:, None] % 2 == 0, 1e-20, 30.0).expand_as(dt).clone()
    return [x, dt, A, *rest]


@pytest.mark.parametrize("kind", ["instant decay", "no step", "no decay", "one huge step", "mixed"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, 1e-4)])
def test_extremes_stay_finite_and_true(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    lengths = (90, 1, 20)
    documents = Documents.from_lengths(lengths)
    inputs = extreme(kind, make_inputs(lengths, 2, True))
    weights = make_weights(lengths)
    wide = [x.double() for x in inputs]
    want, want_gradients = forward_and_gradients(lambda *a: ssd_recurrent(*a[:5], documents, a[5]), wide, weights)
    got, gradients = chunked([x.to(dtype) for x in inputs], lengths, 64)
    assert all(tensor.isfinite().all() for tensor in got + gradients)
    assert_close(got, want, tolerance, ("y", "final"))
    # dt and A are judged together with what they multiply: at instant decay the truth is a difference of huge terms.
    names = ("x", "B", "C", "initial")
    picked = (0, 3, 4, 5)
    assert_close([gradients[i] for i in picked], [want_gradients[i] for i in picked], tolerance, names)
    if dtype == torch.float64:
        assert_close(gradients[1:3], want_gradients[1:3], 1e-8, ("dt", "A"), floor=1.0)


@pytest.mark.parametrize("lengths", [(5,), (64,), (33, 2, 1, 65, 3)], ids=str)
def test_no_uninitialised_memory_is_read(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(lengths, 2, True)
    plain = chunked(inputs, lengths, 16)
    with poisoned_memory():
        poisoned = chunked(inputs, lengths, 16)
    for a, b, name in zip(plain[0] + plain[1], poisoned[0] + poisoned[1], ("y", "final", *INPUTS), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("poison", [1.5, float("nan"), float("inf")])
def test_a_document_cannot_touch_anothers_bits(poison: float) -> None:
    lengths = (40, 23, 1)
    before = chunked(make_inputs(lengths, 2, True), lengths, 16)
    inputs = make_inputs(lengths, 2, True)
    for index in (0, 3, 4):
        inputs[index][7] = poison
    inputs[5][0] += poison
    after = chunked(inputs, lengths, 16)
    others = slice(40, None)
    assert bit_equal(before[0][0][others], after[0][0][others])
    assert bit_equal(before[0][1][1:], after[0][1][1:])
    for index in (0, 1, 3, 4):
        assert bit_equal(before[1][index][others], after[1][index][others]), INPUTS[index]
    assert bit_equal(before[1][5][1:], after[1][5][1:])


def test_the_future_does_not_matter() -> None:
    lengths = (70,)
    documents = Documents.from_lengths(lengths)
    inputs = make_inputs(lengths, 1, False)
    y, _ = ssd_chunked(*inputs, documents, chunk_size=16)
    for index in (0, 3, 4):
        inputs[index][41:] += 1.0
    changed, _ = ssd_chunked(*inputs, documents, chunk_size=16)
    assert bit_equal(y[:41], changed[:41])
    assert not torch.equal(y[41:], changed[41:])


def test_half_precision_inputs_are_scanned_in_the_precision_of_dt() -> None:
    lengths = (50, 9)
    documents = Documents.from_lengths(lengths)
    x, dt, A, B, C = make_inputs(lengths, 1, False)
    x, B, C = (tensor.bfloat16() for tensor in (x, B, C))
    y, final = ssd_chunked(x, dt, A, B, C, documents)
    want, want_final = ssd_chunked(x.float(), dt, A, B.float(), C.float(), documents)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(y, want.bfloat16()) and torch.equal(final, want_final)
