"""Snapshots and the cache: forks are fresh readings, hits are cold readings, nothing leaks, refusals say why."""

from __future__ import annotations

import doctest
import zlib
from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from engine_cases import LAYERS, keys_of, poisoned_pool, read, read_plainly, started
from model_cases import VARIANTS, random_tokens, tiny_config, tiny_model
from op_cases import bit_equal
from turbos.engine import cache as cache_module
from turbos.engine import prefixes
from turbos.engine.cache import Hit, Miss, Snapshot, StateCache
from turbos.engine.pool import PAGE, PoolRow
from turbos.engine.prefixes import PlaceIndex

MANY = 2**30


@pytest.mark.parametrize("module", [cache_module, prefixes], ids=lambda module: module.__name__)
def test_examples(module: object) -> None:
    result = doctest.testmod(module)  # type: ignore[arg-type]
    assert result.attempted > 2 and result.failed == 0


def hit_of(cache: StateCache, ids: Sequence[int]) -> Hit:
    """A hit; the test's cache must have one."""
    found = cache.find(ids)
    assert isinstance(found, Hit), found
    return found


@pytest.mark.parametrize("length", [5, PAGE, PAGE + 1, 2 * PAGE - 1])
@pytest.mark.parametrize("layers", LAYERS)
def test_a_fork_is_a_fresh_reading_to_the_bit(layers: str, length: int) -> None:
    model = tiny_model(layers, rope_theta=10000.0, qk_norm=True)
    prompt, ends = random_tokens(length), [random_tokens(90, seed=s).split([1, 88, 1]) for s in range(3)]
    pool = poisoned_pool(model.config, 4, 20)
    cache = StateCache(pool, 0)
    first = started(pool)
    read(model, pool, [first], [prompt])
    free = pool.allocator.free
    snapshot = cache.take(first)
    rows = [first, *(started(pool) for _ in ends[1:])]
    for row in rows[1:]:
        cache.restore(snapshot, row)
    assert pool.allocator.free == free, "a fork takes no page"
    for row, end in zip(rows, ends, strict=True):
        got = torch.cat([read(model, pool, [row], [piece]) for piece in end])
        assert bit_equal(got, read_plainly(model, [prompt, *end])[0][length:])
    # The last sibling wrote after the others: they still hold what they wrote, and so does the snapshot.
    for row, end in zip(rows, ends, strict=True):
        fresh = started(pool)
        cache.restore(snapshot, fresh)
        for piece in end:
            read(model, pool, [fresh], [piece])
        assert all(bit_equal(a, b) for a, b in zip(keys_of(pool, row), keys_of(pool, fresh), strict=True))
        assert bit_equal(pool.scan_SX[row.slot], pool.scan_SX[fresh.slot])
        pool.free_row(fresh)
    for row in rows:
        pool.free_row(row)
    cache.release(snapshot)
    assert pool.allocator.free == 20 and pool.free_slots == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_hit_is_a_cold_reading_to_the_bit(variant: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, **VARIANTS[variant])
    text = random_tokens(200)
    borders = [0, 64, 90, 128, 192, 200]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    want, _ = read_plainly(model, pieces)
    pool = poisoned_pool(model.config, 2, 20, dtype)
    cache = StateCache(pool, MANY)
    row = started(pool)
    for piece in pieces[:3]:
        hidden_TD = read(model, pool, [row], [piece])
        cache.keep(text.tolist(), row, hidden_TD[-1])
    pool.free_row(row)
    for start, asked in ((128, 200), (90, 127), (64, 80), (64, 89), (128, 128), (90, 90)):
        found = hit_of(cache, text[:asked].tolist())
        assert found.length == start == found.snapshot.length
        assert found.snapshot.hidden_D is not None and bit_equal(found.snapshot.hidden_D, want[start - 1])
        row = started(pool)
        cache.restore(found.snapshot, row)
        cache.release(found.snapshot)
        got = [read(model, pool, [row], [text[a:b]]) for a, b in pairwise(borders) if a >= start]
        assert bit_equal(torch.cat([want[:start], *got]), want)
        pool.free_row(row)
    assert cache.metrics.hits == 6 and cache.metrics.hit_tokens == 128 + 90 + 64 + 64 + 128 + 90


def test_the_whole_prompt_needs_its_last_hidden_state() -> None:
    pool = poisoned_pool(tiny_config("MAD"), 1, 9)
    cache, row = StateCache(pool, MANY), started(pool)
    ids = tuple(range(70))
    for length in (64, 70):
        assert pool.ensure(row, length)
        row.length = length
        cache.keep(ids, row)
    found = hit_of(cache, ids)
    assert (found.length, found.refused) == (64, "no last hidden state")
    assert hit_of(cache, (*ids, 1)).length == 70
    cache.keep(ids, row, torch.full((3,), 5.0))
    found = hit_of(cache, ids)
    assert found.length == 70 and found.snapshot.hidden_D is not None and found.snapshot.hidden_D.tolist() == [5.0] * 3
    cache.keep(ids, row, torch.zeros(3))
    assert hit_of(cache, ids).snapshot is found.snapshot, "the first one stays"
    assert cache.metrics.no_last_hidden_state == 1 and cache.metrics.snapshots == 2
    assert cache.metrics.scan_bytes == 2 * pool.layout.state_bytes + 12


def filled(cache: StateCache, ids: Sequence[int]) -> None:
    """Keep a state of these ids, as if a row had read them; the row is gone afterwards."""
    row = started(cache.pool)
    assert cache.pool.ensure(row, len(ids))
    row.length = len(ids)
    cache.keep(ids, row)
    cache.pool.free_row(row)


def test_scan_states_go_by_age_to_stay_within_bytes() -> None:
    pool = poisoned_pool(tiny_config("MAD"), 1, 9)
    cache = StateCache(pool, 3 * pool.layout.state_bytes + 5)
    texts = [(number, *range(10)) for number in range(5)]
    for text in texts[:3]:
        filled(cache, text)
    cache.release(hit_of(cache, (*texts[0], 7)).snapshot)
    for text in texts[3:]:
        filled(cache, text)
    found = [cache.find((*text, 7)) for text in texts]
    assert [isinstance(one, Hit) for one in found] == [True, False, False, True, True]
    assert found[1] == found[2] == Miss("scan evicted")
    assert (cache.metrics.scan_evicted, cache.metrics.evictions, cache.metrics.snapshots) == (2, 2, 3)
    assert pool.allocator.free == 9 - 3, "keys without a scan state are of no use"
    filled(cache, texts[1])
    assert hit_of(cache, (*texts[1], 7)).length == 11, "it can be kept again"
    small = StateCache(pool, pool.layout.state_bytes - 1)
    filled(small, texts[0])
    assert small.find((*texts[0], 7)) == Miss("no prefix") and small.metrics.kept == 0


def test_without_scans_only_hidden_states_count() -> None:
    pool = poisoned_pool(tiny_config("AD"), 1, 9)
    cache, row = StateCache(pool, 30), started(pool)
    assert pool.ensure(row, 10)
    for length, hidden in ((4, False), (6, True), (7, True), (8, True), (9, False)):
        row.length = length
        cache.keep(range(10), row, torch.ones(3) if hidden else None)
    assert [hit_of(cache, range(length)).length for length in range(5, 11)] == [4, 4, 7, 8, 8, 9]
    assert (cache.metrics.snapshots, cache.metrics.scan_bytes, cache.metrics.evictions) == (5, 24, 1)
    assert hit_of(cache, range(6)).refused == "no last hidden state"


def test_a_held_state_is_kept_without_a_vector_that_is_too_large() -> None:
    """Without scans a state's own bytes are its hidden vector's; pages are the pool's."""
    pool = poisoned_pool(tiny_config("AD"), 2, 4)
    cache, row = StateCache(pool, 10), started(pool)
    assert pool.ensure(row, 70)
    row.length = 70
    snapshot = cache.take(row, torch.ones(3))
    cache.keep_snapshot(range(70), snapshot)
    cache.release(snapshot)
    pool.free_row(row)
    assert (cache.metrics.snapshots, cache.metrics.scan_bytes) == (1, 0)
    found = hit_of(cache, range(71))
    assert found.length == 70 and found.snapshot.hidden_D is None
    cache.release(found.snapshot)
    assert cache.evict_pages(1) == 2 and pool.allocator.free == 4
    scans = StateCache(poisoned_pool(tiny_config("MD"), 1, 0), 10)
    held = scans.take(started(scans.pool), torch.ones(3))
    scans.keep_snapshot((), held)
    assert scans.metrics.snapshots == 0, "a scan state that does not fit is not kept"


def test_pages_are_freed_on_request_and_shorter_states_survive() -> None:
    pool = poisoned_pool(tiny_config("MAD"), 2, 12)
    cache, row = StateCache(pool, MANY), started(pool)
    ids = tuple(range(300))
    for length in (128, 150, 300):
        assert pool.ensure(row, length)
        row.length = length
        cache.keep(ids, row)
    assert pool.allocator.free == 12 - 5 - 1, "only the page that was partly filled has a copy"
    assert cache.evict_pages(5) == 1, "the row still holds the others: only the copied page is free by it"
    pool.free_row(row)
    assert isinstance(cache.find(ids[:151]), Hit) and hit_of(cache, ids[:151]).refused == "keys evicted"
    assert hit_of(cache, (*ids, 1)).length == 300
    assert pool.allocator.free == 12 - 5
    assert cache.evict_pages(100) == 0, "all is held by hits"
    assert cache.metrics.freed_pages == 1 and cache.metrics.snapshots == 2, "what would free nothing stays"


def test_eviction_stops_when_enough_is_free() -> None:
    pool = poisoned_pool(tiny_config("AD"), 1, 12)
    cache = StateCache(pool, 0)
    for number in range(4):
        filled(cache, [number] * 130)
    assert pool.allocator.free == 0
    assert cache.evict_pages(4) == 6
    assert cache.find([0] * 131) == Miss("keys evicted")
    assert hit_of(cache, [2] * 131).length == 130
    assert cache.evict_pages(4) == 3 and cache.evict_pages(1) == 0, "one is held"


def test_other_weights_and_clearing() -> None:
    pool = poisoned_pool(tiny_config("MAD"), 2, 12)
    cache = StateCache(pool, MANY)
    filled(cache, [1] * 10)
    held = hit_of(cache, [1] * 11)
    cache.set_version(3)
    assert cache.find([1] * 11) == Miss("other weights")
    row = started(pool)
    cache.restore(held.snapshot, row)
    assert row.length == 10 and held.snapshot.version == 0
    pool.free_row(row)
    assert cache.release(held.snapshot) == 1 and pool.allocator.free == 12
    filled(cache, [1] * 10)
    assert hit_of(cache, [1] * 11).snapshot.version == 3
    cache.clear()
    assert cache.find([1] * 11) == Miss("no prefix")
    metrics = cache.metrics
    assert (metrics.other_weights, metrics.no_prefix, metrics.misses, metrics.hits) == (1, 1, 2, 2)
    assert (metrics.snapshots, metrics.scan_bytes) == (0, 0)


def test_misuse_is_refused() -> None:
    pool = poisoned_pool(tiny_config("MAD"), 2, 12)
    cache, row = StateCache(pool, MANY), started(pool)
    with pytest.raises(ValueError, match="a row of 0 tokens cannot be kept under 1 ids"):
        cache.keep([1], row)
    assert pool.ensure(row, 3)
    row.length = 3
    with pytest.raises(ValueError, match="a row of 3 tokens cannot be kept under 2 ids"):
        cache.keep([1, 2], row)
    snapshot = cache.take(row)
    with pytest.raises(ValueError, match="begin with an empty one"):
        cache.restore(snapshot, row)
    cache.hold(snapshot)
    assert cache.release(snapshot) == 0 == cache.release(snapshot)
    for act in (cache.release, cache.hold, lambda one: cache.restore(one, row)):
        with pytest.raises(ValueError, match="released once too often"):
            act(snapshot)


def test_what_was_lost_is_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "REMEMBERED", 3)
    pool = poisoned_pool(tiny_config("AD"), 1, 12)
    cache = StateCache(pool, 0)
    for number in range(6):
        filled(cache, [number] * 10)
    cache.evict_pages(6)
    assert [cache.find([n] * 11) for n in range(6)] == [Miss("no prefix")] * 3 + [Miss("keys evicted")] * 3


def test_places_name_content() -> None:
    places = PlaceIndex()
    ids = list(range(200))
    kept = [places.of(ids, length) for length in (1, 63, 64, 65, 128, 190)]
    assert len(set(kept)) == 6 and places.of(tuple(ids), 65) == kept[3]
    assert list(places.known(ids)) == []
    for place in (*kept, kept[2]):
        places.add(place)
    assert [place.length for place in places.known(ids)] == [190, 128, 65, 64, 63, 1]
    assert [place.length for place in places.known(ids[:100])] == [65, 64, 63, 1]
    assert [place.length for place in places.known([*ids[:64], 9, *ids[65:]])] == [64, 63, 1]
    assert [place.length for place in places.known([9, *ids[1:]])] == []
    for place in kept:
        places.remove(place)
    assert list(places.known(ids)) == [] and places._lengths == {}


CHUNKS = ((1,), (2,), (1,) * 62, (2,) * 64, (1, 2) * 65)
"""What rows read: few enough that rows meet the same beginnings, at and beside the borders of pages."""

Ids = tuple[int, ...]


def marks(ids: Sequence[int]) -> list[float]:
    """A number for each beginning of these tokens."""
    crcs = accumulate(ids, lambda crc, token: zlib.crc32(bytes([token]), crc), initial=0)
    return [float(crc % 100_003) for crc in crcs]


class States(RuleBasedStateMachine):
    """Random reading, keeping, finding, forking, evicting in a small pool.

    "Reading" a token writes, on the page and in the states, the mark of all tokens so far: what a row or a snapshot
    holds must be the marks of its own tokens, whatever others did.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = poisoned_pool(tiny_config("MAD", num_kv_heads=1, head_dim=2), 4, 14)
        self.cache = StateCache(self.pool, int(3.5 * self.pool.layout.state_bytes))
        self.rows: list[tuple[PoolRow, Ids]] = []
        self.held: list[tuple[Snapshot, Ids]] = []
        self.seen: list[Ids] = [(1,)]

    def draw_row(self, data: st.DataObject) -> int:
        """Place of a running row."""
        return data.draw(st.integers(0, len(self.rows) - 1))

    @precondition(lambda self: self.pool.free_slots)
    @rule(data=st.data())
    def start(self, data: st.DataObject) -> None:
        ids = data.draw(st.sampled_from(self.seen)) + data.draw(st.sampled_from(CHUNKS))
        found = self.cache.find(ids)
        row = started(self.pool)
        if isinstance(found, Hit):
            assert 0 < found.length <= len(ids) and (found.length < len(ids) or found.snapshot.hidden_D is not None)
            self.cache.restore(found.snapshot, row)
            if found.snapshot.hidden_D is not None:
                assert found.snapshot.hidden_D.tolist() == [marks(ids)[found.length]]
            self.cache.release(found.snapshot)
        self.rows.append((row, ids[: row.length]))

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), chunk=st.sampled_from(CHUNKS))
    def extend(self, data: st.DataObject, chunk: Ids) -> None:
        place = self.draw_row(data)
        row, ids = self.rows[place]
        while not self.pool.ensure(row, row.length + len(chunk)):
            if not self.cache.evict_pages(1):
                return
        ids += chunk
        numbers = marks(ids)
        for position in range(row.length, len(ids)):
            self.pool.keys[0][row.table[position // PAGE], position % PAGE] = numbers[position + 1]
        row.length = len(ids)
        self.pool.conv_SX[row.slot] = self.pool.scan_SX[row.slot] = numbers[-1]
        self.rows[place] = row, ids
        self.seen = [*self.seen[-5:], ids]

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), known=st.booleans())
    def keep(self, data: st.DataObject, known: bool) -> None:
        row, ids = self.rows[self.draw_row(data)]
        if row.length:
            self.cache.keep((*ids, 9, 9), row, torch.tensor([marks(ids)[-1]]) if known else None)
            found = hit_of(self.cache, (*ids, 9))
            assert found.length == len(ids), "what was kept last is there"
            self.cache.release(found.snapshot)

    @precondition(lambda self: self.rows and len(self.held) < 3)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        row, ids = self.rows[self.draw_row(data)]
        self.held.append((self.cache.take(row), ids))

    @precondition(lambda self: self.held and self.pool.free_slots)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        snapshot, ids = data.draw(st.sampled_from(self.held))
        row = started(self.pool)
        self.cache.restore(snapshot, row)
        self.rows.append((row, ids))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.cache.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))[0])

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.pool.free_row(self.rows.pop(self.draw_row(data))[0])

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        before = self.pool.allocator.free
        freed = self.cache.evict_pages(count)
        assert freed == self.pool.allocator.free - before
        if freed < count:
            # Nothing more can go: what is taken is what rows and holders have.
            assert self.pool.allocator.free == 14 - len(self.pages_in_use())

    @rule(forget=st.booleans())
    def forget(self, forget: bool) -> None:
        if forget:
            self.cache.clear()
        else:
            self.cache.set_version(self.cache.version + 1)
        assert self.pool.allocator.free == 14 - len(self.pages_in_use())

    def pages_in_use(self) -> set[int]:
        """Pages that rows and holders have."""
        tables = [row.table for row, _ in self.rows] + [list(snapshot.pages) for snapshot, _ in self.held]
        return {page for table in tables for page in table}

    def check(self, ids: Ids, pages: Sequence[int], states: Sequence[Tensor]) -> None:
        """The marks of these tokens and no others."""
        written = self.pool.keys[0][list(pages)].flatten(0, 1)[: len(ids), 0, 0].tolist()
        assert written == marks(ids)[1:]
        for state_X in states:
            assert set(state_X.tolist()) == {marks(ids)[-1]}

    @invariant()
    def everyone_has_what_is_theirs(self) -> None:
        for row, ids in self.rows:
            self.check(ids, row.table, (self.pool.conv_SX[row.slot], self.pool.scan_SX[row.slot]))
        for snapshot, ids in self.held:
            self.check(ids, snapshot.pages, (snapshot.conv_X, snapshot.scan_X))

    @invariant()
    def counts_add_up(self) -> None:
        metrics = self.cache.metrics
        assert metrics.scan_bytes <= self.cache.limit
        assert metrics.snapshots <= 3
        assert self.pool.free_slots == 4 - len(self.rows)

    def teardown(self) -> None:
        for row, _ in self.rows:
            self.pool.free_row(row)
        for snapshot, _ in self.held:
            self.cache.release(snapshot)
        self.cache.clear()
        assert (self.pool.allocator.free, self.pool.free_slots) == (14, 4)


TestStates = States.TestCase
TestStates.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
