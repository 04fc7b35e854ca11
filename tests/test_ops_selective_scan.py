"""Mamba-1's selective scan: chunked and one-step forms against the float64 recurrence.

Sizes are odd on purpose (7 channels, 5 states). Tolerances are relative to the largest value of the truth.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from op_cases import LENGTHS, assert_close, bit_equal, forward_and_gradients, poisoned_memory, relative_error
from turbos.common.records import Documents
from turbos.ops.selective_scan import selective_scan_chunked, selective_scan_recurrent, selective_scan_step
from turbos.ops.ssd import ssd_recurrent

CHANNELS, STATES = 7, 5
INPUTS = ("x", "dt", "A", "B", "C", "initial")
FLOAT32, FLOAT64 = 2e-5, 1e-10


def make_inputs(lengths: tuple[int, ...], initial: bool, seed: int = 0) -> list[Tensor]:
    """fp32 inputs of the scan (as a list: x, dt, A, B, C and, if wanted, the initial state)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dt = torch.rand(tokens, CHANNELS, generator=generator) * 0.5 + 1e-3
    A = -torch.rand(STATES, CHANNELS, generator=generator) * 4 - 0.05
    inputs = [normal(tokens, CHANNELS), dt, A, normal(tokens, STATES), normal(tokens, STATES)]
    return [*inputs, normal(len(lengths), STATES, CHANNELS)] if initial else inputs


def make_weights(lengths: tuple[int, ...]) -> list[Tensor]:
    """Weights of the outputs y and final state in the loss whose gradient is compared."""
    generator = torch.Generator().manual_seed(99)
    shapes = ((sum(lengths), CHANNELS), (len(lengths), STATES, CHANNELS))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@lru_cache(maxsize=64)
def truth(lengths: tuple[int, ...], initial: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the float64 recurrence."""
    documents = Documents.from_lengths(lengths)
    inputs = [x.double() for x in make_inputs(lengths, initial)]
    return forward_and_gradients(
        lambda x, dt, A, B, C, *s: selective_scan_recurrent(x, dt, A, B, C, documents, *s),
        inputs,
        make_weights(lengths),
    )


def chunked(inputs: list[Tensor], lengths: tuple[int, ...], chunk_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of the chunked form."""
    documents = Documents.from_lengths(lengths)

    def op(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *s: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan_chunked(x, dt, A, B, C, documents, *s, chunk_size=chunk_size)

    return forward_and_gradients(op, inputs, make_weights(lengths))


def test_two_tokens_by_hand() -> None:
    x, dt = torch.tensor([[3.0], [5.0]]).double(), torch.tensor([[0.5], [2.0]]).double()
    A, B = torch.tensor([[-1.0], [-0.25]]).double(), torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    C = torch.tensor([[1.0, 1.0], [10.0, 1.0]]).double()
    # States after token 0: 0.5 * 3 * (1, 2); the second token halves nothing but by e ** (2 A).
    first = 1.5 + 3.0
    second = 10 * 1.5 * torch.e**-2 + 3.0 * torch.e**-0.5 + 2 * 5 * 1
    for form in (selective_scan_recurrent, selective_scan_chunked):
        y, _ = form(x, dt, A, B, C, Documents.from_lengths([2]))
        assert y[:, 0].tolist() == pytest.approx([first, second], rel=1e-12)


def test_with_one_rate_for_all_channels_and_states_it_is_mamba2s_scan() -> None:
    # Two heads of Mamba2 with one group are channels whose states share a rate and whose steps are alike.
    lengths, heads, width = (30, 1, 8), 2, 3
    documents = Documents.from_lengths(lengths)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(39, heads, width, generator=generator).double()
    dt, A = torch.rand(39, heads, generator=generator).double(), -torch.rand(heads, generator=generator).double()
    B, C = (torch.randn(39, STATES, generator=generator).double() for _ in range(2))
    want, final = ssd_recurrent(x, dt, A, B[:, None], C[:, None], documents)
    spread = dt.repeat_interleave(width, 1)
    rates = A.repeat_interleave(width).expand(STATES, heads * width)
    got, state = selective_scan_recurrent(x.flatten(1), spread, rates, B, C, documents)
    assert relative_error(got, want.flatten(1)) < 1e-12
    assert relative_error(state, final.flatten(1, 2).transpose(1, 2)) < 1e-12


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
@pytest.mark.parametrize("initial", [False, True], ids=["fresh", "carried"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_chunked_is_the_recurrence(lengths: tuple[int, ...], initial: bool, chunk_size: int) -> None:
    outputs, gradients = truth(lengths, initial)
    inputs = make_inputs(lengths, initial)
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        got, got_gradients = chunked([x.to(dtype) for x in inputs], lengths, chunk_size)
        assert all(tensor.dtype == dtype for tensor in got + got_gradients)
        assert_close(got, outputs, tolerance, ("y", "final"))
        # The gradient in A vanishes where no document has a second token.
        assert_close(got_gradients, gradients, tolerance, INPUTS[: len(inputs)], floor=1.0)


@pytest.mark.parametrize("unused", [0, 1], ids=["final state only", "y only"])
def test_a_loss_on_one_output_only(unused: int) -> None:
    lengths = (33, 2, 70)
    documents = Documents.from_lengths(lengths)
    inputs = [x.double() for x in make_inputs(lengths, True)]
    weights: list[Tensor | None] = [*make_weights(lengths)]
    weights[unused] = None
    _, want = forward_and_gradients(lambda *a: selective_scan_recurrent(*a[:5], documents, a[5]), inputs, weights)
    _, got = forward_and_gradients(lambda *a: selective_scan_chunked(*a[:5], documents, a[5], 16), inputs, weights)
    assert_close(got, want, FLOAT64, INPUTS)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_any_chunk_size_gives_the_same(chunk_size: int) -> None:
    lengths = (19, 1, 8)
    outputs, gradients = truth(lengths, True)
    got, got_gradients = chunked([x.double() for x in make_inputs(lengths, True)], lengths, chunk_size)
    assert_close(got, outputs, FLOAT64, ("y", "final"))
    assert_close(got_gradients, gradients, FLOAT64, INPUTS)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_steps_are_the_recurrence(dtype: torch.dtype, tolerance: float) -> None:
    batch, length = 3, 37
    x, dt, A, B, C, state = (x.to(dtype) for x in make_inputs((length,) * batch, True))
    wide = [tensor.double() for tensor in (x, dt, A, B, C)]
    want, final = selective_scan_recurrent(*wide, Documents.from_lengths([length] * batch), state.double())
    by_row = [tensor.view(batch, length, -1) for tensor in (x, dt, B, C)]
    outputs = []
    for t in range(length):
        x_t, dt_t, B_t, C_t = (tensor[:, t] for tensor in by_row)
        kept = state.clone()
        y_t, following = selective_scan_step(x_t, dt_t, A, B_t, C_t, state)
        assert torch.equal(state, kept), "the given state was changed"
        outputs.append(y_t)
        state = following
    assert_close([torch.stack(outputs, 1).flatten(0, 1), state], [want, final], tolerance, ("y", "state"))


def test_a_document_in_two_calls_is_the_document_in_one() -> None:
    cut, lengths = 29, (100,)
    x, dt, A, B, C, state = (x.double() for x in make_inputs(lengths, True))
    y, final = selective_scan_chunked(x, dt, A, B, C, Documents.from_lengths(lengths), state, chunk_size=16)
    parts = []
    for piece in (slice(0, cut), slice(cut, 100)):
        documents = Documents.from_lengths([len(range(100)[piece])])
        part, state = selective_scan_chunked(x[piece], dt[piece], A, B[piece], C[piece], documents, state, 16)
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
    inputs = extreme(kind, make_inputs(lengths, True))
    weights = make_weights(lengths)
    wide = [x.double() for x in inputs]
    want, want_gradients = forward_and_gradients(
        lambda *a: selective_scan_recurrent(*a[:5], documents, a[5]), wide, weights
    )
    got, gradients = chunked([x.to(dtype) for x in inputs], lengths, 64)
    assert all(tensor.isfinite().all() for tensor in got + gradients)
    assert_close(got, want, tolerance, ("y", "final"))
    assert_close(gradients, want_gradients, tolerance, INPUTS, floor=1.0)


def test_long_documents_stay_true_in_fp32() -> None:
    lengths = (3000,)
    documents = Documents.from_lengths(lengths)
    inputs = make_inputs(lengths, False)
    inputs[2] *= 0.01
    want, _ = selective_scan_recurrent(*(x.double() for x in inputs), documents)
    got, _ = selective_scan_chunked(*inputs, documents)
    assert relative_error(got, want) < FLOAT32


@pytest.mark.parametrize("lengths", [(5,), (64,), (33, 2, 1, 65, 3)], ids=str)
def test_no_uninitialised_memory_is_read(lengths: tuple[int, ...]) -> None:
    inputs = make_inputs(lengths, True)
    plain = chunked(inputs, lengths, 16)
    with poisoned_memory():
        poisoned = chunked(inputs, lengths, 16)
    for a, b, name in zip(plain[0] + plain[1], poisoned[0] + poisoned[1], ("y", "final", *INPUTS), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("poison", [1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("place", [7, 39])
def test_a_document_cannot_touch_anothers_bits(poison: float, place: int) -> None:
    lengths = (40, 23, 1)
    before = chunked(make_inputs(lengths, True), lengths, 16)
    inputs = make_inputs(lengths, True)
    for index in (0, 1, 3, 4):
        inputs[index][place] = poison
    inputs[5][0] += poison
    after = chunked(inputs, lengths, 16)
    others = slice(40, None)
    assert not bit_equal(before[0][0][:40], after[0][0][:40])
    assert bit_equal(before[0][0][others], after[0][0][others])
    assert bit_equal(before[0][1][1:], after[0][1][1:])
    for index in (0, 1, 3, 4):
        assert bit_equal(before[1][index][others], after[1][index][others]), INPUTS[index]
    assert bit_equal(before[1][5][1:], after[1][5][1:])


def test_the_future_does_not_matter() -> None:
    lengths = (70,)
    documents = Documents.from_lengths(lengths)
    inputs = make_inputs(lengths, False)
    y, _ = selective_scan_chunked(*inputs, documents, chunk_size=16)
    for index in (0, 1, 3, 4):
        inputs[index][41:] += 1.0
    changed, _ = selective_scan_chunked(*inputs, documents, chunk_size=16)
    assert bit_equal(y[:41], changed[:41])
    assert not torch.equal(y[41:], changed[41:])


def test_half_precision_inputs_are_scanned_in_the_precision_of_dt() -> None:
    lengths = (50, 9)
    documents = Documents.from_lengths(lengths)
    x, dt, A, B, C = make_inputs(lengths, False)
    x, B, C = (tensor.bfloat16() for tensor in (x, B, C))
    y, final = selective_scan_chunked(x, dt, A, B, C, documents)
    want, want_final = selective_scan_chunked(x.float(), dt, A, B.float(), C.float(), documents)
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(y, want.bfloat16()) and torch.equal(final, want_final)


def test_inputs_that_are_views_of_a_wider_row_are_read_right() -> None:
    # As the mixer gives them: B and C are columns of one projection, A a transposed parameter.
    lengths = (21, 12)
    documents = Documents.from_lengths(lengths)
    x, dt, A, B, C = make_inputs(lengths, False)
    wide = torch.cat([B, C], 1)
    views = [x, dt, A.T.contiguous().T, wide[:, :STATES], wide[:, STATES:]]
    outputs, gradients = forward_and_gradients(
        lambda *a: selective_scan_chunked(*a, documents), [x, dt, A, B, C], make_weights(lengths)
    )
    got, got_gradients = forward_and_gradients(
        lambda *a: selective_scan_chunked(*a, documents), views, make_weights(lengths)
    )
    assert all(torch.equal(a, b) for a, b in zip(got + got_gradients, outputs + gradients, strict=True))


def test_memory_between_forward_and_backward_does_not_hold_every_state() -> None:
    # What autograd keeps of a long document: its inputs, and one state of 16 x 64 for each chunk, not for each token.
    tokens, states, channels = 2048, 16, 64
    x, dt = torch.randn(tokens, channels, requires_grad=True), torch.rand(tokens, channels)
    B, C = torch.randn(tokens, states), torch.randn(tokens, states)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        selective_scan_chunked(x, dt, -torch.rand(states, channels), B, C, Documents.from_lengths([tokens]))
    inputs = 2 * tokens * (channels + states) + states * channels
    assert sum(kept) == inputs + (tokens // 64 - 1) * states * channels
