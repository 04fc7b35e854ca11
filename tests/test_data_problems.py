"""Problems: pure in their seed, split by content, worked rightly, not guessable, judged without trust."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbos.common.errors import UserError
from turbos.common.records import Problem
from turbos.data import worked
from turbos.data.problems import (
    FIRST_HELD_OUT_SEED,
    WORDS,
    check,
    families,
    held_out,
    levels,
    make_problem,
    problem_sample,
)
from turbos.text.tokenizer import Tokenizer

ALL = [(family, level) for family in families() for level in range(levels(family))]
EQUATION = re.compile(r"(?<![\d:])(-?\d+(?:[-+*]\d+)+)=(-?\d+)")


def recomputed(problem: Problem) -> str:
    """The answer from the question alone, by another way than the generators'."""
    question = problem.question
    numbers = [int(number) for number in re.findall(r"\d+", question)]
    match problem.family:
        case "chain_sum" | "products":
            return str(eval(question.removesuffix(" = ?")))
        case "gcd":
            return str(math.gcd(*numbers))
        case "lcm":
            return str(math.lcm(*numbers))
        case "count_bits":
            return str(numbers[0].bit_count())
        case "base_conversion":
            return f"{numbers[0]:b}"
        case "spell_backward":
            return question.removeprefix("spell backward: ")[::-1]
        case "character_count":
            return str(question.partition(": ")[2].count(question[6]))
        case "addition":
            return str(sum(numbers))
        case "subtraction":
            return str(numbers[1] - numbers[0])
        case "digit_root":
            root = numbers[0]
            while root > 9:
                root = sum(map(int, str(root)))
            return str(root)
        case "time_arithmetic":
            minutes = numbers[0] * 60 + numbers[1] + numbers[2] * 60 + numbers[3]
            return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"
        case "sorting":
            return ",".join(map(str, sorted(numbers)))
    raise AssertionError(problem.family)


@pytest.mark.parametrize(("family", "level"), ALL)
def test_problems_are_right_split_and_not_guessable(family: str, level: int) -> None:
    train = [make_problem(family, seed, level) for seed in range(300)]
    tests = [make_problem(family, FIRST_HELD_OUT_SEED + seed, level) for seed in range(2000 if level == 0 else 500)]
    assert train[:20] == [make_problem(family, seed, level) for seed in range(20)]
    for problem in train + tests[:300]:
        assert problem.answer == recomputed(problem)
        assert check(problem, problem.answer).status == "pass"
        assert problem.thinking and problem.thinking.isascii() and "skip" not in problem.thinking
        for left, right in EQUATION.findall(problem.thinking):
            assert eval(re.sub(r"\b0+(?=\d)", "", left)) == int(right), problem
    assert not any(map(held_out, train)) and all(map(held_out, tests))
    words = {tuple(sorted(WORDS.findall(problem.question))) for problem in train}
    assert not words & {tuple(sorted(WORDS.findall(problem.question))) for problem in tests}
    (_, most), *_ = Counter(problem.answer for problem in tests).most_common(1)
    assert most / len(tests) <= 0.2, "the most common answer is a good guess"


@pytest.mark.parametrize(("family", "level"), ALL)
def test_thinking_ends_in_the_answer(family: str, level: int) -> None:
    for seed in range(100):
        problem = make_problem(family, seed, level)
        thinking = problem.thinking or ""
        if family == "addition":
            # engram's columns: the last digits of the sums, and the carry, spell the answer backwards.
            columns = [right[-1] for _, right in EQUATION.findall(thinking)]
            carry = "1" if thinking.endswith("carry=1") else ""
            assert carry + "".join(reversed(columns)) == problem.answer
        elif family == "subtraction":
            columns = re.findall(r"=(\d)(?= |$)", thinking)
            assert int("".join(reversed(columns))) == int(problem.answer)
        elif family == "time_arithmetic":
            hours, minutes = re.findall(r"= (\d+)$", thinking), re.findall(r"= (\d+)(?= \(| hours)", thinking)
            assert f"{int(hours[0]):02d}:{int(minutes[0]) % 60:02d}" == problem.answer
        else:
            assert re.search(rf"(^|[ =:]|[a-e]){re.escape(problem.answer)}$", thinking), problem


@given(st.lists(st.integers(0, 999), min_size=2, max_size=4), st.data())
def test_chain_sums_hold(terms: list[int], data: st.DataObject) -> None:
    signed = [terms[0], *(term if data.draw(st.booleans()) else -term for term in terms[1:])]
    steps = worked.chain_sum(signed)
    assert steps.split()[-1] == str(sum(signed))
    assert all(eval(left) == int(right) for left, right in EQUATION.findall(steps))


@given(st.lists(st.integers(2, 999), min_size=2, max_size=3))
def test_products_hold(factors: list[int]) -> None:
    steps = worked.product(factors)
    assert re.split("[ =]", steps)[-1] == str(math.prod(factors))
    assert all(eval(left) == int(right) for left, right in EQUATION.findall(steps))


@given(st.integers(1, 300), st.integers(1, 300))
def test_divisors_multiples_and_bits_hold(a: int, b: int) -> None:
    assert worked.gcd((a, b)).split()[-1] == str(math.gcd(a, b))
    assert set(worked.lcm((a, b)).split(", ")[-1].split()) == {str(math.lcm(a, b))}
    assert worked.count_bits(a).rpartition(":")[2] == str(a.bit_count())
    assert worked.to_binary(a).rpartition(":")[2] == f"{a:b}"


HOSTILE = [
    "",
    " ",
    "\n\n",
    "\0",
    "9" * 1_000_000,
    "1e999999999",
    "NaN",
    "sNaN",
    "٣",
    "１２",
    "1_2",
    "[" * 100_000,
    "\u2028",
]


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_fail(family: str, text: str) -> None:
    problem = make_problem(family, 5)
    assert check(problem, text).status == "fail"
    assert check(problem, f"{problem.answer}\n{text}x").status == "fail", "only the last line counts"


@settings(max_examples=300)
@given(st.sampled_from(families()), st.text(max_size=30))
def test_check_never_raises(family: str, text: str) -> None:
    problem = make_problem(family, 7)
    verdict = check(problem, text)
    assert verdict.status in ("pass", "fail") and verdict.score == float(verdict.status == "pass")
    assert check(problem, f"some {text}\n\n  {problem.answer} \n").status == "pass"


def test_what_cannot_be_judged_is_an_abstention() -> None:
    strange = Problem("riddle", 0, 0, "?", "!", None)
    assert check(strange, "!").status == "abstain" and check(strange, "!").score is None
    broken = Problem("gcd", 0, 0, "gcd of 2 and 4?", "2", None, metadata="{")
    assert check(broken, "2").status == "abstain"


def test_user_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'gcd'"):
        make_problem("gdc", 0)
    with pytest.raises(UserError, match="levels 0 to 2"):
        make_problem("gcd", 0, 3)
    with pytest.raises(UserError, match="start at 0"):
        make_problem("gcd", -1)


def test_samples_carry_loss_on_the_assistant_only() -> None:
    tokenizer = Tokenizer.train(["gcd of 12 and 8? 12-8=4"] * 9, vocab_size=320)
    problem = make_problem("gcd", 3)
    think, short = (problem_sample(tokenizer, problem, mode) for mode in ("think", "short"))
    assert tokenizer.decode(think.ids) == (
        f"<|user|>{problem.question}<|end|><|assistant|><think>{problem.thinking}</think>{problem.answer}<|end|>"
    )
    assert tokenizer.decode(short.ids).endswith(f"<|assistant|><think></think>{problem.answer}<|end|>")
    # `<think>`, the digits and `<|end|>`; `</think>` is given by the prompt.
    assert sum(short.loss_weights) == 2 + len(problem.answer)
    assert short.loss_weights[short.ids.index(tokenizer.special("</think>"))] == 0.0


def test_reasoning_gym_loads_where_pycosat_could_not_be_built() -> None:
    """In a fresh process that cannot import pycosat, problems are made as ever."""
    script = (
        "import sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'pycosat' else find(name, *rest)\n"
        "from turbos.data.problems import make_problem\n"
        "print(make_problem('gcd', 1, 0).question, hasattr(sys.modules['pycosat'], 'itersolve'))"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.split() == [*make_problem("gcd", 1, 0).question.split(), "False"]
