"""The pool against the contiguous state: one sequence to the bit, a batch to rounding, and nothing leaks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine_cases import LAYERS, keys_of, poisoned_pool, read, read_plainly, started
from model_cases import TOLERANCE, VARIANTS, random_tokens, tiny_config, tiny_model
from op_cases import bit_equal, relative_error
from turbos.engine.layout import Layout
from turbos.engine.pool import PAGE, PoolRow, StatePool
from turbos.model.state import HybridState

PIECES = (1, 40, 1, 1, 60, 1, 27, 1, 1)
"""Pieces of 133 tokens: pages are crossed inside a piece, by a step, and a piece begins amid a page."""


@pytest.mark.parametrize("scattered", [False, True], ids=["one run", "scattered pages"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_sequence_is_the_contiguous_state_bit_for_bit(variant: str, dtype: torch.dtype, scattered: bool) -> None:
    model = tiny_model(dtype=dtype, **VARIANTS[variant])
    pieces = random_tokens(sum(PIECES)).split(PIECES)
    want, state = read_plainly(model, pieces)
    pool = poisoned_pool(model.config, 3, 9, dtype)
    started(pool)
    row = started(pool)
    if scattered:
        row.table = [pool.allocator.alloc() for _ in range(5)][::2]
    got = torch.cat([read(model, pool, [row], [piece]) for piece in pieces])
    assert bit_equal(got, want)
    assert row.length == sum(PIECES) and len(row.table) == -(-row.length // PAGE)
    flat = [x for place in pool.layout.scans for x in (place.conv.of(pool.conv_SX), place.scan.of(pool.scan_SX))]
    held = [x for layer in (state.layers[place.sublayer] for place in pool.layout.scans) for x in layer.tensors]
    assert all(bit_equal(a[row.slot], b[0]) for a, b in zip(flat, held, strict=True))


@pytest.mark.parametrize("layers", LAYERS)
def test_every_stack(layers: str) -> None:
    model = tiny_model(layers, rope_theta=10000.0, qk_norm=True)
    pieces = random_tokens(sum(PIECES)).split(PIECES)
    pool = poisoned_pool(model.config, 1, 3 if "A" in layers else 0)
    row = started(pool)
    got = torch.cat([read(model, pool, [row], [piece]) for piece in pieces])
    assert bit_equal(got, read_plainly(model, pieces)[0])
    assert len(row.table) == (3 if "A" in layers else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_is_its_sequences(variant: str, dtype: torch.dtype) -> None:
    """Prompts of unlike lengths read alone or together, then steps in batches of changing rows."""
    model = tiny_model(dtype=dtype, **VARIANTS[variant])
    texts = [random_tokens(n + 7, seed=n) for n in (70, 3, 130, 63)]
    pool = poisoned_pool(model.config, 4, 9, dtype)
    rows = [started(pool) for _ in texts]
    got = [[read(model, pool, [row], [text[:-7]])] for row, text in zip(rows[:2], texts[:2], strict=True)]
    together = read(model, pool, rows[2:], [text[:-7] for text in texts[2:]])
    got += [[part] for part in together.split([len(text) - 7 for text in texts[2:]])]
    for members in ((0, 1, 2, 3), (3, 1), (2, 0), (1, 0, 3), (2,), (2, 3, 0, 1), (1, 3, 0, 2), (2,)):
        pieces = [texts[i][rows[i].length : rows[i].length + 1] for i in members]
        hidden = read(model, pool, [rows[i] for i in members], pieces)
        for i, part in zip(members, hidden.split(1), strict=True):
            got[i].append(part)
    for i, text in enumerate(texts):
        want = read_plainly(model, [text[: rows[i].length]])[0]
        assert relative_error(torch.cat(got[i]), want) <= 3 * TOLERANCE[dtype], f"row {i}"
    assert [row.length for row in rows] == [75, 8, 136, 68]


@pytest.mark.parametrize("layers", ["MFAFMDSDAD", "ADAD"])
@pytest.mark.parametrize("length", [10, 64, 70])
def test_a_forked_row_is_a_fresh_one_and_never_touches_its_sibling(layers: str, length: int) -> None:
    model = tiny_model(layers)
    prompt, ends = random_tokens(length), [random_tokens(80, seed=s).split([1, 78, 1]) for s in (1, 2)]
    pool = poisoned_pool(model.config, 2, 6)
    rows = [started(pool), started(pool)]
    read(model, pool, rows[:1], [prompt])
    fork(pool, rows[0], rows[1])
    assert pool.allocator.free == 6 - -(-length // PAGE), "a fork takes no page"
    kept = keys_of(pool, rows[1])
    for row, end in zip(rows, ends, strict=True):
        got = torch.cat([read(model, pool, [row], [piece]) for piece in end])
        assert bit_equal(got, read_plainly(model, [prompt, *end])[0][length:])
    assert all(bit_equal(a, b[:length]) for a, b in zip(kept, keys_of(pool, rows[1]), strict=True))
    assert all(bit_equal(a, b[:length]) for a, b in zip(kept, keys_of(pool, rows[0]), strict=True))
    shared = set(rows[0].table) & set(rows[1].table)
    assert len(shared) == length // PAGE, "whole pages stay shared"


def fork(pool: StatePool, source: PoolRow, target: PoolRow) -> None:
    """Make a new row continue another: its states copied, its pages shared."""
    pool.copy_slot(source.slot, target.slot)
    for page in source.table:
        pool.allocator.retain(page)
    target.table, target.length = list(source.table), source.length


def test_layout_is_what_the_contiguous_state_takes() -> None:
    for layers in LAYERS:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            config = tiny_config(layers)
            layout = Layout.of(config, dtype)
            state = HybridState.alloc(config, 1, 100, dtype=dtype)
            assert layout.state_bytes + 100 * layout.kv_bytes_per_token == state.nbytes
            for kind in ("conv", "scan"):
                parts = [getattr(place, kind) for place in layout.scans]
                assert all(a.stop == b.start for a, b in pairwise(parts))
            assert [layers[place.sublayer] for place in layout.scans] == [kind for kind in layers if kind in "MS"]


def test_a_slot_comes_back_zeroed() -> None:
    pool = poisoned_pool(tiny_config("MASA"), 2, 1)
    slot = pool.alloc_slot()
    assert slot == 0 and pool.free_slots == 1
    assert not pool.conv_SX[0].any() and not pool.scan_SX[0].any()
    pool.scan_SX[0] = 7.0
    pool.free_slot(0)
    assert pool.alloc_slot() == 0 and not pool.scan_SX[0].any()
    assert pool.alloc_slot() == 1 and pool.alloc_slot() is None
    pool.free_slot(1)
    with pytest.raises(ValueError, match="slot 1 is free"):
        pool.free_slot(1)


def test_ensure_changes_nothing_where_pages_are_short() -> None:
    pool = poisoned_pool(tiny_config("AD"), 3, 3)
    row, other = started(pool), started(pool)
    assert pool.ensure(row, 70) and row.table == [0, 1]
    row.length = 70
    fork(pool, row, other)
    assert pool.pages_missing(other, 129) == 2 and not pool.ensure(other, 129)
    assert other.table == [0, 1] and pool.allocator.free == 1
    assert pool.pages_missing(other, 128) == 1 and pool.ensure(other, 128)
    assert other.table == [0, 2] and row.table == [0, 1] and pool.allocator.free == 0
    assert pool.ensure(row, 128), "the page is its own now that the sibling has a copy"
    assert row.table == [0, 1] and not pool.ensure(row, 129)
    pool.free_row(row)
    pool.free_row(other)
    assert pool.allocator.free == 3 and pool.free_slots == 2 + 1


def test_a_view_refuses_what_would_spoil_others() -> None:
    model = tiny_model("MDAD")
    pool = poisoned_pool(model.config, 2, 4)
    row, other = started(pool), started(pool)
    with pytest.raises(RuntimeError, match="1 tokens do not fit on 0 pages: call ensure first"), pool.view([row]) as s:
        s.check_room([1])
    read(model, pool, [row], [random_tokens(10)])
    fork(pool, row, other)
    with pytest.raises(RuntimeError, match="about to be written at 10 is shared"), pool.view([row]) as state:
        state.check_room([1])
    assert row.length == 10
    for rows in ([row, row], []):
        with pytest.raises(ValueError, match="rows, each only once"), pool.view(rows):
            pass


def test_an_error_inside_a_batched_view_leaves_the_slots_as_they_were() -> None:
    model = tiny_model("MDAD")
    pool = poisoned_pool(model.config, 2, 4)
    rows = [started(pool), started(pool)]
    read(model, pool, rows, [random_tokens(5), random_tokens(9)])
    kept = pool.scan_SX.clone()
    with pytest.raises(KeyboardInterrupt), pool.view(rows) as state:
        state.layers[0].tensors[1].fill_(3.0)
        raise KeyboardInterrupt
    assert bit_equal(pool.scan_SX, kept) and [row.length for row in rows] == [5, 9]


class Rows(RuleBasedStateMachine):
    """Random starts, growth, forks and ends in a small pool; each row's keys must be what it wrote, whatever others do.

    The keys written are numbers that name the row and the position; the truth is a plain list for each row.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = poisoned_pool(tiny_config("MADA", num_kv_heads=1, head_dim=4), 4, 8)
        self.rows: dict[int, tuple[PoolRow, list[float]]] = {}
        self.written = 0.0

    @rule()
    def start(self) -> None:
        row = self.pool.new_row()
        assert (row is None) == (len(self.rows) == 4)
        if row is not None:
            self.rows[row.slot] = row, []

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), count=st.one_of(st.integers(1, 3), st.integers(20, 150)))
    def grow(self, data: st.DataObject, count: int) -> None:
        row, truth = self.rows[data.draw(st.sampled_from(sorted(self.rows)))]
        before = list(row.table), self.pool.allocator.free
        missing = self.pool.pages_missing(row, row.length + count)
        if not self.pool.ensure(row, row.length + count):
            assert missing > before[1] and (list(row.table), self.pool.allocator.free) == before
            return
        assert before[1] - self.pool.allocator.free == missing
        for _ in range(count):
            self.written += 1
            page, place = row.table[row.length // PAGE], row.length % PAGE
            for layer, tensor in enumerate((*self.pool.keys, *self.pool.values)):
                tensor[page, place] = self.written + layer / 8
            truth.append(self.written)
            row.length += 1

    @precondition(lambda self: 0 < len(self.rows) < 4)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        source, truth = self.rows[data.draw(st.sampled_from(sorted(self.rows)))]
        target = started(self.pool)
        fork(self.pool, source, target)
        self.rows[target.slot] = target, list(truth)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        row, _ = self.rows.pop(data.draw(st.sampled_from(sorted(self.rows))))
        self.pool.free_row(row)

    @invariant()
    def every_row_holds_what_it_wrote(self) -> None:
        for row, truth in self.rows.values():
            for layer, keys in enumerate(keys_of(self.pool, row)):
                assert keys[:, 0, 0].tolist() == [number + layer / 8 for number in truth]
        held = {page for row, _ in self.rows.values() for page in row.table}
        assert self.pool.allocator.free == 8 - len(held), "a page is lost, or free though it is held"

    def teardown(self) -> None:
        for row, _ in self.rows.values():
            self.pool.free_row(row)
        assert (self.pool.allocator.free, self.pool.free_slots) == (8, 4)


TestRows = Rows.TestCase
TestRows.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
