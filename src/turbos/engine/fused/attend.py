"""Attention of one query per sequence over its pages, in parts of `PART` tokens with fixed borders.

Each part leaves a maximum, a sum and a weighted sum of values for every head; they are joined afterwards, always in the
same order. So neither the number of threads nor the other sequences change a bit, and a long context keeps all threads
busy.
"""

from __future__ import annotations

import math

from numba import float32

from turbos.engine.fused.products import AHEAD, ROWS, mix, score_tiles, share
from turbos.engine.fused.program import PART
from turbos.engine.fused.rows import norm_row
from turbos.engine.fused.vectors import (
    LANES,
    add,
    exp,
    get,
    get_int32,
    get_int64,
    inlined,
    kernel,
    largest,
    load,
    maximum,
    mul,
    put,
    put_int64,
    splat,
    store,
    sub,
    total,
    zeros,
)
from turbos.engine.pages import PAGE


@inlined
def _rotate(x, cos, sin, half):  # type: ignore[no-untyped-def]
    for i in range(half):
        first, second = get(x, i), get(x, half + i)
        put(x, i, first * get(cos, i) - second * get(sin, i))
        put(x, half + i, second * get(cos, i) + first * get(sin, i))


@kernel
def _copy(source, target, width, factor):  # type: ignore[no-untyped-def]
    scale = splat(factor)
    for i in range(0, width, LANES):
        store(target, i, width, mul(load(source, i, width), scale))


@kernel
def place_keys(op, sizes, call):  # type: ignore[no-untyped-def]
    """Norm and turn queries and keys; write the new keys and values to their pages, scaled queries to their buffer."""
    width, half = sizes.head_dim, sizes.head_dim // 2
    for b in range(call.batch):
        row = sizes.projected + 4 * b * sizes.wide
        cos = sizes.rope + 4 * b * width
        for head in range(sizes.heads + sizes.kv_heads):
            x = row + 4 * head * width
            norm = op.q_norm if head < sizes.heads else op.k_norm
            if norm != 0:
                norm_row(x, norm, x, width, sizes.eps)
            if sizes.rotary != 0:
                _rotate(x, cos, cos + 4 * half, half)
        position = get_int64(call.positions, b)
        page = get_int32(call.tables, b * call.table_width + position // PAGE)
        size = sizes.kv_heads * width
        at = 4 * (page * PAGE + position % PAGE) * size
        keys = row + 4 * sizes.heads * width
        _copy(keys, op.keys + at, size, float32(1.0))
        _copy(keys + 4 * size, op.values + at, size, float32(1.0))
        _copy(row, sizes.query + 4 * b * sizes.heads * width, sizes.heads * width, sizes.attention_scale)


@kernel
def parts_of(call, b):  # type: ignore[no-untyped-def]
    """Parts of a sequence's cache, the token of this step included."""
    return get_int64(call.positions, b) // PART + 1


@kernel
def attend(op, sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of all parts of all sequences."""
    tasks = 0
    for b in range(call.batch):
        tasks += parts_of(call, b)
    first, last = share(tasks, thread, threads), share(tasks, thread + 1, threads)
    task = 0
    for b in range(call.batch):
        parts = parts_of(call, b)
        for part in range(max(0, first - task), min(parts, last - task)):
            _attend_part(op, sizes, call, b, part, thread)
        task += parts


@inlined
def _attend_part(op, sizes, call, b, part, thread):  # type: ignore[no-untyped-def]
    heads, width = sizes.heads, sizes.head_dim
    count = min(PART, get_int64(call.positions, b) + 1 - part * PART)
    scores = sizes.scores + 4 * thread * heads * PART
    scores_rows = sizes.scores_rows + 8 * thread * heads
    _score(op, sizes, call, b, part, count, scores_rows)
    for head in range(heads):
        place = (b * heads + head) * call.parts + part
        _weigh(scores + 4 * head * PART, count, call.partial_maxima, call.partial_sums, place)
    sums = call.partial + 4 * (b * call.parts + part) * heads * width
    rows = sizes.part_rows + 8 * thread * heads
    for i in range(0, heads * width, LANES):
        store(sums, i, heads * width, zeros())
    for head in range(heads):
        put_int64(rows, head, sums + 4 * head * width)
    _mix_values(op, sizes, call, b, part, count, scores, rows, sizes.weights_rows + 8 * thread * heads)


@kernel
def _page(op, sizes, call, b, place, of_values):  # type: ignore[no-untyped-def]
    """Where a page's keys or values lie: page number `place` of a sequence (of its last one where it has fewer)."""
    last = get_int64(call.positions, b) // PAGE
    page = get_int32(call.tables, b * call.table_width + min(place, last))
    return (op.values if of_values else op.keys) + 4 * page * PAGE * sizes.kv_heads * sizes.head_dim


@inlined
def _score(op, sizes, call, b, part, count, scores_rows):  # type: ignore[no-untyped-def]
    """Products of every query with a part's keys; up to three beyond `count` are computed of what lies there."""
    width, repeat = sizes.head_dim, sizes.heads // sizes.kv_heads
    stride, first = sizes.kv_heads * width, part * PART // PAGE
    size = 4 * PAGE * stride
    for page in range((count + PAGE - 1) // PAGE):
        keys, rows = _page(op, sizes, call, b, first + page, False), min(PAGE, count - page * PAGE)
        # After the part's keys its values are read.
        done = (page + 1) * PAGE >= count
        following = _page(op, sizes, call, b, first if done else first + page + 1, done)
        for s in range(0, rows, ROWS):
            for group in range(sizes.kv_heads):
                queries = sizes.query_rows + 8 * (b * sizes.heads + group * repeat)
                targets = scores_rows + 8 * group * repeat
                at = keys + 4 * (s * stride + group * width)
                # Four tokens' keys of all groups lie together, and each group fetches its part of those that follow.
                ahead = 4 * (s * stride + ROWS * group * width) + AHEAD
                ahead += keys if ahead < size else following - size
                score_tiles(at, stride, width, 0, queries, targets, repeat, page * PAGE + s, ahead)


@inlined
def _weigh(scores, count, maxima, sums, place):  # type: ignore[no-untyped-def]
    """Scores of one head -> `exp(score - maximum)` in place; leaves maximum and sum."""
    end = (count + LANES - 1) // LANES * LANES
    for s in range(count, end):
        put(scores, s, float32(-math.inf))
    most = load(scores, 0, end)
    for s in range(LANES, end, LANES):
        most = maximum(most, load(scores, s, end))
    top, added = largest(most), zeros()
    least = splat(top)
    for s in range(0, end, LANES):
        p = exp(sub(load(scores, s, end), least))
        added = add(added, p)
        store(scores, s, end, p)
    put(maxima, place, top)
    put(sums, place, total(added))


@inlined
def _mix_values(op, sizes, call, b, part, count, scores, targets, weights_rows):  # type: ignore[no-untyped-def]
    """Values of a part, weighted, added to each head's sum; few tokens at a time, so that memory is read in order."""
    width, repeat = sizes.head_dim, sizes.heads // sizes.kv_heads
    stride, first = sizes.kv_heads * width, part * PART // PAGE
    size = 4 * PAGE * stride
    for page in range((count + PAGE - 1) // PAGE):
        values, rows = _page(op, sizes, call, b, first + page, True), min(PAGE, count - page * PAGE)
        # After the part's values the next part's keys are read.
        done = (page + 1) * PAGE >= count
        following = _page(op, sizes, call, b, first + page + 1, not done)
        for s in range(0, rows, ROWS):
            for head in range(sizes.heads):
                put_int64(weights_rows, head, scores + 4 * (head * PART + page * PAGE + s))
            for group in range(sizes.kv_heads):
                lists, tokens = 8 * group * repeat, min(ROWS, rows - s)
                at = values + 4 * (s * stride + group * width)
                ahead = 4 * (s * stride + ROWS * group * width) + AHEAD
                ahead += values if ahead < size else following - size
                mix(at, stride, tokens, width, weights_rows + lists, targets + lists, repeat, ahead)


@kernel
def join(sizes, call, thread, threads):  # type: ignore[no-untyped-def]
    """A thread's share of all heads of all sequences: their parts put together, into the mixing buffer."""
    tasks = call.batch * sizes.heads
    for task in range(share(tasks, thread, threads), share(tasks, thread + 1, threads)):
        _join_head(sizes, call, task // sizes.heads, task % sizes.heads, thread)


@inlined
def _join_head(sizes, call, b, head, thread):  # type: ignore[no-untyped-def]
    heads, width, parts = sizes.heads, sizes.head_dim, parts_of(call, b)
    at = 4 * (b * heads + head) * call.parts
    maxima, sums = call.partial_maxima + at, call.partial_sums + at
    most = get(maxima, 0)
    for part in range(1, parts):
        most = max(most, get(maxima, part))
    top, added = splat(most), zeros()
    for part in range(0, parts, LANES):
        # Beyond the last part both are zero: e^(0 - top) times zero adds nothing.
        factor = exp(sub(load(maxima, part, parts), top))
        added = add(added, mul(factor, load(sums, part, parts)))
        store(maxima, part, parts, factor)
    scale = splat(float32(1.0) / total(added))
    for part in range(0, parts, LANES):
        store(maxima, part, parts, mul(load(maxima, part, parts), scale))
    target = sizes.mixing + 4 * (b * sizes.mixed + head * width)
    for i in range(0, width, LANES):
        store(target, i, width, zeros())
    lists = sizes.part_rows + 8 * thread * heads
    put_int64(lists, 0, maxima)
    rows = sizes.weights_rows + 8 * thread * heads
    put_int64(rows, 0, target)
    first = call.partial + 4 * (b * call.parts * heads + head) * width
    mix(first, heads * width, parts, width, lists, rows, 1, first + AHEAD)
