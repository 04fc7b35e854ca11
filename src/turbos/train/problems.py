"""Which checked problems to train on, in what shares: an endless stream of samples that is a pure function of its key.

The problems themselves, and the split into training and held-out seeds, are `data.problems`' business.

    mix = ProblemMix(families={"gcd": 2.0, "chain_sum/0": 1.0}, thinking_share=0.7)
    samples = itertools.islice(problem_stream(mix, tokenizer, key="seed 0 step 12"), 100)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Literal

from turbos.common.errors import UserError
from turbos.common.records import Sample
from turbos.data.problems import FIRST_HELD_OUT_SEED, families, levels, make_problem, problem_sample
from turbos.text.tokenizer import Tokenizer

Mode = Literal["think", "short"]
HELD_OUT_SEEDS = range(FIRST_HELD_OUT_SEED, 2 * FIRST_HELD_OUT_SEED)


@dataclass(frozen=True)
class ProblemMix:
    """Weights by family: `gcd` draws from all its levels alike, `gcd/0` from that level only; none named = all.

    `thinking_share` of the samples show worked steps, the others have empty thinking.
    """

    families: dict[str, float] = field(default_factory=dict)
    thinking_share: float = 0.5

    def __post_init__(self) -> None:
        for name, weight in self.families.items():
            family, slash, level = name.partition("/")
            if slash and not (level.isdecimal() and int(level) < levels(family)):
                raise UserError(f"problems: {name!r} is no level of {family!r}, which has 0 to {levels(family) - 1}")
            if levels(family) and not 0 <= weight < math.inf:
                raise UserError(f"problems: the weight of {name!r} must not be below 0, and finite; not {weight}")
        if self.families and sum(self.families.values()) <= 0:
            raise UserError("problems: at least one family needs a weight above 0")
        if not 0 <= self.thinking_share <= 1:
            raise UserError("problems: thinking_share lies between 0 and 1")


def problem_stream(mix: ProblemMix, tokenizer: Tokenizer, key: str) -> Iterator[Sample]:
    """Endless training samples (problem seeds below 1e6); the same key gives the same samples on every machine."""
    random = Random(key)
    names, weights = _names_and_weights(mix)
    while True:
        name = random.choices(names, weights)[0]
        mode: Mode = "think" if random.random() < mix.thinking_share else "short"
        yield _sample(tokenizer, name, random, range(FIRST_HELD_OUT_SEED), mode)


def held_out_samples(mix: ProblemMix, tokenizer: Tokenizer, mode: Mode, count: int) -> list[Sample]:
    """`count` samples of held-out problems, always the same; how they think is given by `mode`."""
    random = Random(f"held out {mode}")
    names, weights = _names_and_weights(mix)
    drawn = random.choices(names, weights, k=count)
    return [_sample(tokenizer, name, random, HELD_OUT_SEEDS, mode) for name in drawn]


def _names_and_weights(mix: ProblemMix) -> tuple[Sequence[str], Sequence[float]]:
    chosen = mix.families or dict.fromkeys(families(), 1.0)
    return list(chosen), list(chosen.values())


def _sample(tokenizer: Tokenizer, name: str, random: Random, seeds: range, mode: Mode) -> Sample:
    family, _, level = name.partition("/")
    chosen = int(level) if level else random.randrange(levels(family))
    return problem_sample(tokenizer, make_problem(family, random.choice(seeds), chosen), mode)
