"""A Mamba2 mixer between its projections: convolution, one step of the scan, the gated norm. In place in the pool.

Projected rows hold gate z, then x, B and C (under the convolution), then dt. A head of a sequence is one task.
"""

from __future__ import annotations

import math

from numba import float32

from turbos.engine.fused.products import AHEAD, share
from turbos.engine.fused.vectors import (
    LANES,
    LINE,
    fetch,
    fma,
    get,
    get_int64,
    inlined,
    kernel,
    load,
    mul,
    put,
    silu,
    splat,
    store,
    store_totals,
    total,
    zeros,
)


@kernel
def _convolve(op, sizes, inputs, state, target, first, last):  # type: ignore[no-untyped-def]
    """Channels `first .. last - 1`: `silu(conv)` into the target (from its start), the window moved by one."""
    channels, kernel = sizes.channels, sizes.conv_kernel
    for i in range(first, last, LANES):
        y = load(op.conv_bias, i, last)
        for k in range(kernel - 1):
            row = state + 4 * k * channels
            old = load(row, i, last)
            y = fma(old, load(op.conv_weight + 4 * k * channels, i, last), y)
            if k > 0:
                store(row - 4 * channels, i, last, old)
        x = load(inputs, i, last)
        y = fma(x, load(op.conv_weight + 4 * (kernel - 1) * channels, i, last), y)
        store(state + 4 * (kernel - 2) * channels, i, last, x)
        store(target, i - first, last - first, silu(y))


@inlined
def _conv_state(op, sizes, call, b):  # type: ignore[no-untyped-def]
    return sizes.conv + 4 * (get_int64(call.slots, b) * sizes.conv_numbers + op.conv_start)


@kernel
def convolve_shared(op, sizes, call):  # type: ignore[no-untyped-def]
    """B and C of every sequence, which all heads of a group read."""
    for b in range(call.batch):
        inputs = sizes.projected + 4 * (b * sizes.wide + sizes.inner)
        target = sizes.bc + 4 * b * (sizes.channels - sizes.inner)
        _convolve(op, sizes, inputs, _conv_state(op, sizes, call, b), target, sizes.inner, sizes.channels)


@kernel
def scan_heads(op, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of all heads of all sequences."""
    tasks = call.batch * sizes.mamba_heads
    for task in range(share(tasks, thread, threads), share(tasks, thread + 1, threads)):
        _scan_head(op, sizes, call, task // sizes.mamba_heads, task % sizes.mamba_heads)


@inlined
def _scan_head(op, sizes, call, b, head):  # type: ignore[no-untyped-def]
    width, size = sizes.mamba_head_dim, sizes.mamba_state
    row = sizes.projected + 4 * b * sizes.wide
    # The gate's place in the row is free for x once z is kept: y goes to the mixing buffer, x beside it.
    y_at = sizes.mixing + 4 * (b * sizes.mixed + head * width)
    x_at = sizes.conv_x + 4 * (b * sizes.inner + head * width)
    state = _conv_state(op, sizes, call, b)
    _convolve(op, sizes, row + 4 * sizes.inner, state, x_at, head * width, (head + 1) * width)
    raw = get(row, sizes.inner + sizes.channels + head) + get(op.dt_bias, head)
    dt = raw if raw > float32(20.0) else float32(math.log1p(math.exp(float(raw))))
    decay = float32(math.exp(float(dt * get(op.decay, head))))
    group = head // (sizes.mamba_heads // sizes.groups)
    b_at = sizes.bc + 4 * (b * (sizes.channels - sizes.inner) + group * size)
    c_at = b_at + 4 * sizes.groups * size
    numbers = get_int64(call.slots, b) * sizes.scan_numbers + op.scan_start + head * width * size
    _advance(sizes.scan + 4 * numbers, decay, dt, x_at, b_at, c_at, y_at, width, size)
    skip, squares = splat(get(op.skip, head)), zeros()
    for i in range(0, width, LANES):
        y = fma(load(x_at, i, width), skip, load(y_at, i, width))
        y = mul(y, silu(load(row + 4 * head * width, i, width)))
        squares = fma(y, y, squares)
        store(y_at, i, width, y)
    put(sizes.squares, b * sizes.mamba_heads + head, total(squares))


@inlined
def _advance(state, decay, dt, x_at, b_at, c_at, y_at, width, size):  # type: ignore[no-untyped-def]
    """`state = decay * state + dt * x B^T`, `y = state C`, for one head's state `[P, N]`; four rows at a time."""
    a = splat(decay)
    p = 0
    while p + 4 <= width:
        x0, x1 = splat(dt * get(x_at, p)), splat(dt * get(x_at, p + 1))
        x2, x3 = splat(dt * get(x_at, p + 2)), splat(dt * get(x_at, p + 3))
        r0 = state + 4 * p * size
        r1, r2, r3 = r0 + 4 * size, r0 + 8 * size, r0 + 12 * size
        y0 = y1 = y2 = y3 = zeros()
        for n in range(0, size, LANES):
            b, c = load(b_at, n, size), load(c_at, n, size)
            ahead = r0 + AHEAD + 16 * n
            fetch(ahead)
            fetch(ahead + LINE)
            fetch(ahead + 2 * LINE)
            fetch(ahead + 3 * LINE)
            s0 = fma(x0, b, mul(a, load(r0, n, size)))
            s1 = fma(x1, b, mul(a, load(r1, n, size)))
            s2 = fma(x2, b, mul(a, load(r2, n, size)))
            s3 = fma(x3, b, mul(a, load(r3, n, size)))
            store(r0, n, size, s0)
            store(r1, n, size, s1)
            store(r2, n, size, s2)
            store(r3, n, size, s3)
            y0, y1, y2, y3 = fma(s0, c, y0), fma(s1, c, y1), fma(s2, c, y2), fma(s3, c, y3)
        store_totals(y_at, p, y0, y1, y2, y3)
        p += 4
    while p < width:
        x, row, y = splat(dt * get(x_at, p)), state + 4 * p * size, zeros()
        for n in range(0, size, LANES):
            s = fma(x, load(b_at, n, size), mul(a, load(row, n, size)))
            store(row, n, size, s)
            y = fma(s, load(c_at, n, size), y)
        put(y_at, p, total(y))
        p += 1


@kernel
def gated_norm(op, sizes, call):  # type: ignore[no-untyped-def]
    """Scale the gated rows by their groups' root mean squares and the norm's weight, in place."""
    heads = sizes.mamba_heads // sizes.groups
    width = sizes.inner // sizes.groups
    for b in range(call.batch):
        for group in range(sizes.groups):
            squares = float32(0.0)
            for head in range(group * heads, (group + 1) * heads):
                squares += get(sizes.squares, b * sizes.mamba_heads + head)
            scale = splat(float32(1.0) / math.sqrt(squares / float32(width) + sizes.eps))
            at = sizes.mixing + 4 * (b * sizes.mixed + group * width)
            weight = op.gate_norm + 4 * group * width
            for i in range(0, width, LANES):
                store(at, i, width, mul(mul(load(at, i, width), scale), load(weight, i, width)))
