"""The stateless loader: a batch is a pure function of its step, so resuming needs no state but the step.

Per source, documents are packed once (best fit) into slots; each epoch takes all slots in another order, so every
document appears whole exactly once per epoch. A fixed cycle deals the slots of a batch out to the sources by their
weights. Texts longer than a slot are cut into pieces; each piece still predicts the token after it. Conversations are
never cut, and predict only what the assistant says: longer ones wait (`Loader.waiting`). Nothing here knows of ranks or
of devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from turbos.common.errors import UserError
from turbos.common.records import IGNORED, Batch, Documents
from turbos.data.chats import ChatTargets
from turbos.data.packing import pack_lengths
from turbos.data.shards import ShardReader

CYCLE = 1024
"""Slots after which the deal between sources repeats: weights are honoured to 1/1024."""


@dataclass(frozen=True)
class Part:
    """One source of a mixture: its shards and its share of the tokens (weights need not add up to 1).

    With `targets` its documents are conversations: whole, with loss where those say.
    """

    name: str
    readers: tuple[ShardReader, ...]
    weight: float = 1.0
    targets: ChatTargets | None = None


@dataclass(frozen=True)
class Piece:
    """Tokens `start .. end - 1` of a shard: a document, or a part of a long one that goes on up to `document_end`."""

    reader: int
    start: int
    end: int
    document_end: int

    @property
    def predicts(self) -> bool:
        """Whether any token of it has a next one."""
        return self.start + 1 < self.document_end


@dataclass(frozen=True)
class Waiting:
    """A conversation that is longer than a slot: it waits for a phase with a longer context."""

    source: str
    shard: str
    document: int
    tokens: int


def _pieces(part: Part, longest: int) -> tuple[list[Piece], list[Waiting]]:
    """Every document of a source in pieces of at most `longest` tokens, and the conversations that are longer."""
    found, waiting = [], []
    for number, reader in enumerate(part.readers):
        borders = reader.offsets.tolist()
        for document, (start, end) in enumerate(pairwise(borders)):
            if part.targets is not None and end - start > longest:
                waiting.append(Waiting(part.name, reader.path.name, document, end - start))
            else:
                found += [Piece(number, at, min(at + longest, end), end) for at in range(start, end, longest)]
    return found, waiting


class _Slots:
    """A source's pieces packed into slots of limited tokens, and their order in each epoch."""

    def __init__(self, part: Part, number: int, slot_tokens: int, seed: int) -> None:
        self.part = part
        self._key = (seed, number)
        pieces, self.waiting = _pieces(part, slot_tokens)
        if not pieces and self.waiting:
            raise UserError(
                f"all {len(self.waiting)} conversations of {part.name!r} are longer than {slot_tokens} tokens: "
                "raise data.longest_document, or leave that source out"
            )
        if not pieces:
            raise UserError(f"source {part.name!r} has no documents: leave it out or name another")
        # Shuffled before packing, so that documents of equal length meet in no order of the corpus.
        order = np.random.default_rng([*self._key]).permutation(len(pieces))
        self._pieces = [pieces[index] for index in order]
        packed = pack_lengths([piece.end - piece.start for piece in self._pieces], slot_tokens)
        # A cut may leave a document's last token alone, which its predecessor has predicted already. A slot of nothing
        # but such tokens has no loss.
        self._slots = [slot for slot in packed if any(self._pieces[index].predicts for index in slot)]
        if not self._slots:
            raise UserError(f"source {part.name!r} has only empty documents: leave it out or name another")
        self._epoch, self._order = -1, order

    def __len__(self) -> int:
        return len(self._slots)

    def at(self, position: int) -> list[Piece]:
        """Pieces of the slot at a position counted over all epochs."""
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([*self._key, 1 + epoch]).permutation(len(self))
        return [self._pieces[index] for index in self._slots[self._order[place]]]


def _deal(weights: Sequence[float]) -> np.ndarray:
    """Which source each slot of a cycle belongs to: always the one furthest behind its share. int64 `[CYCLE]`."""
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    given = np.zeros(len(weights))
    dealt = np.empty(CYCLE, dtype=np.int64)
    for slot in range(CYCLE):
        dealt[slot] = np.argmax(shares * (slot + 1) - given)
        given[dealt[slot]] += 1
    return dealt


def _batch(parts: Sequence[tuple[Part, Piece]]) -> Batch:
    """Pieces as one packed batch; the last token of a cut piece predicts the next token of its document."""
    tokens, targets = [], []
    for part, piece in parts:
        reader = part.readers[piece.reader]
        ids = reader.tokens(piece.start, min(piece.end + 1, piece.document_end))
        length = piece.end - piece.start
        tokens.append(ids[:length])
        following = ids[1:]
        if part.targets is not None:
            following = np.where(part.targets.weights(ids)[1:], following, IGNORED)
        targets.append(following if len(ids) > length else np.append(following, IGNORED))
    targets_T = torch.from_numpy(np.concatenate(targets))
    return Batch(
        tokens_T=torch.from_numpy(np.concatenate(tokens)),
        documents=Documents.from_lengths([len(ids) for ids in tokens]),
        targets_T=targets_T,
        loss_weights_T=(targets_T != IGNORED).float(),
    )


class Loader:
    """Packed batches of a mixture of sources; `batch(step)` depends on nothing but the step and what is given here."""

    def __init__(
        self, parts: Sequence[Part], tokens_per_batch: int, seed: int = 0, longest_document: int | None = None
    ) -> None:
        """Pack every source.

        A batch has at most `tokens_per_batch` tokens in slots of `longest_document` tokens (default: one slot, so that
        only documents longer than a batch are cut; several slots mix sources within each batch).
        Raises UserError for an empty mixture or source, a weight <= 0, or a slot longer than the batch.
        """
        slot = tokens_per_batch if longest_document is None else longest_document
        if not parts:
            raise UserError("the mixture names no source: add at least one")
        for part in parts:
            if not 0 < part.weight < math.inf:
                raise UserError(f"source {part.name!r} has weight {part.weight}: weights are above 0 and finite")
        if not 2 <= slot <= tokens_per_batch:
            raise UserError(f"longest_document must be from 2 to tokens_per_batch ({tokens_per_batch}), got {slot}")
        self.slot_tokens, self.slots_per_batch = slot, tokens_per_batch // slot
        self._sources = [_Slots(part, number, slot, seed) for number, part in enumerate(parts)]
        self._dealt = _deal([part.weight for part in parts])

    @cached_property
    def _dealt_before(self) -> np.ndarray:
        """How many slots each source got before each slot of a cycle, int64 `[CYCLE + 1, sources]`."""
        given = np.eye(len(self._sources), dtype=np.int64)[self._dealt]
        return np.concatenate([np.zeros((1, len(self._sources)), dtype=np.int64), given.cumsum(0)])

    def _slot(self, number: int) -> tuple[Part, list[Piece]]:
        """The slot of a global number."""
        cycle, place = divmod(number, CYCLE)
        source = int(self._dealt[place])
        before = self._dealt_before
        position = cycle * int(before[-1, source]) + int(before[place, source])
        return self._sources[source].part, self._sources[source].at(position)

    def batch(self, step: int) -> Batch:
        """The batch of a step (from 0)."""
        first = step * self.slots_per_batch
        chosen = [self._slot(number) for number in range(first, first + self.slots_per_batch)]
        return _batch([(part, piece) for part, pieces in chosen for piece in pieces])

    @cached_property
    def waiting(self) -> list[Waiting]:
        """Conversations that are longer than a slot, and in no batch."""
        return [one for source in self._sources for one in source.waiting]

    def slots_in_epoch(self, name: str) -> int:
        """How many slots make one epoch of a source (a batch has `slots_per_batch` of them)."""
        return next(len(source) for source in self._sources if source.part.name == name)


def batches_once(reader: ShardReader, tokens_per_batch: int, targets: ChatTargets | None = None) -> Iterator[Batch]:
    """Every document of a shard once, in packed batches: for measuring, where nothing is drawn.

    Conversations (`targets`) that are longer than a batch are left out.
    """
    part = Part(str(reader.path), (reader,), targets=targets)
    slots = _Slots(part, 0, tokens_per_batch, seed=0)
    return (_batch([(part, piece) for piece in slots.at(position)]) for position in range(len(slots)))
