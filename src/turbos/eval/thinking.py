"""How often and how much a model thinks when that is left to it (`auto`), over the difficulty of held-out problems.

The rate is the chance that an answer opens its thinking and writes something there, at temperature 1. It is read off
the model before an answer begins, not counted, so a few problems give a steady figure; an empty pair of tags is no
thinking. Length and accuracy are of greedy answers to the same problems.

    rates = thinking_rates(model, tokenizer, ["gcd", "addition"])
    save_rates(rates, run_dir / THINKING_FILE)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from turbos.common.errors import UserError
from turbos.common.records import Problem, Sample
from turbos.data.packing import batch_of, pack_samples
from turbos.data.problems import FIRST_HELD_OUT_SEED, levels, make_problem
from turbos.eval.problems import answer_problems, family_score, problem_prompt
from turbos.model.lm import LanguageModel
from turbos.ops.loss import token_logprobs
from turbos.text.tokenizer import Tokenizer

THINKING_FILE = "thinking.json"
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class ThinkingRate:
    """One family and level over `n` held-out problems: chance of thinking, mean tokens of thinking, share right.

    The share is NaN where no answer could be judged.
    """

    family: str
    level: int
    rate: float
    thinking_tokens: float
    accuracy: float
    n: int


def thinking_rates(
    model: LanguageModel,
    tokenizer: Tokenizer,
    families: Sequence[str],
    num_problems: int = 24,
    max_new_tokens: int = 128,
) -> list[ThinkingRate]:
    """The rate at every level of every family, also of levels that were not trained."""
    if num_problems < 1:
        raise UserError("eval: the thinking rate wants at least one problem")
    seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + num_problems)
    places = [(family, level) for family in dict.fromkeys(families) for level in range(levels(family))]
    problems = [make_problem(family, seed, level) for family, level in places for seed in seeds]
    chances = thinking_chances(model, tokenizer, problems)
    answers = answer_problems(model, tokenizer, problems, "auto", max_new_tokens)
    rates = []
    for start in range(0, len(problems), num_problems):
        score = family_score(answers[start : start + num_problems])
        rate = sum(chances[start : start + num_problems]) / num_problems
        rates.append(ThinkingRate(score.family, score.level, rate, score.thinking_tokens, score.accuracy, num_problems))
    return rates


@torch.no_grad()
def thinking_chances(model: LanguageModel, tokenizer: Tokenizer, problems: Sequence[Problem]) -> list[float]:
    """For each problem the chance of `<think>` times that of anything but `</think>` after it."""
    tags = (tokenizer.special("<think>"), tokenizer.special("</think>"))
    samples = []
    for problem in problems:
        prompt = tuple(problem_prompt(tokenizer, problem, "auto"))
        samples.append(Sample(ids=prompt + tags, loss_weights=(0.0,) * len(prompt) + (1.0, 1.0)))
    chances = [0.0] * len(samples)
    for indices in pack_samples(samples, TOKENS_AT_ONCE):
        batch = batch_of([samples[index] for index in indices])
        rows_R = torch.nonzero(batch.loss_weights_T)[:, 0]
        hidden_RD = model(batch.tokens_T, batch.documents).hidden_TD[rows_R]
        logprobs_R, _ = token_logprobs(hidden_RD, model.head_weight, batch.targets_T[rows_R], model.logit_scale)
        opens_N, closes_N = logprobs_R.exp().view(-1, 2).unbind(1)
        for index, chance in zip(indices, (opens_N * (1 - closes_N)).tolist(), strict=True):
            chances[index] = chance
    return chances


def save_rates(rates: Sequence[ThinkingRate], path: Path) -> None:
    """Write rates as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"rates": [asdict(rate) for rate in rates]}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load_rates(path: Path) -> list[ThinkingRate]:
    """Rates that `save_rates` wrote; UserError where there are none."""
    try:
        return [ThinkingRate(**record) for record in json.loads(path.read_text(encoding="utf-8"))["rates"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read thinking rates from {path} ({error!r}); delete it and evaluate again") from error
