"""What a trained twin can do: bits per byte of held-out text, recall by number of pairs, needles by length.

Questions are drawn from seeds of their own, so that every twin of every seed answers the same ones; haystacks are
held-out text. A right answer is the likeliest of all tokens.

    figures = measure(model, twin, plan, tokenizer, shards)
    figures.recall[64], figures.needle[8], figures.mean_recall
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from turbos.bench.twins_data import SOURCES, Haystacks, held_out_batches, needle_of, recalls
from turbos.bench.twins_plan import SYMBOLS, Plan
from turbos.common.records import Sample
from turbos.data.corpus import SourceShards
from turbos.data.packing import batch_of, pack_samples
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.held_out import bits_per_byte

RECALL_SEED, NEEDLE_SEED = 2**40, 2**41
"""Seeds of the questions; training's are below."""

TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Abilities:
    """Bits per byte by source, and shares of right answers (0..1): recall by pairs, needle by multiple of the length.

    `stretched` are needles beyond the length with the rotary base stretched; empty without rotary positions.
    """

    bits_per_byte: Mapping[str, float]
    recall: Mapping[int, float]
    needle: Mapping[int, float]
    stretched: Mapping[int, float] = field(default_factory=dict)

    @property
    def mean_bits(self) -> float:
        """Over the sources, weighted as in the mixture."""
        weights = {name: SOURCES.get(name, 1.0) for name in self.bits_per_byte}
        return sum(weights[name] * bits for name, bits in self.bits_per_byte.items()) / sum(weights.values())

    @property
    def mean_recall(self) -> float:
        """Over all sizes."""
        return statistics.mean(self.recall.values())


def measure(model: LanguageModel, plan: Plan, tokenizer: Tokenizer, shards: Sequence[SourceShards]) -> Abilities:
    """Everything that a trained twin is asked."""
    bits = {one.name: bits_per_byte(model, tokenizer, held_out_batches(one, tokenizer, plan)) for one in shards}
    haystacks = Haystacks([one.held_out for one in shards], tokenizer)
    needle = {multiple: accuracy(model, _needles(haystacks, plan, multiple)) for multiple in plan.multiples}
    stretched = {}
    if model.config.rope_theta is not None:
        beyond = [multiple for multiple in plan.multiples if multiple > 1]
        stretched = {
            multiple: accuracy(stretch(model, multiple), _needles(haystacks, plan, multiple)) for multiple in beyond
        }
    return Abilities(bits, recall_by_pairs(lambda samples: accuracy(model, samples), plan), needle, stretched)


def recall_by_pairs(share_right: Callable[[Sequence[Sample]], float], plan: Plan) -> dict[int, float]:
    """What `share_right` says of the questions of each size."""
    found = {}
    for pairs in plan.pairs:
        rng = np.random.default_rng([RECALL_SEED, pairs])
        found[pairs] = share_right(list(recalls(pairs, -(-plan.recall_answers // pairs), rng)))
    return found


def _needles(haystacks: Haystacks, plan: Plan, multiple: int) -> list[Sample]:
    rng = np.random.default_rng([NEEDLE_SEED, multiple])
    return [needle_of(haystacks, plan, multiple * plan.length, rng) for _ in range(plan.haystacks)]


def stretch(model: LanguageModel, multiple: float) -> LanguageModel:
    """The same weights with the rotary base stretched so many times (NTK rule)."""
    stretched = LanguageModel(replace(model.config, rope_alpha=float(multiple)))
    stretched.load_state_dict(model.state_dict(), assign=True)
    return stretched


@torch.no_grad()
def accuracy(model: LanguageModel, samples: Sequence[Sample]) -> float:
    """Share of a set's answers that are the likeliest token."""
    right = total = 0
    room = max(TOKENS_AT_ONCE, *(len(sample.ids) for sample in samples))
    for chosen in pack_samples(samples, room):
        batch = batch_of([samples[index] for index in chosen])
        places = (batch.targets_T >= SYMBOLS.first).nonzero()[:, 0]
        logits = model.logits(model(batch.tokens_T, batch.documents).hidden_TD[places])
        right += int((logits.argmax(-1) == batch.targets_T[places]).sum())
        total += len(places)
    return right / total
