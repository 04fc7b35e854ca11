"""Causal depthwise convolution: the packed form and the step against the float64 loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from op_cases import LENGTHS, assert_close, bit_equal, forward_and_gradients, poisoned_memory
from turbos.common.records import Documents
from turbos.ops.conv import causal_conv, conv_recurrent, conv_step

CHANNELS = 7
NAMES = ("x", "weight", "bias", "initial")


def make_inputs(lengths: tuple[int, ...], kernel: int) -> list[Tensor]:
    """fp32 x, weight, bias and initial rows."""
    generator = torch.Generator().manual_seed(kernel)
    shapes = ((sum(lengths), CHANNELS), (CHANNELS, kernel), (CHANNELS,), (len(lengths), kernel - 1, CHANNELS))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def make_weights(lengths: tuple[int, ...], kernel: int) -> list[Tensor]:
    """Weights of y and the final rows in the loss."""
    generator = torch.Generator().manual_seed(5)
    shapes = ((sum(lengths), CHANNELS), (len(lengths), kernel - 1, CHANNELS))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(op, inputs: list[Tensor], lengths: tuple[int, ...], kept: str):  # type: ignore[no-untyped-def]
    """Outputs and gradients with the optional inputs named in `kept` ("bias", "initial") and None for the others."""
    documents = Documents.from_lengths(lengths)
    kernel = inputs[1].shape[1]
    places = [0, 1, *(i for i in (2, 3) if NAMES[i] in kept)]

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        full: list[Tensor | None] = [None] * 4
        for place, tensor in zip(places, given, strict=True):
            full[place] = tensor
        return op(full[0], full[1], full[2], documents, full[3])

    outputs, gradients = forward_and_gradients(call, [inputs[i] for i in places], make_weights(lengths, kernel))
    return outputs, gradients, [NAMES[i] for i in places]


@pytest.mark.parametrize("kept", ["", "bias", "initial", "bias initial"])
@pytest.mark.parametrize("kernel", [2, 3, 4])
@pytest.mark.parametrize("lengths", [*LENGTHS, (2, 1, 3, 1)], ids=str)
def test_packed_is_the_loop(lengths: tuple[int, ...], kernel: int, kept: str) -> None:
    inputs = make_inputs(lengths, kernel)
    outputs, gradients, names = run(conv_recurrent, [x.double() for x in inputs], lengths, kept)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        got, got_gradients, _ = run(causal_conv, [x.to(dtype) for x in inputs], lengths, kept)
        assert all(tensor.dtype == dtype for tensor in got + got_gradients)
        assert_close(got, outputs, tolerance, ("y", "final"))
        assert_close(got_gradients, gradients, tolerance, names)


@pytest.mark.parametrize("kernel", [2, 4])
def test_steps_are_the_packed_form(kernel: int) -> None:
    batch, length = 3, 11
    x, weight, bias, state = (x.double() for x in make_inputs((length,) * batch, kernel))
    y, final = causal_conv(x, weight, bias, Documents.from_lengths([length] * batch), state)
    outputs = []
    for x_t in x.view(batch, length, CHANNELS).unbind(1):
        kept = state.clone()
        y_t, following = conv_step(x_t, weight, bias, state)
        assert torch.equal(state, kept), "the given state was changed"
        outputs.append(y_t)
        state = following
    assert_close([torch.stack(outputs, 1).flatten(0, 1), state], [y, final], 1e-12, ("y", "state"))


def test_step_without_bias() -> None:
    x, weight, _, state = make_inputs((1, 1), 4)
    y, _ = conv_step(x, weight, None, state)
    want, _ = causal_conv(x, weight, None, Documents.from_lengths([1, 1]), state)
    assert_close([y], [want], 1e-6, ("y",))


def test_pieces_with_carried_rows_are_the_whole() -> None:
    x, weight, bias, state = (x.double() for x in make_inputs((20,), 4))
    y, final = causal_conv(x, weight, bias, Documents.from_lengths([20]), state)
    parts = []
    for piece in x.split([1, 2, 9, 8]):
        part, state = causal_conv(piece, weight, bias, Documents.from_lengths([len(piece)]), state)
        parts.append(part)
    assert_close([torch.cat(parts), state], [y, final], 1e-12, ("y", "final"))


@pytest.mark.parametrize("poison", [2.0, float("nan")])
def test_a_document_cannot_touch_anothers_bits(poison: float) -> None:
    lengths = (6, 1, 9)
    outputs, gradients, names = run(causal_conv, make_inputs(lengths, 4), lengths, "bias initial")
    inputs = make_inputs(lengths, 4)
    inputs[0][5] = poison
    inputs[3][0] = poison
    got, got_gradients, _ = run(causal_conv, inputs, lengths, "bias initial")
    assert bit_equal(outputs[0][6:], got[0][6:]) and bit_equal(outputs[1][1:], got[1][1:])
    assert bit_equal(gradients[0][6:], got_gradients[0][6:]), names[0]
    assert bit_equal(gradients[3][1:], got_gradients[3][1:]), names[3]


def test_the_future_does_not_matter() -> None:
    x, weight, bias, _ = make_inputs((12,), 4)
    documents = Documents.from_lengths([12])
    y, _ = causal_conv(x, weight, bias, documents)
    x[8:] += 1.0
    changed, _ = causal_conv(x, weight, bias, documents)
    assert bit_equal(y[:8], changed[:8])
    assert not torch.equal(y[8], changed[8])


def test_no_uninitialised_memory_is_read() -> None:
    lengths = (5, 1, 2)
    plain = run(causal_conv, make_inputs(lengths, 4), lengths, "bias initial")
    with poisoned_memory():
        poisoned = run(causal_conv, make_inputs(lengths, 4), lengths, "bias initial")
    for a, b in zip(plain[0] + plain[1], poisoned[0] + poisoned[1], strict=True):
        assert torch.equal(a, b)
