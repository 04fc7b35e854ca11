"""Blocks of matrix products, the innermost loops of the fused step, written as LLVM code.

A `product tile` is R outputs for B inputs at once: `out[b][r] = scale[r] * sum_i weight[r, i] * x[b][i]`. Each of the
R x B sums has a register of its own and adds its numbers in the same order whatever R and B are, lane by lane and then
across lanes; so an output has the same bits alone and in any batch. A `mixing tile` is B weighted sums of rows:
`out[b] += sum_s p[b][s] * row[s]`, each element in the order of s.

Weights are fp32, bf16 or int8 and become fp32 in the register; all sums are fp32.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from turbos.engine.fused.vectors import (
    FLOAT,
    INT32,
    INT64,
    LANES,
    LINE,
    VECTOR,
    constant_vector,
    first_lanes,
    load_masked,
    load_vector,
    multiply_add,
    pointer,
    prefetch,
    spread,
    store_masked,
    sum_four,
    sum_lanes,
    zero_of,
)

FP32, BF16, INT8 = 0, 1, 2
"""Kinds of weights."""

INT8_TYPE, INT16 = ir.IntType(8), ir.IntType(16)
_SIZE = {FP32: 4, BF16: 2, INT8: 1}
_ELEMENT = {FP32: (FLOAT, "f32"), BF16: (INT16, "i16"), INT8: (INT8_TYPE, "i8")}


def _weights(builder: ir.IRBuilder, kind: int, place: ir.Value, mask: ir.Value | None) -> ir.Value:
    """`LANES` weights of a kind as floats; zero where a mask is given and off."""
    element, name = _ELEMENT[kind]
    vector = ir.VectorType(element, LANES)
    if mask is None:
        raw = builder.load(builder.bitcast(place, vector.as_pointer()), align=1)
    else:
        raw = load_masked(builder, place, mask, vector, name)
    if kind == FP32:
        return raw
    wide = ir.VectorType(INT32, LANES)
    if kind == BF16:
        return builder.bitcast(builder.shl(builder.zext(raw, wide), constant_vector([16] * LANES, INT32)), VECTOR)
    return builder.sitofp(builder.sext(raw, wide), VECTOR)


def _addresses(builder: ir.IRBuilder, listed: ir.Value, count: int) -> list[ir.Value]:
    """The first addresses of a list of them."""
    return [builder.load(pointer(builder, listed, ir.Constant(INT64, place), INT64)) for place in range(count)]


def product_tile(kind: int, rows: int, batch: int, level: int = 1) -> Any:
    """A compiled-in function for a tile of `rows` outputs (1 or 4) and `batch` inputs.

    Arguments: address of the first weight, elements between rows, inputs per row, address of the first scale (read for
    int8 only), address of a list of input addresses, of a list of output addresses, the outputs' first place, and the
    address from which as many bytes as the tile reads are fetched meanwhile into a level of the cache: rows are short,
    and the processor's own prefetching starts anew with each.
    """
    lines = -(-rows * LANES * _SIZE[kind] // LINE) if rows > 1 else 0

    def tile(typingctx, weights, stride, width, scales, sources, targets, place, ahead):  # type: ignore[no-untyped-def]
        def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            weights, stride, width, scales, sources, targets, place, ahead = arguments
            starts = [
                pointer(builder, weights, builder.mul(stride, ir.Constant(INT64, row)), _ELEMENT[kind][0])
                for row in range(rows)
            ]
            inputs = _addresses(builder, sources, batch)
            sums = [cgutils.alloca_once_value(builder, zero_of(VECTOR)) for _ in range(rows * batch)]

            def advance(index: ir.Value, mask: ir.Value | None) -> None:
                places = [pointer(builder, address, index, FLOAT) for address in inputs]
                if mask is None:
                    xs = [load_vector(builder, x) for x in places]
                    start = builder.add(ahead, builder.mul(index, ir.Constant(INT64, rows * _SIZE[kind])))
                    for line in range(lines):
                        prefetch(builder, builder.add(start, ir.Constant(INT64, line * LINE)), level)
                else:
                    xs = [load_masked(builder, x, mask, VECTOR, "f32") for x in places]
                for row, start in enumerate(starts):
                    weight = _weights(builder, kind, builder.gep(start, [index]), mask)
                    for number, x in enumerate(xs):
                        at = sums[row * batch + number]
                        builder.store(multiply_add(builder, weight, x, builder.load(at)), at)

            step = ir.Constant(INT64, LANES)
            rest = builder.srem(width, step)
            whole = builder.sub(width, rest)
            with cgutils.for_range_slice(builder, zero_of(INT64), whole, step, inc=True) as (index, _):
                advance(index, None)
            with builder.if_then(builder.icmp_signed(">", rest, zero_of(INT64)), likely=False):
                advance(whole, first_lanes(builder, rest))
            outputs = _addresses(builder, targets, batch)
            for number, output in enumerate(outputs):
                vectors = [builder.load(sums[row * batch + number]) for row in range(rows)]
                _store_sums(builder, kind, vectors, scales, pointer(builder, output, place, FLOAT))
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8), body

    return intrinsic(tile)


def _store_sums(builder: ir.IRBuilder, kind: int, vectors: list[ir.Value], scales: ir.Value, place: ir.Value) -> None:
    if len(vectors) == 1:
        sums = sum_lanes(builder, vectors[0])
    else:
        sums = sum_four(builder, vectors)
        place = builder.bitcast(place, sums.type.as_pointer())
    if kind == INT8:
        scale = builder.load(builder.inttoptr(scales, sums.type.as_pointer()), align=4)
        sums = builder.fmul(sums, scale)
    builder.store(sums, place, align=4)


def mixing_tile(batch: int, vectors: int) -> Any:
    """A compiled-in function for `batch` weighted sums of a run of each row: `vectors` vectors, the last one masked.

    Arguments: address of the first row, elements between rows, rows, address of a list of addresses of row weights, of
    a list of output addresses, the run's first place, its end, and the address from which as many bytes as the tile
    reads are fetched into the cache meanwhile. What is at the outputs is added to.
    """

    def tile(typingctx, rows, stride, count, sources, targets, place, end, ahead):  # type: ignore[no-untyped-def]
        def body(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            rows, stride, count, sources, targets, place, end, ahead = arguments
            shares, outputs = _addresses(builder, sources, batch), _addresses(builder, targets, batch)
            steps = [ir.Constant(INT64, number * LANES) for number in range(vectors)]
            last = builder.sub(end, builder.add(place, steps[-1]))
            mask = first_lanes(builder, last)

            def read(start: ir.Value) -> list[ir.Value]:
                places = [builder.gep(start, [step]) for step in steps]
                return [load_vector(builder, at) for at in places[:-1]] + [
                    load_masked(builder, places[-1], mask, VECTOR, "f32")
                ]

            ends = [pointer(builder, output, place, FLOAT) for output in outputs]
            sums = [cgutils.alloca_once_value(builder, value) for end in ends for value in read(end)]
            first = pointer(builder, rows, place, FLOAT)
            with cgutils.for_range(builder, count, intp=INT64) as loop:
                start = builder.add(ahead, builder.mul(loop.index, ir.Constant(INT64, 4 * vectors * LANES)))
                for line in range(-(-4 * vectors * LANES // LINE)):
                    prefetch(builder, builder.add(start, ir.Constant(INT64, line * LINE)), 2)
                parts = read(builder.gep(first, [builder.mul(loop.index, stride)]))
                for number, share in enumerate(shares):
                    factor = spread(builder, builder.load(pointer(builder, share, loop.index, FLOAT), align=4))
                    for part, at in zip(parts, sums[number * vectors :], strict=False):
                        builder.store(multiply_add(builder, factor, part, builder.load(at)), at)
            for number, start in enumerate(ends):
                for at, step in zip(sums[number * vectors :], steps, strict=False):
                    store_masked(
                        builder, builder.load(at), builder.gep(start, [step]), mask if step is steps[-1] else None
                    )
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 8), body

    return intrinsic(tile)
