"""Problems whose answers a program checks: made from a seed, split by the question, scored without trust.

Seeds below 1,000,000 are for training, the rest is held out, and the split is by *content*: a question whose words,
in any order, hash into the held-out tenth is never made from a training seed. So no held-out question, nor the same
numbers in another order, can have been seen in training. This file draws and checks; it does not decide what a model
is trained on.

>>> problem = make_problem("gcd", seed=1_000_000, level=0)
>>> check(problem, f"thinking aloud\\n {problem.answer} ").status, held_out(problem)
('pass', True)
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import Literal

from turbos.common.errors import UserError
from turbos.common.records import Problem, Sample, Verdict
from turbos.data.families import FAMILIES, Family
from turbos.text.chat import Message, prompt_ids, render
from turbos.text.tokenizer import Tokenizer

FIRST_HELD_OUT_SEED = 1_000_000
HELD_OUT_PART = 10
"""One question in so many is held out."""

ATTEMPTS = 4096
"""Draws one seed may take; draws of two seeds never overlap."""

LONGEST_ANSWER = 200
"""Characters of an answer that is looked at; no right answer comes near."""

WORDS = re.compile(r"\w+|[^\w\s]")


def families() -> tuple[str, ...]:
    """Names of all families."""
    return tuple(FAMILIES)


def levels(family: str) -> int:
    """How many levels a family has; levels count from 0. Raises UserError for an unknown family."""
    return _family(family).levels


def _family(name: str) -> Family:
    if name in FAMILIES:
        return FAMILIES[name]
    near = difflib.get_close_matches(name, FAMILIES, n=1) or list(FAMILIES)
    raise UserError(f"unknown problem family {name!r}: did you mean {near[0]!r}? All: {', '.join(FAMILIES)}")


def _held_out_text(question: str) -> bool:
    """Whether a question belongs to the held-out part: decided by its words and numbers, in no order."""
    words = " ".join(sorted(WORDS.findall(question)))
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") % HELD_OUT_PART == 0


def held_out(problem: Problem) -> bool:
    """Whether a problem's question belongs to the held-out part; pure in the question's text."""
    return _held_out_text(problem.question)


def make_problem(family: str, seed: int, level: int = 0) -> Problem:
    """The problem of a seed: pure in (family, seed, level), held out exactly for seeds >= 1,000,000.

    Draws are tried in turn until one is wanted by its family and falls on the seed's side of the split.
    Raises UserError for an unknown family, level or a negative seed.
    """
    room = _family(family)
    if not 0 <= level < room.levels:
        raise UserError(f"problem family {family!r} has levels 0 to {room.levels - 1}, not {level}")
    if seed < 0:
        raise UserError(f"problem seeds start at 0, got {seed}")
    wanted = seed >= FIRST_HELD_OUT_SEED
    for index in range(seed * ATTEMPTS, (seed + 1) * ATTEMPTS):
        draft = room.draw(level, index)
        if draft is not None and _held_out_text(draft.question) == wanted:
            return Problem(family, seed, level, draft.question, draft.answer, draft.thinking(), draft.metadata)
    raise RuntimeError(f"family {family} level {level} gave no wanted draw in {ATTEMPTS} attempts of seed {seed}")


def final_answer(text: str) -> str:
    """What counts as the answer: the last line that is not blank, without blanks around it."""
    return text.strip().rpartition("\n")[2].strip()


def check(problem: Problem, text: str) -> Verdict:
    """Judge the last line of a text against a problem with the family's own checker.

    Never raises on any text; a problem that no family can judge is an abstention.
    """
    if problem.family not in FAMILIES:
        return Verdict("abstain", None, f"no checker for family {problem.family!r}")
    answer = final_answer(text)
    if not answer:
        return Verdict("fail", 0.0, "no answer")
    if len(answer) > LONGEST_ANSWER:
        return Verdict("fail", 0.0, f"answer longer than {LONGEST_ANSWER} characters")
    try:
        metadata = json.loads(problem.metadata)
        right = FAMILIES[problem.family].score(answer, metadata, problem.answer)
    except (ValueError, KeyError, TypeError) as error:
        return Verdict("abstain", None, f"problem {problem.family}/{problem.seed} cannot be judged: {error}")
    return Verdict("pass", 1.0) if right else Verdict("fail", 0.0, "wrong answer")


def problem_sample(tokenizer: Tokenizer, problem: Problem, mode: Literal["think", "short"]) -> Sample:
    """A training sample of a problem: worked steps and answer ("think"), or empty thinking and answer ("short").

    The loss lies on the assistant's turn, except on the `</think>` of a short sample: its prompt gives that
    (`chat.prompt_ids`, thinking off), and a model whose thinking is opened for it must not learn to close it at once.
    Raises UserError for "think" where the problem has no steps.
    """
    if mode == "think" and problem.thinking is None:
        raise UserError(f"problem family {problem.family!r} has no worked steps: use mode 'short'")
    question = Message("user", problem.question)
    thinking = problem.thinking if mode == "think" else ""
    rendered = render(tokenizer, [question, Message("assistant", problem.answer, thinking=thinking)])
    weights = list(rendered.loss_weights)
    if mode == "short":
        weights[len(prompt_ids(tokenizer, [question], "off")) - 1] = 0.0
    return Sample(rendered.ids, tuple(weights))
