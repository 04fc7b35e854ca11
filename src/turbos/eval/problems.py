"""Greedy accuracy on held-out problems, thinking off and on, and the one grader that evaluation and rewards share.

An answer counts by its final content alone: what stands in the thinking, or after the end token, earns nothing. This
file samples nothing at random and shows nothing (`report.py` does).

    scores = evaluate(model, tokenizer, [("gcd", 0), ("addition", 1)], num_problems=64)
    save_scores(scores, run_dir / EVAL_FILE)

>>> parse_family("gcd/1"), parse_family("lcm")
(('gcd', 1), ('lcm', 0))
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from turbos.common.errors import UserError
from turbos.common.records import Completion, Problem, Verdict
from turbos.data.problems import FIRST_HELD_OUT_SEED, check, levels, make_problem
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.model.lm import LanguageModel
from turbos.text.chat import Message, parse, prompt_ids
from turbos.text.tokenizer import END, END_OF_TEXT, Tokenizer

Mode = Literal["off", "on", "auto"]
"""Whether the prompt closes the thinking at once, opens it, or leaves it to the model."""

EVAL_FILE = "eval.json"


@dataclass(frozen=True)
class Answer:
    """A completion of a problem, read and judged; token counts leave out the tags and the end token."""

    problem: Problem
    mode: Mode
    completion: Completion
    message: Message
    verdict: Verdict
    thinking_tokens: int
    answer_tokens: int

    @property
    def finished(self) -> bool:
        """Whether the model ended its turn itself."""
        return self.completion.finish == "stop"


@dataclass(frozen=True)
class FamilyScore:
    """Accuracy of one family, level and mode over `n` problems, with its standard error; token counts are means.

    `finished` is the share of answers that the model ended itself. A problem that could not be judged (`abstained`)
    counts neither way.
    """

    family: str
    level: int
    mode: Mode
    accuracy: float
    stderr: float
    thinking_tokens: float
    answer_tokens: float
    n: int
    finished: float
    abstained: int = 0


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    families: Sequence[tuple[str, int]],
    num_problems: int = 128,
    modes: Sequence[Mode] = ("off", "on"),
    max_new_tokens: int = 192,
    seed_start: int = FIRST_HELD_OUT_SEED,
    max_batch: int = 128,
    max_answer_tokens: int = 32,
) -> list[FamilyScore]:
    """Score every (family, level) in every mode on the held-out problems `seed_start ..`, greedily.

    `max_new_tokens` bounds a turn with thinking, `max_answer_tokens` one without ("off"). UserError for a seed below
    1,000,000: those are for training.
    """
    if seed_start < FIRST_HELD_OUT_SEED:
        raise UserError(f"eval: seed_start {seed_start} is for training; held-out seeds start at {FIRST_HELD_OUT_SEED}")
    if num_problems < 1 or not families:
        raise UserError("eval: at least one family and one problem of it are needed")
    seeds = range(seed_start, seed_start + num_problems)
    problems = [make_problem(family, seed, level) for family, level in families for seed in seeds]
    scores = []
    for mode in modes:
        limit = max_answer_tokens if mode == "off" else max_new_tokens
        answers = answer_problems(model, tokenizer, problems, mode, limit, max_batch)
        parts = [answers[start : start + num_problems] for start in range(0, len(answers), num_problems)]
        scores += [family_score(part) for part in parts]
    return scores


def answer_problems(
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    mode: Mode,
    max_new_tokens: int,
    max_batch: int = 128,
) -> list[Answer]:
    """The model's greedy answers to problems, in their order, judged."""
    prompts = [problem_prompt(tokenizer, problem, mode) for problem in problems]
    engine = problem_engine(model, max_batch)
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_ids=stop_ids(tokenizer), cache=False)
    completions = require_answers(engine.generate(prompts, params))
    pairs = zip(problems, completions, strict=True)
    return [grade(tokenizer, problem, mode, completion) for problem, completion in pairs]


def problem_engine(model: LanguageModel, max_batch: int) -> Engine:
    """An engine that answers with a copy of a model's weights, as they are: nothing is rounded."""
    return Engine.of_copy(model, config=EngineConfig(precision="own", max_running=max_batch))


def require_answers(completions: list[Completion]) -> list[Completion]:
    """The completions; ValueError where one broke off, since weights that give no numbers are no wrong answer."""
    for number, completion in enumerate(completions):
        if completion.finish == "error":
            raise ValueError(f"answer {number} broke off after {len(completion.ids)} tokens: {completion.reason}")
    return completions


def problem_prompt(tokenizer: Tokenizer, problem: Problem, mode: Mode) -> list[int]:
    """The question as a user's turn, up to where the assistant goes on."""
    return prompt_ids(tokenizer, [Message("user", problem.question)], mode)


def stop_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end a turn."""
    return frozenset({tokenizer.special(END), tokenizer.special(END_OF_TEXT)})


def grade(tokenizer: Tokenizer, problem: Problem, mode: Mode, completion: Completion) -> Answer:
    """Read a completion as the assistant's turn (what the prompt opened included) and judge its content.

    A turn that the model did not end has no final answer: it fails however it reads so far.
    """
    message = parse(tokenizer, assistant_turn(tokenizer, completion))
    thinking, answer = token_counts(tokenizer, message.ids or ())
    if completion.finish == "stop":
        verdict = check(problem, message.content)
    else:
        verdict = Verdict("fail", 0.0, "the turn was not ended")
    return Answer(problem, mode, completion, message, verdict, thinking, answer)


def assistant_turn(tokenizer: Tokenizer, completion: Completion) -> tuple[int, ...]:
    """All tokens after the last `<|assistant|>` of the prompt: tags that the prompt opened, then the completion."""
    prompt = completion.prompt_ids
    start = len(prompt) - prompt[::-1].index(tokenizer.special("<|assistant|>"))
    return (*prompt[start:], *completion.ids)


def token_counts(tokenizer: Tokenizer, turn_ids: tuple[int, ...]) -> tuple[int, int]:
    """Tokens of thinking and of the answer in a turn without its end token; the tags themselves are not counted."""
    opening, closing = tokenizer.special("<think>"), tokenizer.special("</think>")
    opened = turn_ids[:1] == (opening,)
    inner = turn_ids[1:] if opened else turn_ids
    if closing in inner:
        cut = inner.index(closing)
        return cut, len(inner) - cut - 1
    return (len(inner), 0) if opened else (0, len(inner))


def family_score(answers: Sequence[Answer]) -> FamilyScore:
    """Sum up answers to problems of one family and level in one mode."""
    first = answers[0]
    judged = [answer for answer in answers if answer.verdict.status != "abstain"]
    right = sum(answer.verdict.status == "pass" for answer in judged)
    return FamilyScore(
        family=first.problem.family,
        level=first.problem.level,
        mode=first.mode,
        accuracy=right / len(judged) if judged else math.nan,
        stderr=wilson_stderr(right, len(judged)),
        thinking_tokens=sum(answer.thinking_tokens for answer in answers) / len(answers),
        answer_tokens=sum(answer.answer_tokens for answer in answers) / len(answers),
        n=len(judged),
        finished=sum(answer.finished for answer in answers) / len(answers),
        abstained=len(answers) - len(judged),
    )


def wilson_stderr(right: int, n: int) -> float:
    """Half the width of Wilson's interval at z = 1: like the binomial standard error, but not 0 at 0 % and 100 %.

    Source: E. B. Wilson, JASA 22 (1927). NaN for n = 0.
    """
    if n == 0:
        return math.nan
    share = right / n
    return math.sqrt(share * (1 - share) / n + 1 / (4 * n * n)) / (1 + 1 / n)


def parse_family(text: str) -> tuple[str, int]:
    """`"gcd/1"` -> `("gcd", 1)`; without a level it is 0. UserError for an unknown family or level."""
    name, slash, level = text.partition("/")
    if slash and not level.isdecimal():
        raise UserError(f"family {text!r}: write NAME or NAME/LEVEL, such as {name}/1")
    number = int(level) if slash else 0
    if number >= levels(name):
        raise UserError(f"family {text!r}: {name} has levels 0 to {levels(name) - 1}")
    return name, number


def save_scores(scores: Sequence[FamilyScore], path: Path) -> None:
    """Write scores as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    text = json.dumps({"scores": [asdict(score) for score in scores]}, indent=1)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_scores(path: Path) -> list[FamilyScore]:
    """Scores that `save_scores` wrote; UserError where there are none."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["scores"]
        return [FamilyScore(**record) for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read scores from {path} ({error!r}); delete it and evaluate again") from error
