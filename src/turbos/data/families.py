"""Families of problems: where each draws its questions, which it keeps, how it works them out, who checks the answer.

Questions come from reasoning-gym's generators (and are scored by its `score_answer`) or from engram-generator's. We
ask them in fewer words, because each token costs a small model, and write the worked steps of reasoning-gym's
families ourselves (`worked.py`). Draws that would make an answer guessable are thinned. Splits and seeds are the
matter of `problems.py`, not of this file.

>>> FAMILIES["addition"].draw(0, 23).question.startswith("add ")
True
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from turbos.data import worked

ENDLESS = 2**62
"""Virtual size of a reasoning-gym dataset: any index is an item."""

NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


@dataclass(frozen=True)
class Draft:
    """A drawn question before its split is known; `thinking` is written only for those that are kept."""

    question: str
    answer: str
    thinking: Callable[[], str]
    metadata: str = "{}"


@dataclass(frozen=True)
class Family:
    """A kind of problem: `draw(level, index)` gives a draft or None (not wanted), `score(answer, metadata, right)`."""

    name: str
    source: str
    levels: int
    draw: Callable[[int, int], Draft | None]
    score: Callable[[str, Mapping[str, Any], str], bool]


def unit(index: int) -> float:
    """A number in [0, 1) spread evenly over indices (the finaliser of splitmix64): cheaper than seeding a generator."""
    mask = 2**64 - 1
    x = (index * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) / 2.0**64


@cache
def _reasoning_gym() -> ModuleType:
    """reasoning-gym, imported late because it takes seconds to load.

    Its import wants `pycosat`, a SAT solver that has no ready-made builds. Only its zebra puzzles call that, and no
    family here does; so where a machine could not build it, an empty module stands in, on which any call fails.
    """
    if importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = ModuleType("pycosat")
    return importlib.import_module("reasoning_gym")


@cache
def _gym(name: str, config: tuple[tuple[str, int], ...]) -> Any:
    """A reasoning-gym dataset."""
    return _reasoning_gym().create_dataset(name, seed=0, size=ENDLESS, **dict(config))


@cache
def _engram_class(task: str) -> Any:
    """The generator class of an engram-generator task; loading its registry imports all of its modules once."""
    from engram_generator.curriculum.registry import get_generator

    return type(get_generator(task))


def _engram(task: str, difficulty: int, index: int) -> Any:
    """The engram sample of one index: a fresh generator seeded by it."""
    return _engram_class(task)(min_difficulty=difficulty, max_difficulty=difficulty, seed=index).generate(1)[0]


def _groups(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    """What a pattern finds in a generator's wording; ValueError where the wording is another one."""
    match = pattern.fullmatch(text)
    if match is None:
        raise ValueError(f"a generator worded its problem in an unknown way: {text!r}")
    return match.groups()


def _gym_draft(entry: Mapping[str, Any], question: str, thinking: Callable[[], str], answer: str = "") -> Draft:
    """A draft that keeps what reasoning-gym's scorer reads."""
    return Draft(question, answer or entry["answer"], thinking, json.dumps({"answer": entry["answer"]}))


def _gym_score(name: str, spaced: bool = False) -> Callable[[str, Mapping[str, Any], str], bool]:
    """Full marks from the dataset's own `score_answer`; numbers must be plain ASCII before it sees them."""

    def score(answer: str, metadata: Mapping[str, Any], right: str) -> bool:
        answer = answer.replace(" ", "") if spaced else answer
        if NUMBER.fullmatch(metadata["answer"]) and not NUMBER.fullmatch(answer):
            return False
        return float(_gym(name, ()).score_answer(answer, metadata)) == 1.0

    return score


def _exact_score(answer: str, metadata: Mapping[str, Any], right: str) -> bool:
    """The right text, character by character."""
    return answer == right


CHAIN_SUM = (
    (("min_terms", 2), ("max_terms", 2), ("min_digits", 2), ("max_digits", 2)),
    (("min_terms", 3), ("max_terms", 3), ("min_digits", 1), ("max_digits", 2)),
    (("min_terms", 3), ("max_terms", 3), ("min_digits", 2), ("max_digits", 2)),
    (("min_terms", 4), ("max_terms", 4), ("min_digits", 2), ("max_digits", 3)),
)


def _draw_chain_sum(level: int, index: int) -> Draft | None:
    """Sums and differences; the first two levels never fall below zero on the way."""
    entry = _gym("chain_sum", CHAIN_SUM[level])[index]
    expression = entry["metadata"]["expression"]
    terms = [int(term) for term in expression.replace("+ ", "+").replace("- ", "-").split()]
    if level < 2 and min(sum(terms[:count]) for count in range(1, len(terms) + 1)) < 0:
        return None
    return _gym_draft(entry, f"{expression} = ?", lambda: worked.chain_sum(terms))


PRODUCTS = (
    (("min_terms", 4), ("max_terms", 4), ("min_digits", 1), ("max_digits", 1)),
    (("min_terms", 2), ("max_terms", 2), ("min_digits", 2), ("max_digits", 2)),
    (("min_terms", 2), ("max_terms", 2), ("min_digits", 3), ("max_digits", 3)),
)


def _draw_products(level: int, index: int) -> Draft | None:
    """Products of factors that are neither 0 nor 1 (those make half of the answers guessable)."""
    entry = _gym("products", PRODUCTS[level])[index]
    expression = entry["metadata"]["expression"]
    factors = [int(factor) for factor in expression.split(" * ")]
    if min(factors) < 2:
        return None
    return _gym_draft(entry, f"{expression} = ?", lambda: worked.product(factors))


GCD_MAX = (99, 200, 400)


def _subtractions(high: int, low: int) -> int:
    """How many subtractions Euclid needs until both numbers are equal (the sum of the quotients, less one)."""
    count = 0
    while low:
        count += high // low
        high, low = low, high % low
    return count - 1


def _draw_gcd(level: int, index: int) -> Draft | None:
    """Two numbers; small divisors are kept seldom, so that every divisor up to 8 is about equally frequent."""
    entry = _gym("gcd", (("max_value", GCD_MAX[level]),))[index]
    a, b = entry["metadata"]["numbers"]
    keep = min(1.0, (entry["metadata"]["result"] / 8) ** 2)
    if a == b or unit(index) > keep or not 1 <= _subtractions(a, b) <= 8:
        return None
    return _gym_draft(entry, f"gcd of {a} and {b}?", lambda: worked.gcd((a, b)))


LCM_MAX = (90, 160, 240)


def _draw_lcm(level: int, index: int) -> Draft | None:
    """Two numbers whose multiples meet within ten steps."""
    entry = _gym("lcm", (("min_value", 2), ("max_value", LCM_MAX[level])))[index]
    a, b = entry["metadata"]["numbers"]
    common = entry["metadata"]["result"]
    if a == b or common // a + common // b > 12:
        return None
    return _gym_draft(entry, f"lcm of {a} and {b}?", lambda: worked.lcm((a, b)))


COUNT_BITS = ((12, 3), (14, 3), (16, 4))
"""Bits of the largest number, and the fewest ones that are asked for (the most: bits less that)."""


def _draw_count_bits(level: int, index: int) -> Draft | None:
    """Numbers thinned so that every count of ones between the bounds is equally frequent."""
    bits, fewest = COUNT_BITS[level]
    entry = _gym("count_bits", (("max_n", 2**bits - 1),))[index]
    number, ones = entry["metadata"]["number"], entry["metadata"]["solution"]
    if not fewest <= ones <= bits - fewest or unit(index) > math.comb(bits, fewest) / math.comb(bits, ones):
        return None
    return _gym_draft(entry, f"one bits in {number}?", lambda: worked.count_bits(number))


BINARY_MAX = (511, 1023, 4095)


@cache
def _to_binary(level: int) -> Any:
    """reasoning-gym's base conversion, bound to decimal -> binary (its own draw of bases hits that pair 1 in 210)."""
    _reasoning_gym()
    from reasoning_gym.algorithmic.base_conversion import BaseConversionConfig, BaseConversionDataset

    class DecimalToBinary(BaseConversionDataset):
        def _generate_conversion(self, rng: Any) -> tuple[int, int, int]:
            return rng.randint(self.config.min_value, self.config.max_value), 10, 2

    return DecimalToBinary(BaseConversionConfig(min_value=8, max_value=BINARY_MAX[level], seed=0, size=ENDLESS))


def _draw_base_conversion(level: int, index: int) -> Draft | None:
    """Decimal numbers to write in binary."""
    entry = _to_binary(level)[index]
    number = entry["metadata"]["decimal_value"]
    return _gym_draft(entry, f"{number} in binary?", lambda: worked.to_binary(number))


WORD_LENGTHS = ((3, 4), (5, 6), (7, 8))


def _draw_spell_backward(level: int, index: int) -> Draft | None:
    """Words spelt out, so that a model needs no knowledge of how its tokens are spelt."""
    low, high = WORD_LENGTHS[level]
    entry = _gym("spell_backward", (("min_word_len", low), ("max_word_len", high)))[index]
    word = entry["metadata"]["word"].lower()
    if not (word.isascii() and word.isalpha()) or word == word[::-1]:
        return None
    return _gym_draft(
        entry, f"spell backward: {' '.join(word)}", lambda: worked.reverse(word), " ".join(reversed(word))
    )


COUNT_LENGTH_DIFFICULTY = (3, 4, 6)
COUNT_FLOOR = (0.05, 0.028, 0.02)
COUNT_PATTERN = re.compile(r"count '(.)' in '(.*)'")


def _draw_character_count(level: int, index: int) -> Draft | None:
    """Random letters a-e; counts are thinned to be about equally frequent (drawn ones are 1 + binomial)."""
    sample = _engram("character_count", COUNT_LENGTH_DIFFICULTY[level], index)
    letter, letters = _groups(COUNT_PATTERN, sample.problem)
    count, rest = letters.count(letter), len(letters) - 1
    chance = math.comb(rest, count - 1) * 0.2 ** (count - 1) * 0.8 ** (rest - count + 1)
    if sample.answer != str(count) or unit(index) > COUNT_FLOOR[level] / chance:
        return None
    question = f"count {letter} in: {' '.join(letters)}"
    return Draft(question, sample.answer, lambda: worked.count_letter(letter, letters))


def _own_steps(question: str, sample: Any, right: str) -> Draft | None:
    """A draft with engram's own steps, if our own answer agrees with its answer."""
    steps = list(sample.steps)
    return Draft(question, right, lambda: " ".join(steps)) if sample.answer == right else None


def _draw_addition(level: int, index: int) -> Draft | None:
    """Two numbers of 2, 3 or 4 digits, with engram's columns."""
    sample = _engram("addition", level + 2, index)
    a, b = sample.problem.split(" + ")
    return _own_steps(f"add {a} and {b}", sample, str(int(a) + int(b)))


def _draw_subtraction(level: int, index: int) -> Draft | None:
    """The smaller of two numbers of 2, 3 or 4 digits from the larger, with engram's columns."""
    sample = _engram("subtraction", level + 2, index)
    a, b = sample.problem.split(" - ")
    return _own_steps(f"subtract {b} from {a}", sample, str(int(a) - int(b)))


def _draw_digit_root(level: int, index: int) -> Draft | None:
    """The digit root of a number of 3, 4 or 6 digits; our own steps, since engram adds all digits in a single one."""
    sample = _engram("digit_root", (2, 3, 5)[level], index)
    number = int(re.sub(r"[^0-9]", "", sample.problem))
    if sample.answer != str((number - 1) % 9 + 1):
        return None
    return Draft(f"digit root of {number}?", sample.answer, lambda: worked.digit_root(number))


TIME_PATTERN = re.compile(r"(\d+):(\d+) \+ (\d+)h (\d+)m")


def _draw_time_arithmetic(level: int, index: int) -> Draft | None:
    """A time of day some hours and minutes later, with engram's two sums."""
    sample = _engram("time_arithmetic", level + 1, index)
    hour, minute, hours, minutes = map(int, _groups(TIME_PATTERN, sample.problem))
    total = (hour + hours) * 60 + minute + minutes
    return _own_steps(f"{sample.problem} = ?", sample, f"{total // 60 % 24:02d}:{total % 60:02d}")


def _draw_sorting(level: int, index: int) -> Draft | None:
    """3, 4 or 6 numbers up to 100; our own steps, since engram's swaps never show the list."""
    sample = _engram("sorting", (1, 2, 4)[level], index)
    numbers = [int(number) for number in sample.problem.split(",")]
    if sample.answer != ",".join(map(str, sorted(numbers))):
        return None
    return Draft(f"sort {sample.problem}", sample.answer, lambda: worked.sort_numbers(numbers))


GYM, ENGRAM = "reasoning-gym", "engram-generator"

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("chain_sum", GYM, 4, _draw_chain_sum, _gym_score("chain_sum")),
        Family("products", GYM, 3, _draw_products, _gym_score("products")),
        Family("gcd", GYM, 3, _draw_gcd, _gym_score("gcd")),
        Family("lcm", GYM, 3, _draw_lcm, _gym_score("lcm")),
        Family("count_bits", GYM, 3, _draw_count_bits, _gym_score("count_bits")),
        Family("base_conversion", GYM, 3, _draw_base_conversion, _gym_score("base_conversion")),
        Family("spell_backward", GYM, 3, _draw_spell_backward, _gym_score("spell_backward", spaced=True)),
        Family("character_count", ENGRAM, 3, _draw_character_count, _exact_score),
        Family("addition", ENGRAM, 3, _draw_addition, _exact_score),
        Family("subtraction", ENGRAM, 3, _draw_subtraction, _exact_score),
        Family("digit_root", ENGRAM, 3, _draw_digit_root, _exact_score),
        Family("time_arithmetic", ENGRAM, 3, _draw_time_arithmetic, _exact_score),
        Family("sorting", ENGRAM, 3, _draw_sorting, _exact_score),
    )
}
"""Every family by its name."""
