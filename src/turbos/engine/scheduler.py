"""Who gets a row of the pool, who reads, who writes, who must step back: first come, first served.

It holds every sequence that has not ended and all decisions about memory; it runs no model. The oldest sequence always
goes on: where pages are short, states that were kept are dropped, then the youngest sequence gives its row back and
waits at the front.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from torch import Tensor

from turbos.engine.cache import Hit, Miss, StateCache
from turbos.engine.pool import PAGE, PoolRow, StatePool
from turbos.engine.sequence import Group, Sequence


class Scheduler:
    """Sequences by state; one that has not ended is `waiting`, or it is `reading`, or it is in `writing`.

    Prompts are read one after the other: two that are read at the same time would both be late.
    """

    def __init__(self, pool: StatePool, cache: StateCache, segment: int, snapshot_every: int) -> None:
        self.pool, self.cache = pool, cache
        self._segment, self._snapshot_every = segment, snapshot_every
        self.waiting: deque[Sequence] = deque()
        self.reading: Sequence | None = None
        self.writing: list[Sequence] = []
        self._groups: dict[tuple[object, ...], Group] = {}
        self._stuck: Sequence | None = None
        self._numbers = itertools.count()
        self.preemptions = 0

    @property
    def busy(self) -> bool:
        """Whether some sequence has not ended."""
        return bool(self.waiting or self.reading or self.writing)

    @property
    def begun(self) -> bool:
        """Whether some sequence has read or written something and has not ended."""
        return bool(self.reading or self.writing) or any(sequence.writer.ids for sequence in self.waiting)

    def add(self, sequence: Sequence) -> None:
        """A new sequence, at the end of the line."""
        # Given here, so that age and place in the line agree whichever thread asked.
        sequence.number = next(self._numbers)
        self._join(sequence)
        self.waiting.append(sequence)

    def admit(self, only_begun: bool = False) -> Sequence | None:
        """Let the first in line read, if there is room for it; `only_begun`: if it has been preempted.

        Its row already holds what is known of its prompt; `hidden_D` is there if that is all of it.
        """
        if self.reading is not None or not self.waiting:
            return self.reading
        first = self.waiting[0]
        if only_begun and not first.writer.ids:
            return None
        # Those that run only take room: until one of them gives some back, trying again is of no use.
        if first is self._stuck and self.writing:
            return None
        seated = self._seat(first)
        self._stuck = None if seated else first
        if seated:
            self.reading = self.waiting.popleft()
        return self.reading

    def next_border(self, sequence: Sequence) -> int | None:
        """Up to where the reading sequence reads next, its pages ready; None if it had to step back."""
        assert sequence.row is not None
        border = min(self._borders(sequence, sequence.row.length))
        return border if self._grow(sequence, border) else None

    def is_kept_at(self, sequence: Sequence, length: int) -> bool:
        """Whether the state after `length` tokens is kept: at marks, and every so many tokens."""
        return sequence.params.cache and (length in sequence.marks or length % self._snapshot_every == 0)

    def prompt_was_read(self, sequence: Sequence, hidden_D: Tensor) -> None:
        """From here on it writes; siblings that wait begin with a copy of its state."""
        assert sequence is self.reading and sequence.row is not None
        group = sequence.group
        self.reading = None
        self.writing.append(sequence)
        group.waiting -= 1
        if group.waiting and group.snapshot is None:
            group.snapshot = self.cache.take(sequence.row, hidden_D)

    def sequences(self) -> list[Sequence]:
        """All that have not ended."""
        return [*self.waiting, *([] if self.reading is None else [self.reading]), *self.writing]

    def batch(self) -> list[Sequence]:
        """Sequences that write in this step, oldest first, each with a page for its next token."""
        for sequence in sorted(self.writing, key=lambda one: one.number):
            # It may have stepped back for an older one meanwhile.
            if sequence.row is not None:
                self._grow(sequence, sequence.row.length + 1)
        return sorted(self.writing, key=lambda one: one.number)

    def end(self, sequence: Sequence) -> None:
        """A sequence is over, wherever it was: its row is free at once."""
        if sequence not in self.writing:
            sequence.group.waiting -= 1
        self._remove(sequence)
        self.forget_if_done(sequence)

    # Rows

    def _seat(self, sequence: Sequence) -> bool:
        """A row with what is known of the prompt in it; False where there is no room."""
        while not self._takes_row(sequence):
            # Where nobody runs, all memory is this sequence's, whatever was kept.
            alone = self.reading is None and not self.writing
            if not alone or not (self._drop_a_group() or self.cache.evict_pages(1)):
                return False
        return True

    def _takes_row(self, sequence: Sequence) -> bool:
        row = self.pool.new_row()
        if row is None:
            return False
        found = self._known(sequence)
        snapshot = found.snapshot if isinstance(found, Hit) else None
        if snapshot is not None:
            self.cache.restore(snapshot, row)
            self.cache.release(snapshot)
        if self._room_for(row, sequence.total + 1):
            self._count_look(sequence, found)
            sequence.row, sequence.cached_tokens = row, row.length
            whole = snapshot is not None and row.length == sequence.prompt_length
            sequence.hidden_D = snapshot.hidden_D if snapshot is not None and whole else None
            return True
        self.pool.free_row(row)
        return False

    def _known(self, sequence: Sequence) -> Hit | Miss | None:
        """The longest state of the prompt that is there, held for the caller; None where nobody looked."""
        snapshot = sequence.group.snapshot
        if snapshot is not None:
            return Hit(self.cache.hold(snapshot), snapshot.length)
        if not sequence.params.cache or sequence.params.routes:
            return None
        return self.cache.look(sequence.prompt_ids)

    def _count_look(self, sequence: Sequence, found: Hit | Miss | None) -> None:
        """Count a prompt's look among kept states, the first time that somebody of its group has a row by it."""
        group = sequence.group
        if found is not None and group.snapshot is None and not (group.looked_up or sequence.writer.ids):
            self.cache.count(found)
            group.looked_up = True

    def _room_for(self, row: PoolRow, length: int) -> bool:
        """Whether pages for `length` tokens are free or can be made so, and one more for each that writes."""
        short = self.pool.pages_missing(row, length) + len(self.writing) - self.pool.allocator.free
        return short <= 0 or not self.pool.pages_matter or self.cache.evict_pages(short) >= short

    def _borders(self, sequence: Sequence, length: int) -> Iterator[int]:
        """Where a piece that begins at `length` may end: fixed places, so that the numbers are the same every time."""
        yield (length // self._segment + 1) * self._segment
        yield (length // self._snapshot_every + 1) * self._snapshot_every
        yield sequence.prompt_length
        yield from (mark for mark in sequence.marks if mark > length)

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` tokens, at others' expense if need be; False if the sequence had to step back itself."""
        assert sequence.row is not None
        while not self.pool.ensure(sequence.row, length):
            if self.cache.evict_pages(1) or self._unshare(sequence.row):
                continue
            if self._youngest is sequence and self._drop_a_group():
                continue
            youngest = self._youngest
            self.step_back(youngest)
            if youngest is sequence:
                return False
        return True

    def _unshare(self, row: PoolRow) -> bool:
        """Give up kept states that end on the page which the row writes next: it needs no copy then."""
        place = row.length // PAGE
        return place < len(row.table) and self.cache.evict_sharers(row.table[place])

    @property
    def _youngest(self) -> Sequence:
        return max((one for one in self.sequences() if one.row is not None), key=lambda one: one.number)

    def step_back(self, sequence: Sequence) -> None:
        """Give the row back and wait at the front, among others there by age; it will read all of it again."""
        self.preemptions += 1
        joined = sequence not in self.writing
        self._remove(sequence)
        sequence.routes.clear()
        sequence.hidden_D = None
        if not joined:
            self._join(sequence)
        self.waiting.insert(sum(one.number < sequence.number for one in self.waiting), sequence)

    def _remove(self, sequence: Sequence) -> None:
        if self.reading is sequence:
            self.reading = None
        for place in (self.waiting, self.writing):
            if sequence in place:
                place.remove(sequence)
        if sequence.row is not None:
            self.pool.free_row(sequence.row)
            sequence.row = self._stuck = None

    # Groups

    def _join(self, sequence: Sequence) -> None:
        sequence.group = self._groups.setdefault(sequence.likeness, sequence.group)
        sequence.group.waiting += 1

    def forget_if_done(self, sequence: Sequence) -> None:
        """A group whose last member has begun to write needs its state no more."""
        group = sequence.group
        if group.waiting == 0 and self._groups.get(sequence.likeness) is group:
            self._release(group)
            del self._groups[sequence.likeness]

    def release_prompts(self) -> None:
        """Forget the states of prompts that siblings wait for: the weights have changed."""
        for group in self._groups.values():
            self._release(group)
            group.routes = ()

    def _release(self, group: Group) -> None:
        if group.snapshot is not None:
            self.cache.release(group.snapshot)
            self._stuck = None
        group.snapshot = group.logits_V = None

    def _drop_a_group(self) -> bool:
        """Release a prompt's state that siblings wait for (they will read it themselves); whether there was one."""
        group = next((one for one in self._groups.values() if one.snapshot is not None), None)
        if group is None:
            return False
        self._release(group)
        return True
