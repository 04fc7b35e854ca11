"""States that are kept: fork points that somebody holds, and a cache of states found by the tokens that made them.

A `Snapshot` is a copy of the scan and conv states after some tokens, and a share in the pages of their keys: nothing is
copied of those, whoever writes on takes a copy of the last page. The cache keeps snapshots under a hash chain of their
tokens. Scan states are evicted to stay within bytes, keys when pages are wanted, each by its own rule; a snapshot that
lost one of them is of no use, so all of it goes, pages that a longer one needs excepted, and its reason is remembered.
Not safe for several threads, and no judge of what is worth keeping.

>>> from turbos.model.config import ModelConfig
>>> config = ModelConfig(vocab_size=64, hidden_size=16, layers="MDAD", mamba_heads=2, mamba_head_dim=8)
>>> pool = StatePool(config, num_slots=2, num_pages=4)
>>> cache, row, other = StateCache(pool, scan_bytes=2**20), pool.new_row(), pool.new_row()
>>> pool.ensure(row, 3)
True
>>> row.length = 3  # the model read 5, 6, 7
>>> cache.keep((5, 6, 7), row)
>>> cache.find((5, 6, 8))
Miss(reason='no prefix')
>>> found = cache.find((5, 6, 7, 8))
>>> cache.restore(found.snapshot, other)
>>> cache.release(found.snapshot)  # pages that are free by that
0
>>> other.length, other.table == row.table
(3, True)
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from turbos.engine.pool import PoolRow, StatePool
from turbos.engine.prefixes import Place, PlaceIndex

Reason = Literal["no prefix", "no last hidden state", "scan evicted", "keys evicted", "other weights"]
"""Why a state was not found: never kept (or long forgotten), not enough for a whole prompt, or lost since."""

REMEMBERED = 4096
"""Lost snapshots whose reason is still known."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The state after `length` tokens: flat conv and scan rows of its own, and the pages of the keys, held.

    `hidden_D` is the last token's hidden state, where it is known: with it a whole prompt needs no reading at all.
    """

    length: int
    version: int
    conv_X: Tensor
    scan_X: Tensor
    pages: tuple[int, ...]
    hidden_D: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its own; pages are the pool's."""
        hidden = 0 if self.hidden_D is None else self.hidden_D.nbytes
        return self.conv_X.nbytes + self.scan_X.nbytes + hidden


@dataclass(frozen=True)
class Hit:
    """A state of the first `length` tokens, held for the caller; `refused` tells why a longer one was not taken."""

    snapshot: Snapshot
    length: int
    refused: Reason | None = None


@dataclass(frozen=True)
class Miss:
    """No state of any beginning of the tokens, and why."""

    reason: Reason


@dataclass(frozen=True)
class CacheMetrics:
    """Counters since the cache began, then what it holds.

    The five reasons count refusals: the longest state known for some tokens could not be taken (a shorter one may have
    been), or none was known.
    """

    hits: int
    hit_tokens: int
    misses: int
    no_prefix: int
    no_last_hidden_state: int
    scan_evicted: int
    keys_evicted: int
    other_weights: int
    kept: int
    evictions: int
    freed_pages: int
    snapshots: int
    scan_bytes: int


class StateCache:
    """Snapshots of a pool's rows. `scan_bytes` bounds the snapshots that are kept, not those that callers hold."""

    def __init__(self, pool: StatePool, scan_bytes: int) -> None:
        """An empty cache of weights version 0."""
        self.pool, self.limit = pool, scan_bytes
        self.version = 0
        self._holds: Counter[Snapshot] = Counter()
        self._places = PlaceIndex()  # of both that follow
        self._kept: OrderedDict[Place, Snapshot] = OrderedDict()  # least recently used first
        self._lost: OrderedDict[Place, Reason] = OrderedDict()
        self._bytes = 0
        self._refusals: Counter[Reason] = Counter()
        self._hits = self._hit_tokens = self._misses = self._count = self._evictions = self._freed = 0

    # Fork points

    def take(self, row: PoolRow, hidden_D: Tensor | None = None) -> Snapshot:
        """The present state of a row, held once: `release` it."""
        pages = tuple(row.table[: self.pool.layout.pages_for(row.length)])
        for page in pages:
            self.pool.allocator.retain(page)
        conv_X, scan_X = self.pool.conv_SX[row.slot].clone(), self.pool.scan_SX[row.slot].clone()
        hidden_D = None if hidden_D is None else hidden_D.detach().clone()
        return self.adopt(Snapshot(row.length, self.version, conv_X, scan_X, pages, hidden_D))

    def adopt(self, snapshot: Snapshot) -> Snapshot:
        """Hold a snapshot whose pages the caller took from the allocator: they go when it is released."""
        self._holds[snapshot] = 1
        return snapshot

    def hold(self, snapshot: Snapshot) -> Snapshot:
        """One holder more of a snapshot."""
        self._check_held(snapshot)
        self._holds[snapshot] += 1
        return snapshot

    def release(self, snapshot: Snapshot) -> int:
        """One holder less; the last one lets the pages go. Returns how many pages are free by that."""
        self._check_held(snapshot)
        self._holds[snapshot] -= 1
        if self._holds[snapshot]:
            return 0
        del self._holds[snapshot]
        return sum(self.pool.allocator.release(page) for page in snapshot.pages)

    def restore(self, snapshot: Snapshot, row: PoolRow) -> None:
        """Let an empty row continue from a snapshot: states are copied, pages shared."""
        self._check_held(snapshot)
        if row.length or row.table:
            raise ValueError(f"a row of {row.length} tokens cannot take another state: begin with an empty one")
        self.pool.conv_SX[row.slot] = snapshot.conv_X
        self.pool.scan_SX[row.slot] = snapshot.scan_X
        for page in snapshot.pages:
            self.pool.allocator.retain(page)
        row.table.extend(snapshot.pages)
        row.length = snapshot.length

    def _check_held(self, snapshot: Snapshot) -> None:
        if snapshot not in self._holds:
            raise ValueError(f"a snapshot of {snapshot.length} tokens was released once too often")

    # States found by their tokens

    def keep(self, ids: Sequence[int], row: PoolRow, hidden_D: Tensor | None = None) -> None:
        """Remember a row's present state under `ids[: row.length]`, the tokens that it has read.

        What is there already stays (and gains the hidden state); what is larger than the cache is not kept.
        """
        if not 0 < row.length <= len(ids):
            raise ValueError(f"a row of {row.length} tokens cannot be kept under {len(ids)} ids")
        place = self._places.of(ids, row.length)
        known = self._kept.get(place)
        if known is not None:
            self._kept.move_to_end(place)
            if hidden_D is not None and known.hidden_D is None and self._affords(hidden_D):
                self._replace(place, known, hidden_D)
        elif self.pool.layout.state_bytes <= self.limit:
            self._put(place, self.take(row, hidden_D if self._affords(hidden_D) else None))

    def keep_snapshot(self, ids: Sequence[int], snapshot: Snapshot) -> None:
        """Remember a state that somebody holds (read from a file, say) under the tokens that it has read.

        Where only the hidden state is too large, it is kept without.
        """
        self._check_held(snapshot)
        place = self._places.of(ids, snapshot.length)
        if place in self._kept or self.pool.layout.state_bytes > self.limit:
            return
        fits = snapshot.nbytes <= self.limit
        self._put(place, self.hold(snapshot) if fits else self._copy_with(snapshot, None))

    def _put(self, place: Place, snapshot: Snapshot) -> None:
        """Take over a hold on a snapshot and remember it; others may have to go."""
        self._lost.pop(place, None)
        self._places.add(place)
        self._kept[place] = snapshot
        self._bytes += snapshot.nbytes
        self._count += 1
        self._shrink()

    def _affords(self, hidden_D: Tensor | None) -> bool:
        """Whether one state with this hidden state fits at all."""
        return hidden_D is not None and self.pool.layout.state_bytes + hidden_D.nbytes <= self.limit

    def _replace(self, place: Place, known: Snapshot, hidden_D: Tensor | None) -> None:
        """Put the same state with another hidden state in its place; holders of the old snapshot keep that."""
        self._kept[place] = other = self._copy_with(known, hidden_D)
        self._bytes += other.nbytes - known.nbytes
        self.release(known)
        self._shrink()

    def _copy_with(self, snapshot: Snapshot, hidden_D: Tensor | None) -> Snapshot:
        """The same state with another hidden state, held once; both share tensors and pages."""
        for page in snapshot.pages:
            self.pool.allocator.retain(page)
        return self.adopt(replace(snapshot, hidden_D=None if hidden_D is None else hidden_D.detach().clone()))

    def find(self, ids: Sequence[int]) -> Hit | Miss:
        """`look`, and count what came of it."""
        found = self.look(ids)
        self.count(found)
        return found

    def look(self, ids: Sequence[int]) -> Hit | Miss:
        """The longest state kept of a beginning of `ids`, held for the caller; not counted.

        All of `ids` only where the last hidden state is known too: without it the last token must be read again.
        """
        refused: Reason | None = None
        for place in self._places.known(ids):
            snapshot = self._kept.get(place)
            if snapshot is None:
                refused = refused or self._lost.get(place)
            elif snapshot.length == len(ids) and snapshot.hidden_D is None:
                refused = refused or "no last hidden state"
            else:
                self._kept.move_to_end(place)
                return Hit(self.hold(snapshot), snapshot.length, refused)
        return Miss(refused or "no prefix")

    def count(self, found: Hit | Miss) -> None:
        """Count what a `look` gave, once for whoever asked, however often he looked."""
        if isinstance(found, Hit):
            self._note(found.refused)
            self._hits += 1
            self._hit_tokens += found.length
        else:
            self._note(found.reason)
            self._misses += 1

    def kept_length(self, ids: Sequence[int]) -> int:
        """Tokens of the longest state kept of a beginning of `ids`, 0 for none; neither a hit nor a use."""
        return next((place.length for place in self._places.known(ids) if place in self._kept), 0)

    def _note(self, reason: Reason | None) -> None:
        if reason is not None:
            self._refusals[reason] += 1

    # Eviction

    def evict_pages(self, count: int) -> int:
        """Free at least `count` pages by giving up kept states, least recently used first; returns how many it freed.

        States whose pages others hold as well would free nothing and stay.
        """
        freed = 0
        while freed < count:
            place = next((place for place, snapshot in self._kept.items() if self._frees_pages(snapshot)), None)
            if place is None:
                break
            freed += self._lose(place, "keys evicted")
            self._evictions += 1
        self._freed += freed
        return freed

    def _frees_pages(self, snapshot: Snapshot) -> bool:
        # Whoever shares a snapshot's last page shares all: tables only grow, and the last page is copied when written.
        last_is_own = bool(snapshot.pages) and self.pool.allocator.count(snapshot.pages[-1]) == 1
        return last_is_own and self._holds[snapshot] == 1

    def evict_sharers(self, page: int) -> bool:
        """Give up kept states that end on a page which a row is about to write; whether there were any.

        It frees no page, but the row then needs no copy of its own.
        """
        places = [place for place, snapshot in self._kept.items() if snapshot.pages[-1:] == (page,)]
        for place in places:
            self._lose(place, "keys evicted")
            self._evictions += 1
        return bool(places)

    def _shrink(self) -> None:
        """Give up the least recently used states until the rest fits."""
        while self._bytes > self.limit:
            place, snapshot = next((place, snapshot) for place, snapshot in self._kept.items() if snapshot.nbytes)
            if self.pool.layout.state_bytes:
                self._lose(place, "scan evicted")
            else:
                # Keys alone are of use in a model without scans.
                self._replace(place, snapshot, None)
            self._evictions += 1

    def _lose(self, place: Place, reason: Reason) -> int:
        """Give up one state and remember why; returns the pages that are free by that."""
        snapshot = self._kept.pop(place)
        self._bytes -= snapshot.nbytes
        self._lost[place] = reason
        if len(self._lost) > REMEMBERED:
            self._places.remove(self._lost.popitem(last=False)[0])
        return self.release(snapshot)

    def set_version(self, version: int) -> None:
        """The weights are others from here on: what was kept is of no use (states that callers hold stay theirs)."""
        for place in list(self._kept):
            self._lose(place, "other weights")
        for place in self._lost:
            self._lost[place] = "other weights"
        self.version = version

    def clear(self) -> None:
        """Forget everything that was kept, and what was lost."""
        for snapshot in self._kept.values():
            self.release(snapshot)
        self._places, self._bytes = PlaceIndex(), 0
        self._kept.clear()
        self._lost.clear()

    @property
    def metrics(self) -> CacheMetrics:
        """The counters as they are."""
        return CacheMetrics(
            hits=self._hits,
            hit_tokens=self._hit_tokens,
            misses=self._misses,
            no_prefix=self._refusals["no prefix"],
            no_last_hidden_state=self._refusals["no last hidden state"],
            scan_evicted=self._refusals["scan evicted"],
            keys_evicted=self._refusals["keys evicted"],
            other_weights=self._refusals["other weights"],
            kept=self._count,
            evictions=self._evictions,
            freed_pages=self._freed,
            snapshots=len(self._kept),
            scan_bytes=self._bytes,
        )
