"""Matrix products of the step: some outputs of a weight matrix for a list of inputs, in tiles.

Outputs are taken four at a time, inputs as many at a time as the registers hold; neither changes a bit (see `tiles`).
"""

from __future__ import annotations

from typing import Any

from turbos.engine.fused.tiles import BF16, FP32, INT8, mixing_tile, product_tile
from turbos.engine.fused.vectors import LANES, kernel

ROWS = 4
"""Outputs of a tile."""
BLOCK = 16
"""Outputs that one thread takes at least: a cache line of results."""
AHEAD = 8192
"""Bytes between the keys, values or states in work and those that are fetched."""
WEIGHTS_AHEAD = {FP32: 16384, BF16: 12288, INT8: 8192}
"""The same for weights: the quicker bytes are used up, the further ahead (measured)."""
INPUTS = 4 if LANES == 16 else 2
"""Inputs of the largest tile: ROWS * INPUTS sums must fit into the registers (32, or 16 before AVX-512)."""


def _product(kind: int, size: int, level: int = 1) -> Any:
    """The compiled product for one kind of weights, whose elements have `size` bytes."""
    many, two, one = (product_tile(kind, ROWS, count, level) for count in (INPUTS, 2, 1))
    single = product_tile(kind, 1, 1)
    ahead_of = WEIGHTS_AHEAD[kind]

    @kernel
    def tiles(weights, stride, width, scales, sources, targets, count, place, ahead):  # type: ignore[no-untyped-def]
        b = 0
        while b + INPUTS <= count:
            many(weights, stride, width, scales, sources + 8 * b, targets + 8 * b, place, ahead)
            b += INPUTS
        while b + 2 <= count:
            two(weights, stride, width, scales, sources + 8 * b, targets + 8 * b, place, ahead)
            b += 2
        if b < count:
            one(weights, stride, width, scales, sources + 8 * b, targets + 8 * b, place, ahead)

    @kernel
    def product(weights, scales, width, first, last, sources, targets, count, place):  # type: ignore[no-untyped-def]
        o = first
        while o + ROWS <= last:
            at = weights + o * width * size
            tiles(at, width, width, scales + 4 * o, sources, targets, count, place + o, at + ahead_of)
            o += ROWS
        while o < last:
            at = weights + o * width * size
            for b in range(count):
                single(at, width, width, scales + 4 * o, sources + 8 * b, targets + 8 * b, place + o, at)
            o += 1

    return tiles, product


score_tiles, _ = _product(FP32, 4, level=2)
_, _product_fp32 = _product(FP32, 4)
_, _product_bf16 = _product(BF16, 2)
_, _product_int8 = _product(INT8, 1)


@kernel
def project(kind, weights, scales, width, first, last, sources, targets, count, place):  # type: ignore[no-untyped-def]
    """Outputs `first .. last - 1` of a matrix, for `count` inputs whose addresses are listed.

    Output o of input b goes to element `place + o` at the b-th listed target.
    """
    if kind == INT8:
        _product_int8(weights, scales, width, first, last, sources, targets, count, place)
    elif kind == BF16:
        _product_bf16(weights, scales, width, first, last, sources, targets, count, place)
    else:
        _product_fp32(weights, scales, width, first, last, sources, targets, count, place)


@kernel
def bytes_of(kind):  # type: ignore[no-untyped-def]
    """Bytes of one weight."""
    return 1 if kind == INT8 else 2 if kind == BF16 else 4


_mix_many, _mix_two, _mix_one = (mixing_tile(count, 4 if LANES == 16 else 2) for count in (INPUTS, 2, 1))
_mix_many_last, _mix_two_last, _mix_one_last = (mixing_tile(count, 1) for count in (INPUTS, 2, 1))
_RUN = LANES * (4 if LANES == 16 else 2)


@kernel
def mix(rows, stride, count, width, sources, targets, sums, ahead):  # type: ignore[no-untyped-def]
    """Add to each of `sums` listed targets `[width]` the weighted sum of `count` rows; the weights are listed too.

    What lies at the address `ahead` is fetched meanwhile.
    """
    place = 0
    while place < width:
        wide = place + _RUN <= width
        end = place + _RUN if wide else min(place + LANES, width)
        b = 0
        while b + INPUTS <= sums:
            if wide:
                _mix_many(rows, stride, count, sources + 8 * b, targets + 8 * b, place, end, ahead)
            else:
                _mix_many_last(rows, stride, count, sources + 8 * b, targets + 8 * b, place, end, ahead)
            b += INPUTS
        while b + 2 <= sums:
            if wide:
                _mix_two(rows, stride, count, sources + 8 * b, targets + 8 * b, place, end, ahead)
            else:
                _mix_two_last(rows, stride, count, sources + 8 * b, targets + 8 * b, place, end, ahead)
            b += 2
        if b < sums:
            if wide:
                _mix_one(rows, stride, count, sources + 8 * b, targets + 8 * b, place, end, ahead)
            else:
                _mix_one_last(rows, stride, count, sources + 8 * b, targets + 8 * b, place, end, ahead)
        place = end


@kernel
def share(total, thread, threads):  # type: ignore[no-untyped-def]
    """First of the things `0 .. total - 1` that a thread takes; the next thread's first is where it stops."""
    return total * thread // threads


@kernel
def block_share(total, thread, threads):  # type: ignore[no-untyped-def]
    """The same in whole blocks of `BLOCK`."""
    blocks = (total + BLOCK - 1) // BLOCK
    return min(total, BLOCK * (blocks * thread // threads))
