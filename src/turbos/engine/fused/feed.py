"""Feed-forward networks: routed experts, a shared one, or a dense one (which is a shared one without routed ones).

Rows that chose the same expert are multiplied together, so that its weights are read once; the gate-weighted sum of a
row runs over its own experts in the order of its choice, whatever others chose.
"""

from __future__ import annotations

import math

from numba import float32

from turbos.engine.fused.products import BLOCK, block_share, bytes_of, project, share
from turbos.engine.fused.tiles import FP32
from turbos.engine.fused.vectors import (
    LANES,
    fma,
    get,
    get_int64,
    inlined,
    kernel,
    load,
    maximum,
    mul,
    put,
    put_int16,
    put_int64,
    silu,
    splat,
    store,
    zeros,
)


@kernel
def route(op, sizes, call):  # type: ignore[no-untyped-def]
    """Router logits, each row's experts and gates, and the rows of each expert."""
    rows, targets = sizes.normed_rows, sizes.router_rows
    project(FP32, op.router, 0, sizes.hidden, 0, op.experts, rows, targets, call.batch, 0)
    for b in range(call.batch):
        logits = sizes.router_logits + 4 * b * op.experts
        if sizes.sigmoid != 0:
            for e in range(op.experts):
                put(logits, e, float32(1.0) / (float32(1.0) + float32(math.exp(-float(get(logits, e))))))
        _choose(op, sizes, call, b, logits)
        if sizes.sigmoid != 0:
            _sigmoid_gates(op, sizes, b, logits)
        else:
            _softmax_gates(op, sizes, b, logits)
    _group(op, sizes, call)


@inlined
def _choose(op, sizes, call, b, scores):  # type: ignore[no-untyped-def]
    """The `top_k` best experts of a row, best first; of equal ones the first."""
    chosen = sizes.chosen + 8 * b * op.top_k
    for k in range(op.top_k):
        best, best_score = -1, float32(0.0)
        for e in range(op.experts):
            taken = False
            for earlier in range(k):
                taken = taken or get_int64(chosen, earlier) == e
            score = get(scores, e)
            if op.selection_bias != 0:
                score += get(op.selection_bias, e)
            # A row of NaN must still name some expert: the first one left.
            if not taken and (best < 0 or score > best_score):
                best, best_score = e, score
        put_int64(chosen, k, best)
        if call.routes != 0:
            put_int16(call.routes, (b * sizes.routers + op.layer) * op.top_k + k, best)


@inlined
def _softmax_gates(op, sizes, b, logits):  # type: ignore[no-untyped-def]
    chosen, gates = sizes.chosen + 8 * b * op.top_k, sizes.gates + 4 * b * op.top_k
    top, added = get(logits, get_int64(chosen, 0)), float32(0.0)
    for k in range(op.top_k):
        gate = float32(math.exp(float(get(logits, get_int64(chosen, k)) - top)))
        put(gates, k, gate)
        added += gate
    for k in range(op.top_k):
        put(gates, k, get(gates, k) / added)


@inlined
def _sigmoid_gates(op, sizes, b, scores):  # type: ignore[no-untyped-def]
    chosen, gates = sizes.chosen + 8 * b * op.top_k, sizes.gates + 4 * b * op.top_k
    added = float32(0.0)
    for k in range(op.top_k):
        added += get(scores, get_int64(chosen, k))
    divisor = added + float32(1e-20) if sizes.normalise != 0 else float32(1.0)
    for k in range(op.top_k):
        put(gates, k, get(scores, get_int64(chosen, k)) / divisor * sizes.router_scale)


@inlined
def _group(op, sizes, call):  # type: ignore[no-untyped-def]
    """Lists of the slots (row, choice) of every expert that was chosen.

    `groups` holds their number, then expert and first slot of each, then where the last one ends; `slots` holds three
    lists of addresses: inputs, hidden rows, outputs.
    """
    total, found, listed = call.batch * op.top_k, 0, 0
    for first in range(total):
        expert = get_int64(sizes.chosen, first)
        known = False
        for earlier in range(found):
            known = known or get_int64(sizes.groups_list, 1 + 2 * earlier) == expert
        if known:
            continue
        put_int64(sizes.groups_list, 1 + 2 * found, expert)
        put_int64(sizes.groups_list, 2 + 2 * found, listed)
        found += 1
        for slot in range(first, total):
            if get_int64(sizes.chosen, slot) == expert:
                put_int64(sizes.slots, listed, get_int64(sizes.normed_rows, slot // op.top_k))
                put_int64(sizes.slots, total + listed, get_int64(sizes.hidden_in_rows, slot))
                put_int64(sizes.slots, 2 * total + listed, get_int64(sizes.hidden_out_rows, slot))
                listed += 1
    put_int64(sizes.groups_list, 0, found)
    put_int64(sizes.groups_list, 2 + 2 * found, listed)


@inlined
def _activate(sizes, target, width, first, last):  # type: ignore[no-untyped-def]
    """`silu(gate) * up` or `relu(x) ** 2` of some columns, in the gate's place."""
    for i in range(first, last, LANES):
        x = load(target, i, last)
        if sizes.swiglu != 0:
            y = mul(silu(x), load(target + 4 * width, i, last))
        else:
            x = maximum(x, zeros())
            y = mul(x, x)
        store(target, i, last, y)


@kernel
def _expand(sizes, m, weights, scales, width, first, last, sources, targets, count):  # type: ignore[no-untyped-def]
    """Hidden columns `first .. last - 1` of a network of hidden `width`, for listed rows, activated."""
    project(m.kind, weights, scales, m.width, first, last, sources, targets, count, 0)
    if sizes.swiglu != 0:
        project(m.kind, weights, scales, m.width, width + first, width + last, sources, targets, count, 0)
    for number in range(count):
        _activate(sizes, get_int64(targets, number), width, first, last)


@kernel
def feed_in(op, matrices, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of the hidden columns of all chosen experts and of the shared one, in blocks."""
    found = get_int64(sizes.groups_list, 0) if op.experts > 0 else 0
    blocks, shared = (op.expert_size + BLOCK - 1) // BLOCK, (op.shared_size + BLOCK - 1) // BLOCK
    tasks, slots = found * blocks + shared, call.batch * op.top_k
    begin, end = share(tasks, thread, threads), share(tasks, thread + 1, threads)
    up = 2 if sizes.swiglu != 0 else 1
    for group in range(found):
        first, last = max(begin - group * blocks, 0), min(end - group * blocks, blocks)
        if first < last:
            m = matrices[op.matrix]
            expert, start = get_int64(sizes.groups_list, 1 + 2 * group), get_int64(sizes.groups_list, 2 + 2 * group)
            count = get_int64(sizes.groups_list, 4 + 2 * group) - start
            skipped = expert * up * op.expert_size
            weights, scales = m.weights + skipped * m.width * bytes_of(m.kind), m.scales + 4 * skipped
            sources, targets = sizes.slots + 8 * start, sizes.slots + 8 * (slots + start)
            stop = min(op.expert_size, last * BLOCK)
            _expand(sizes, m, weights, scales, op.expert_size, first * BLOCK, stop, sources, targets, count)
    first, last = max(begin - found * blocks, 0), min(end - found * blocks, shared)
    if first < last:
        m = matrices[op.matrix + op.matrices - 2]
        targets = sizes.hidden_in_rows + 8 * slots
        stop = min(op.shared_size, last * BLOCK)
        rows = sizes.normed_rows
        _expand(sizes, m, m.weights, m.scales, op.shared_size, first * BLOCK, stop, rows, targets, call.batch)


@kernel
def feed_out(op, matrices, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's columns of the networks' outputs, weighted, summed, and added to the residual stream."""
    first, last = block_share(sizes.hidden, thread, threads), block_share(sizes.hidden, thread + 1, threads)
    slots = call.batch * op.top_k
    if op.experts > 0:
        m = matrices[op.matrix + 1]
        for group in range(get_int64(sizes.groups_list, 0)):
            expert, start = get_int64(sizes.groups_list, 1 + 2 * group), get_int64(sizes.groups_list, 2 + 2 * group)
            count = get_int64(sizes.groups_list, 4 + 2 * group) - start
            skipped = expert * sizes.hidden
            weights, scales = m.weights + skipped * m.width * bytes_of(m.kind), m.scales + 4 * skipped
            sources, targets = sizes.slots + 8 * (slots + start), sizes.slots + 8 * (2 * slots + start)
            project(m.kind, weights, scales, m.width, first, last, sources, targets, count, 0)
    if op.shared_size > 0:
        m = matrices[op.matrix + op.matrices - 1]
        sources, targets = sizes.hidden_in_rows + 8 * slots, sizes.hidden_out_rows + 8 * slots
        project(m.kind, m.weights, m.scales, m.width, first, last, sources, targets, call.batch, 0)
    for b in range(call.batch):
        _sum_row(op, sizes, call, b, slots, first, last)


@inlined
def _sum_row(op, sizes, call, b, slots, first, last):  # type: ignore[no-untyped-def]
    x_at, factor = sizes.x + 4 * b * sizes.hidden, splat(sizes.residual_multiplier)
    for i in range(first, last, LANES):
        y = zeros()
        for k in range(op.top_k):
            slot = b * op.top_k + k
            gate = splat(get(sizes.gates, slot))
            y = fma(gate, load(get_int64(sizes.hidden_out_rows, slot), i, last), y)
        if op.shared_size > 0:
            y = fma(splat(float32(1.0)), load(get_int64(sizes.hidden_out_rows, slots + b), i, last), y)
        store(x_at, i, last, fma(y, factor, load(x_at, i, last)))
