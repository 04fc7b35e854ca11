"""What a step of reinforcement did, in numbers for the log. Reads finished groups and updates, changes nothing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from turbos.eval.problems import Answer
from turbos.rl.rollout import Group
from turbos.train.trainer import BatchStats

AT_SAMPLING = ("mismatch", "mismatch_k3")
"""Figures that mean something only while the weights are those that sampled: the first update's."""


@dataclass(frozen=True)
class Update:
    """One optimizer step on part of a rollout."""

    stats: BatchStats
    lr: float
    grad_norm: float
    largest_mismatch: float


def rollout_figures(groups: Sequence[Group], kept: int, seconds: float) -> dict[str, float]:
    """Rewards (all; by mode; by family, level and mode), how groups fared, lengths in tokens, sampling speed.

    `pass_rate` is the share of groups with at least one right answer.
    """
    answers = [answer for group in groups for answer in group.answers]
    written = sum(len(answer.completion.ids) for answer in answers)
    by_name: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        problem = answer.problem
        by_name[f"reward/{answer.mode}"].append(answer)
        by_name[f"reward/{problem.family}/{problem.level}/{answer.mode}"].append(answer)
    return {
        "reward": _reward(answers),
        **{name: _reward(members) for name, members in sorted(by_name.items())},
        "pass_rate": mean(any(reward > 0 for reward in group.rewards) for group in groups),
        "groups_dropped": len(groups) - kept,
        "abstained": sum(answer.verdict.status == "abstain" for answer in answers),
        "completion_tokens": written / len(answers),
        "thinking_tokens": mean(answer.thinking_tokens for answer in answers if answer.mode == "on"),
        "finished": mean(answer.finished for answer in answers),
        "rollout_seconds": seconds,
        "rollout_tokens_per_second": written / seconds,
    }


def update_figures(updates: Sequence[Update], seconds: float) -> dict[str, float]:
    """Loss, entropy, clipping, mismatch of trainer and sampler (mean, largest, k3), gradient and speed.

    Means are over the loss weight of all updates; without any update, counts are 0 and the others NaN.
    """
    weights = [update.stats.loss_weight for update in updates]
    tokens = sum(update.stats.tokens for update in updates)
    names = ("entropy", "clip_fraction", "kl_reference")
    first = updates[0] if updates else None
    return {
        "loss": weighted((update.stats.loss for update in updates), weights),
        **{name: weighted((update.stats.means[name] for update in updates), weights) for name in names},
        **{name: first.stats.means[name] if first else math.nan for name in AT_SAMPLING},
        "mismatch_max": first.largest_mismatch if first else math.nan,
        "grad_norm": mean(update.grad_norm for update in updates),
        "lr": mean(update.lr for update in updates),
        "load_max_over_mean": mean(update.stats.load_max_over_mean for update in updates),
        "tokens": tokens,
        "loss_weight": sum(weights),
        "update_seconds": seconds,
        "update_tokens_per_second": tokens / seconds,
    }


def _reward(answers: Iterable[Answer]) -> float:
    return mean(answer.verdict.score for answer in answers if answer.verdict.score is not None)


def mean(values: Iterable[float]) -> float:
    """Mean of numbers, NaN where there are none."""
    listed = list(values)
    return sum(listed) / len(listed) if listed else math.nan


def weighted(values: Iterable[float], weights: Sequence[float]) -> float:
    """Mean of numbers by weights, NaN where there are none."""
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / total if total else math.nan
