"""Rollout: which problems a step asks, groups of sampled answers to each, their verdicts, and samples to learn from.

Everything is a pure function of the weights and a key (recipe seed and step): problems, modes and sampling noise. How
rewards become advantages, and the update, are elsewhere.

    tasks = draw_tasks(mix, count=16, key="seed 0 step 12")
    groups = sample_groups(model, tokenizer, tasks, RolloutConfig(), key="seed 0 step 12")
    samples = training_samples(groups[0], advantages_N)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.common.records import Completion, Problem, Sample
from turbos.data.problems import FIRST_HELD_OUT_SEED, families, levels, make_problem
from turbos.engine.sampling_params import SamplingParams
from turbos.eval.problems import Answer, Mode, grade, problem_engine, problem_prompt, require_answers, stop_ids
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.problems import ProblemMix


@dataclass(frozen=True)
class RolloutConfig:
    """How many prompts a step asks (`groups`), how often each (`samples`), and bounds on what is written.

    `max_new_tokens` bounds a turn with thinking, `max_answer_tokens` one without.
    """

    groups: int = 16
    samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int = 192
    max_answer_tokens: int = 32
    max_batch: int = 128

    def __post_init__(self) -> None:
        if self.groups < 1 or self.samples < 2:
            raise UserError(
                "rollout: groups must be at least 1, and samples at least 2 (a group is compared with itself)"
            )
        if not 0 < self.temperature < math.inf:
            raise UserError("rollout: temperature must be above 0 (greedy samples are all the same) and finite")
        if min(self.max_new_tokens, self.max_answer_tokens, self.max_batch) < 1:
            raise UserError("rollout: max_new_tokens, max_answer_tokens and max_batch must be at least 1")

    def token_limit(self, mode: Mode) -> int:
        """Most new tokens of a turn in this mode."""
        return self.max_answer_tokens if mode == "off" else self.max_new_tokens


@dataclass(frozen=True)
class Task:
    """A problem to ask, with thinking on or off."""

    problem: Problem
    mode: Mode


@dataclass(frozen=True)
class Group:
    """Sampled answers to one task."""

    task: Task
    answers: tuple[Answer, ...]

    @property
    def rewards(self) -> list[float]:
        """1 for a right answer, 0 for a wrong one, NaN where the checker abstained."""
        return [math.nan if answer.verdict.score is None else answer.verdict.score for answer in self.answers]


def draw_tasks(mix: ProblemMix, count: int, key: str) -> list[Task]:
    """Problems from training seeds by the weights of `mix`; its `thinking_share` of them (drawn) have thinking on."""
    random = Random(f"tasks {key}")
    chosen = mix.families or dict.fromkeys(families(), 1.0)
    names = random.choices(list(chosen), list(chosen.values()), k=count)
    return [_draw_task(name, random, mix.thinking_share) for name in names]


def _draw_task(name: str, random: Random, thinking_share: float) -> Task:
    family, _, level = name.partition("/")
    number = int(level) if level else random.randrange(levels(family))
    problem = make_problem(family, random.randrange(FIRST_HELD_OUT_SEED), number)
    return Task(problem, "on" if random.random() < thinking_share else "off")


def sample_groups(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[Task], config: RolloutConfig, key: str
) -> list[Group]:
    """`config.samples` answers to each task, in the order of the tasks, judged."""
    prompts, params = [], []
    for place, task in enumerate(tasks):
        prompts += [problem_prompt(tokenizer, task.problem, task.mode)] * config.samples
        params += [_params(tokenizer, task, config, sampling_seed(key, place, n)) for n in range(config.samples)]
    # The engine reads a group's prompt once and lets its answers begin with copies of that state.
    completions = require_answers(problem_engine(model, config.max_batch).generate(prompts, params))
    groups = []
    for place, task in enumerate(tasks):
        siblings = completions[place * config.samples : (place + 1) * config.samples]
        answers = (grade(tokenizer, task.problem, task.mode, completion) for completion in siblings)
        groups.append(Group(task, tuple(answers)))
    return groups


def _params(tokenizer: Tokenizer, task: Task, config: RolloutConfig, seed: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=config.token_limit(task.mode),
        temperature=config.temperature,
        seed=seed,
        stop_ids=stop_ids(tokenizer),
        cache=False,
    )


def sampling_seed(key: str, prompt: int, sample: int) -> int:
    """63 bits of noise seed for one sample of one prompt of one step."""
    digest = hashlib.blake2b(f"{key} prompt {prompt} sample {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def rewards_of(groups: Sequence[Group]) -> Tensor:
    """Rewards, fp64 `[G, N]`; NaN where the checker abstained, which drops the group."""
    return torch.tensor([group.rewards for group in groups], dtype=torch.float64)


def training_samples(group: Group, advantages_N: Tensor) -> list[Sample]:
    """A sample of each answer: loss on what was sampled, the sampler's log-probabilities, the answer's advantage."""
    pairs = zip(group.answers, advantages_N.tolist(), strict=True)
    return [_training_sample(answer.completion, advantage) for answer, advantage in pairs]


def _training_sample(completion: Completion, advantage: float) -> Sample:
    given = (0.0,) * len(completion.prompt_ids)
    return Sample(
        ids=completion.prompt_ids + completion.ids,
        loss_weights=(*given, *(1.0,) * len(completion.ids)),
        logprobs=(*given, *completion.logprobs),
        advantage=advantage,
    )
