"""What the twins read: text, recall and needles, dealt in one cycle; a batch is a function of seed and step alone.

Of eight slots of `plan.length` tokens three hold text, four recall and one a text with needles. Recall begins with few
pairs, and larger sizes join over the first `RAMP` of the run. Which twin reads them makes no difference: the order of
the data is the same for all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from turbos.bench.recall import Symbols, needle_sample, recall_sample
from turbos.bench.twins_plan import SYMBOLS, VOCABULARY, Plan
from turbos.common.errors import UserError
from turbos.common.records import Batch, Documents, Sample
from turbos.data.corpus import SourceShards, build_shards, training_texts
from turbos.data.loader import Loader, Part, batches_once
from turbos.data.packing import batch_of
from turbos.data.shards import ShardReader
from turbos.data.sources import fetch
from turbos.text.tokenizer import Tokenizer
from turbos.train.checkpoint import write_whole

SOURCES: Mapping[str, float] = {"english": 1.0, "chinese": 0.5, "python": 1.0, "problems": 0.5}
"""Sources of text and their weights."""

CYCLE = "TRTRNRTR"
"""Kinds of slots in their order: text, recall, text with needles."""

RAMP = 0.6
"""Share of the run over which the sizes of recall join, small ones first."""

ANSWER_WEIGHT = 4.0
"""Loss weight of an answer; a token of text has 1. Answers are a tenth of the tokens and so a third of the loss."""

TOKENIZER_CHARACTERS = 200_000


def prepare(directory: Path, plan: Plan, sources: Mapping[str, float] = SOURCES) -> None:
    """Fetch the texts, train the tokenizer and write the shards below a directory, as far as they are not there."""
    names = list(sources)
    if not (directory / "tokenizer").is_dir():
        print("bench twins: fetching texts, training a tokenizer", file=sys.stderr)
        fetch(names)
        tokenizer = Tokenizer.train(training_texts(names, TOKENIZER_CHARACTERS), VOCABULARY)
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(directory / "tokenizer", tokenizer.save)
    open_data(directory, plan, sources)


def open_data(
    directory: Path, plan: Plan, sources: Mapping[str, float] = SOURCES
) -> tuple[Tokenizer, list[SourceShards]]:
    """The tokenizer and the shards of every source; UserError for a tokenizer that reaches into the symbols."""
    tokenizer = Tokenizer.load(directory / "tokenizer")
    if tokenizer.vocab_size > SYMBOLS.first:
        raise UserError(f"{directory / 'tokenizer'} has {tokenizer.vocab_size} tokens, at most {SYMBOLS.first} may be")
    return tokenizer, build_shards(list(sources), tokenizer, directory / "shards", megabytes=plan.text_megabytes)


class Haystacks:
    """Stretches of text of any length, cut from the shards of all sources at places that are drawn."""

    def __init__(self, paths: Sequence[Path], tokenizer: Tokenizer) -> None:
        self._readers = [ShardReader(path, tokenizer) for path in paths]

    def draw(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """`length` tokens in their order, over the borders of documents; UserError where no source holds so many."""
        long_enough = [reader for reader in self._readers if reader.info.tokens >= length]
        if not long_enough:
            raise UserError(f"no source of text holds {length} tokens: raise text_megabytes")
        reader = long_enough[rng.integers(len(long_enough))]
        start = int(rng.integers(0, reader.info.tokens - length + 1))
        return reader.tokens(start, start + length)


class Mixture:
    """Training batches: `batch(step)` depends on the plan, the seed and the step."""

    def __init__(
        self,
        plan: Plan,
        seed: int,
        tokenizer: Tokenizer,
        shards: Sequence[SourceShards],
        sources: Mapping[str, float] = SOURCES,
    ) -> None:
        self.plan, self.seed = plan, seed
        parts = [Part(one.name, (ShardReader(one.train, tokenizer),), sources[one.name]) for one in shards]
        self._texts = Loader(parts, plan.length, seed, plan.length)
        self._haystacks = Haystacks([one.train for one in shards], tokenizer)
        self._slots_per_step = plan.tokens_per_step // plan.length

    def batch(self, step: int) -> Batch:
        """The batch of a step (from 0)."""
        first = step * self._slots_per_step
        return joined([self._slot(number) for number in range(first, first + self._slots_per_step)])

    def sizes(self, step: int) -> tuple[int, ...]:
        """Sizes of recall that a step may draw."""
        plan = self.plan
        joined_in = 1 + int(step / (RAMP * plan.steps) * len(plan.pairs))
        return plan.pairs[:joined_in]

    def _slot(self, number: int) -> Batch:
        cycle, place = divmod(number, len(CYCLE))
        if CYCLE[place] == "T":
            return self._texts.batch(cycle * CYCLE.count("T") + CYCLE[:place].count("T"))
        rng = np.random.default_rng([self.seed, number])
        if CYCLE[place] == "N":
            return weighted(batch_of([needle_of(self._haystacks, self.plan, self.plan.length, rng)]))
        sizes = self.sizes(number // self._slots_per_step)
        pairs = sizes[rng.integers(len(sizes))]
        return weighted(batch_of(list(recalls(pairs, self.plan.length // (4 * pairs), rng))))


def recalls(pairs: int, count: int, rng: np.random.Generator, symbols: Symbols = SYMBOLS) -> Iterator[Sample]:
    """`count` samples of recall of one size."""
    return (recall_sample(pairs, symbols, rng) for _ in range(count))


def needle_of(haystacks: Haystacks, plan: Plan, length: int, rng: np.random.Generator) -> Sample:
    """A text with needles and questions, `length` tokens in all."""
    return needle_sample(haystacks.draw(length - 4 * plan.needles, rng), plan.needles, SYMBOLS, rng)


def weighted(batch: Batch) -> Batch:
    """The batch with `ANSWER_WEIGHT` on the answers."""
    is_answer_T = batch.targets_T >= SYMBOLS.first
    return replace(batch, loss_weights_T=torch.where(is_answer_T, ANSWER_WEIGHT, 1.0) * batch.loss_weights_T)


def joined(batches: Sequence[Batch]) -> Batch:
    """Batches one after another as one."""
    return Batch(
        tokens_T=torch.cat([batch.tokens_T for batch in batches]),
        documents=Documents.from_lengths([length for batch in batches for length in batch.documents.lengths]),
        targets_T=torch.cat([batch.targets_T for batch in batches]),
        loss_weights_T=torch.cat([batch.loss_weights_T for batch in batches]),
    )


def held_out_batches(shards: SourceShards, tokenizer: Tokenizer, plan: Plan) -> list[Batch]:
    """About `plan.held_out_tokens` of a source's held-out texts, in documents of at most `plan.length` tokens."""
    batches, tokens = [], 0
    for batch in batches_once(ShardReader(shards.held_out, tokenizer), plan.length):
        if tokens >= plan.held_out_tokens:
            break
        batches.append(batch)
        tokens += batch.documents.total
    return batches
