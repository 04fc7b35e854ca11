"""What happens to whole rows between the phases: embedding, norms, the residual stream."""

from __future__ import annotations

import math

from numba import float32

from turbos.engine.fused.products import block_share, project
from turbos.engine.fused.tiles import BF16, INT8
from turbos.engine.fused.vectors import (
    LANES,
    bf16_at,
    fma,
    get,
    get_int64,
    int8_at,
    kernel,
    load,
    mul,
    put,
    splat,
    store,
    total,
    zeros,
)


@kernel
def embed(sizes, call):  # type: ignore[no-untyped-def]
    """The tokens' rows of the embedding, multiplied, as the residual stream."""
    width, factor = sizes.hidden, sizes.embedding_multiplier
    for b in range(call.batch):
        token = get_int64(call.tokens, b)
        source, target = sizes.embed, sizes.x + 4 * b * width
        scale = factor * get(sizes.embed_scales, token) if sizes.embed_kind == INT8 else factor
        for i in range(width):
            at = token * width + i
            if sizes.embed_kind == INT8:
                value = int8_at(source, at)
            elif sizes.embed_kind == BF16:
                value = bf16_at(source, at)
            else:
                value = get(source, at)
            put(target, i, scale * value)


@kernel
def rotations(sizes, call):  # type: ignore[no-untyped-def]
    """Cosine and sine of every rotary angle, `[B, E]`: the angle in fp32, as the model computes it."""
    half = sizes.head_dim // 2
    for b in range(call.batch):
        position = float32(get_int64(call.positions, b))
        for i in range(half):
            angle = position * get(sizes.frequencies, i)
            put(sizes.rope, b * sizes.head_dim + i, float32(math.cos(float(angle))))
            put(sizes.rope, b * sizes.head_dim + half + i, float32(math.sin(float(angle))))


@kernel
def norm_row(source, weight, target, width, eps):  # type: ignore[no-untyped-def]
    """`x / rms(x) * weight` of one row."""
    squares = zeros()
    for i in range(0, width, LANES):
        x = load(source, i, width)
        squares = fma(x, x, squares)
    scale = splat(float32(1.0) / math.sqrt(total(squares) / float32(width) + eps))
    for i in range(0, width, LANES):
        store(target, i, width, mul(mul(load(source, i, width), scale), load(weight, i, width)))


@kernel
def norm_rows(norm, sizes, call):  # type: ignore[no-untyped-def]
    """The residual stream, normed, for the projections of a sublayer."""
    for b in range(call.batch):
        at = 4 * b * sizes.hidden
        norm_row(sizes.x + at, norm, sizes.normed + at, sizes.hidden, sizes.eps)


@kernel
def project_inputs(op, matrices, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of a mixer's input projections, side by side in one buffer."""
    place = 0
    for number in range(op.matrix, op.matrix + op.matrices):
        m = matrices[number]
        first, last = block_share(m.rows, thread, threads), block_share(m.rows, thread + 1, threads)
        rows = sizes.projected_rows
        project(m.kind, m.weights, m.scales, m.width, first, last, sizes.normed_rows, rows, call.batch, place)
        place += m.rows


@kernel
def add_rows(source, sizes, call, first, last):  # type: ignore[no-untyped-def]
    """Add columns `first .. last - 1` of a buffer `[B, D]`, multiplied, to the residual stream."""
    factor = splat(sizes.residual_multiplier)
    for b in range(call.batch):
        at = 4 * b * sizes.hidden
        for i in range(first, last, LANES):
            x = fma(load(source + at, i, last), factor, load(sizes.x + at, i, last))
            store(sizes.x + at, i, last, x)


@kernel
def merge(op, matrices, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of a mixer's output projection, added to the residual stream."""
    m = matrices[op.matrix]
    first, last = block_share(m.rows, thread, threads), block_share(m.rows, thread + 1, threads)
    project(m.kind, m.weights, m.scales, m.width, first, last, sizes.mixing_rows, sizes.merged_rows, call.batch, 0)
    add_rows(sizes.merged, sizes, call, first, last)


@kernel
def final_norm(op, sizes, call):  # type: ignore[no-untyped-def]
    """Hidden states after the last norm, into the caller's tensor."""
    for b in range(call.batch):
        at = 4 * b * sizes.hidden
        norm_row(sizes.x + at, op.norm, call.hidden + at, sizes.hidden, sizes.eps)


@kernel
def head(op, matrices, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of the logits, into the caller's tensor."""
    m = matrices[op.matrix]
    first, last = block_share(m.rows, thread, threads), block_share(m.rows, thread + 1, threads)
    # The two lists are the caller's tensors' rows, filled in before this phase.
    sources, targets = sizes.logits_rows, sizes.logits_rows + 8 * call.batch
    project(m.kind, m.weights, m.scales, m.width, first, last, sources, targets, call.batch, 0)
    if sizes.logit_scale != float32(1.0):
        factor = splat(sizes.logit_scale)
        for b in range(call.batch):
            at = call.logits + 4 * b * sizes.vocabulary
            for i in range(first, last, LANES):
                store(at, i, last, mul(load(at, i, last), factor))
