"""Mamba-1's selective scan in three forms that agree: each channel has decay rates of its own, one for every state.

`selective_scan_recurrent` is the truth, one token at a time, meant for float64. `selective_scan_chunked` cuts every
document into chunks, works on a chunk's decays, writes and reads as whole tensors, keeps only the states between chunks
and computes the rest again in its backward. `selective_scan_step` advances many sequences by one token. The softplus of
`dt`, the skip term `D * x` and the gate belong to the mixer. It is not a matrix product, as Mamba2's scan is
(`ops.ssd`): that needs one decay rate for a whole head, and is why Mamba2 has only one.

Per channel i and state n:  `h = exp(dt_i A_ni) h + dt_i x_i B_n`,  `y_i = sum over n of C_n h_n`  (Gu & Dao 2023, arXiv
2312.00752, algorithm 2, with the simplified step for B of its reference code).

Shapes: T tokens, D documents, I channels, N states of a channel, Q tokens of a chunk. Channels come last everywhere:
they are many and lie side by side, so every elementary operation runs over long rows.

>>> x = torch.tensor([[2.0], [0.0]])
>>> half = torch.full((1, 1), -0.6931471805599453)
>>> ones = torch.ones(2, 1)
>>> selective_scan_chunked(x, ones, half, ones, ones, Documents.from_lengths([2]))[0].flatten().tolist()
[2.0, 1.0]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbos.common.records import Documents
from turbos.ops.exponential import LOG2_E


def selective_scan_recurrent(
    x_TI: Tensor,
    dt_TI: Tensor,
    A_NI: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    documents: Documents,
    initial_DNI: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan, token by token: the truth. Returns `y_TI` and the state after each document, `[D, N, I]`."""
    outputs, finals = [], []
    for document, (start, end) in enumerate(pairwise(documents.borders)):
        state_NI = torch.zeros_like(A_NI) if initial_DNI is None else initial_DNI[document]
        for t in range(start, end):
            write_NI = B_TN[t][:, None] * (dt_TI[t] * x_TI[t])
            state_NI = torch.exp(dt_TI[t] * A_NI) * state_NI + write_NI
            outputs.append((C_TN[t][:, None] * state_NI).sum(0))
        finals.append(state_NI)
    return torch.stack(outputs), torch.stack(finals)


def selective_scan_step(
    x_BI: Tensor, dt_BI: Tensor, A_NI: Tensor, B_BN: Tensor, C_BN: Tensor, state_BNI: Tensor
) -> tuple[Tensor, Tensor]:
    """One token for each of B sequences: returns `y_BI` and the next state; the given state is not changed."""
    decay_BNI = torch.exp2(dt_BI[:, None] * (A_NI * LOG2_E))
    write_BNI = B_BN[:, :, None] * (dt_BI * x_BI)[:, None]
    next_BNI = torch.addcmul(write_BNI, decay_BNI, state_BNI)
    return torch.bmm(C_BN[:, None], next_BNI)[:, 0], next_BNI


@dataclass(frozen=True)
class _Chunk:
    """A run of one document's tokens; `before` and `after` number the kept states at its ends.

    None: the document begins here, or ends.
    """

    document: int
    rows: slice
    before: int | None
    after: int | None

    @property
    def tokens(self) -> int:
        """How many."""
        return self.rows.stop - self.rows.start


def _chunks(borders: list[int], chunk_size: int) -> tuple[list[_Chunk], int]:
    """The chunks in order, and how many states are kept between chunks of one document."""
    chunks: list[_Chunk] = []
    kept = 0
    for document, (start, end) in enumerate(pairwise(borders)):
        for first in range(start, end, chunk_size):
            stop = min(first + chunk_size, end)
            before, after = None if first == start else kept - 1, None if stop == end else kept
            chunks.append(_Chunk(document, slice(first, stop), before, after))
            kept += stop < end
    return chunks, kept


@dataclass(frozen=True)
class _Inputs:
    """What a scan reads, in one precision; `A_NI` still for e ** x, `rates_NI` for 2 ** x."""

    x_TI: Tensor
    dt_TI: Tensor
    A_NI: Tensor
    B_TN: Tensor
    C_TN: Tensor
    initial_DNI: Tensor | None
    rates_NI: Tensor

    def before(self, chunk: _Chunk, kept_SNI: Tensor) -> Tensor | None:
        """The state with which a chunk begins; None is zero."""
        if chunk.before is not None:
            return kept_SNI[chunk.before]
        return None if self.initial_DNI is None else self.initial_DNI[chunk.document]

    def states(self, rows: slice, before_NI: Tensor | None, decay_QNI: Tensor, state_QNI: Tensor) -> None:
        """Fill the decay and the state of every token of a chunk."""
        torch.mul(self.dt_TI[rows, None], self.rates_NI, out=decay_QNI).exp2_()
        write_QI = self.dt_TI[rows] * self.x_TI[rows]
        torch.mul(self.B_TN[rows, :, None], write_QI[:, None], out=state_QNI)
        earlier_NI = before_NI
        for decay_NI, state_NI in zip(decay_QNI.unbind(0), state_QNI.unbind(0), strict=True):
            if earlier_NI is not None:
                state_NI.addcmul_(decay_NI, earlier_NI)
            earlier_NI = state_NI


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the inputs, filled chunk by chunk; that of A sums over all."""

    x_TI: Tensor
    dt_TI: Tensor
    A_NI: Tensor
    B_TN: Tensor
    C_TN: Tensor
    initial_DNI: Tensor | None

    @classmethod
    def empty(cls, inputs: _Inputs) -> _Gradients:
        """Space for them."""
        like = (torch.empty_like(x) for x in (inputs.x_TI, inputs.dt_TI, inputs.B_TN, inputs.C_TN))
        x_TI, dt_TI, B_TN, C_TN = like
        initial = inputs.initial_DNI
        dinitial_DNI = None if initial is None else torch.empty_like(initial)
        return cls(x_TI, dt_TI, torch.zeros_like(inputs.A_NI), B_TN, C_TN, dinitial_DNI)

    def fill(self, inputs: _Inputs, chunk: _Chunk, before_NI: Tensor | None, space: _Space, dy_QI: Tensor) -> Tensor:
        """Write a chunk's rows; `space.grad` holds the gradients of its states. Returns that of the state before it."""
        rows = chunk.rows
        decay_QNI, state_QNI, grad_QNI, work_QNI = space.of(chunk)
        x_QI, dt_QI = inputs.x_TI[rows], inputs.dt_TI[rows]
        before_gradient_NI = decay_QNI[0] * grad_QNI[0]

        torch.sum(torch.mul(state_QNI, dy_QI[:, None], out=work_QNI), -1, out=self.C_TN[rows])
        torch.sum(torch.mul(grad_QNI, (dt_QI * x_QI)[:, None], out=work_QNI), -1, out=self.B_TN[rows])
        write_QI = torch.bmm(inputs.B_TN[rows, None], grad_QNI)[:, 0]
        torch.mul(write_QI, dt_QI, out=self.x_TI[rows])

        # What dt * A scales is the decayed state before each token.
        decay_QNI[1:].mul_(state_QNI[:-1])
        if before_NI is None:
            decay_QNI[0].zero_()
        else:
            decay_QNI[0].mul_(before_NI)
        exponent_QNI = decay_QNI.mul_(grad_QNI)
        self.A_NI.add_(torch.mul(exponent_QNI, dt_QI[:, None], out=work_QNI).sum(0))
        torch.sum(torch.mul(exponent_QNI, inputs.A_NI, out=work_QNI), 1, out=self.dt_TI[rows])
        self.dt_TI[rows].addcmul_(write_QI, x_QI)
        return before_gradient_NI


@dataclass(frozen=True)
class _Space:
    """Working memory of the longest chunk: decays, states, and for the backward their gradients and products."""

    tensors: tuple[Tensor, ...]

    @classmethod
    def for_chunks(cls, chunks: list[_Chunk], A_NI: Tensor, count: int) -> _Space:
        """`count` tensors `[Q, N, I]`."""
        longest = max(chunk.tokens for chunk in chunks)
        return cls(tuple(A_NI.new_empty(longest, *A_NI.shape) for _ in range(count)))

    def of(self, chunk: _Chunk) -> Iterator[Tensor]:
        """The part that a chunk uses."""
        return (tensor[: chunk.tokens] for tensor in self.tensors)


class _SelectiveScan(torch.autograd.Function):
    """Forward and backward of the chunked scan; keeps the state before each chunk that continues a document."""

    @staticmethod
    def forward(ctx, x_TI, dt_TI, A_NI, B_TN, C_TN, initial_DNI, borders, chunk_size):  # type: ignore[no-untyped-def]
        inputs = _Inputs(x_TI, dt_TI, A_NI, B_TN, C_TN, initial_DNI, A_NI * LOG2_E)
        chunks, kept = _chunks(borders, chunk_size)
        space = _Space.for_chunks(chunks, A_NI, 2)
        kept_SNI = A_NI.new_empty(kept, *A_NI.shape)
        final_DNI = A_NI.new_empty(len(borders) - 1, *A_NI.shape)
        y_TI = torch.empty_like(x_TI)
        for chunk in chunks:
            rows = chunk.rows
            decay_QNI, state_QNI = space.of(chunk)
            inputs.states(rows, inputs.before(chunk, kept_SNI), decay_QNI, state_QNI)
            torch.bmm(C_TN[rows, None], state_QNI, out=y_TI[rows, None])
            after_NI = final_DNI[chunk.document] if chunk.after is None else kept_SNI[chunk.after]
            after_NI.copy_(state_QNI[-1])
        ctx.save_for_backward(x_TI, dt_TI, A_NI, B_TN, C_TN, initial_DNI, kept_SNI)
        ctx.chunks = chunks
        return y_TI, final_DNI

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TI: Tensor, dfinal_DNI: Tensor):  # type: ignore[no-untyped-def]
        *tensors, kept_SNI = ctx.saved_tensors
        x_TI, dt_TI, A_NI, B_TN, C_TN, initial_DNI = tensors
        inputs = _Inputs(x_TI, dt_TI, A_NI, B_TN, C_TN, initial_DNI, A_NI * LOG2_E)
        space = _Space.for_chunks(ctx.chunks, A_NI, 4)
        gradients = _Gradients.empty(inputs)
        after_NI = dfinal_DNI[0]
        for chunk in reversed(ctx.chunks):
            rows = chunk.rows
            decay_QNI, state_QNI, grad_QNI, _ = space.of(chunk)
            before_NI = inputs.before(chunk, kept_SNI)
            inputs.states(rows, before_NI, decay_QNI, state_QNI)
            torch.mul(inputs.C_TN[rows, :, None], dy_TI[rows, None], out=grad_QNI)
            grad_QNI[-1] += dfinal_DNI[chunk.document] if chunk.after is None else after_NI
            _flow_back(decay_QNI, grad_QNI)
            after_NI = gradients.fill(inputs, chunk, before_NI, space, dy_TI[rows])
            if gradients.initial_DNI is not None and chunk.before is None:
                gradients.initial_DNI[chunk.document] = after_NI
        g = gradients
        return g.x_TI, g.dt_TI, g.A_NI, g.B_TN, g.C_TN, g.initial_DNI, None, None


def _flow_back(decay_QNI: Tensor, grad_QNI: Tensor) -> None:
    """Add to each state's gradient what it passes on to the next token's state."""
    decays, grads = decay_QNI.unbind(0), grad_QNI.unbind(0)
    for t in range(len(grads) - 1, 0, -1):
        grads[t - 1].addcmul_(decays[t], grads[t])


def selective_scan_chunked(
    x_TI: Tensor,
    dt_TI: Tensor,
    A_NI: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    documents: Documents,
    initial_DNI: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The scan in chunks of `chunk_size` tokens; same meaning and shapes as `selective_scan_recurrent`.

    Works in the precision of `dt` (fp32, or float64 in tests) whatever the inputs are; `y` comes back in `x`'s dtype,
    the state in `dt`'s. Memory beyond the outputs: two tensors of a chunk (four in the backward), and one state for
    every `chunk_size` tokens. Chunks never cross documents, so one document cannot touch another's bits.
    """
    work = dt_TI.dtype
    x, B, C = (tensor.to(work).contiguous() for tensor in (x_TI, B_TN, C_TN))
    y_TI, final_DNI = _SelectiveScan.apply(
        x, dt_TI, A_NI.contiguous(), B, C, initial_DNI, documents.borders, chunk_size
    )
    return y_TI.to(x_TI.dtype), final_DNI
