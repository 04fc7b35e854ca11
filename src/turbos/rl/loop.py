"""Reinforcement learning with checked answers (GRPO): rollout -> verdicts -> advantages -> update, on one page.

Everything of a step is a function of (recipe, step, weights), so a run resumes exactly. Reward is correctness alone.
Not here: sampling (`rollout`), the mathematics (`advantages`, `losses`), the optimizer (`train.trainer`).

    recipe = RLRecipe(init="runs/sft/final", train=RLConfig(steps=40), problems=ProblemMix({"gcd/0": 1.0}))
    final = rl(recipe, Path("runs/rl"))
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.common.machine import set_threads
from turbos.common.metrics import METRICS_FILE, MetricsLog, truncate_after
from turbos.common.records import Batch, Sample
from turbos.data.packing import batch_of, pack_samples
from turbos.model.checkpoint import load_model
from turbos.model.describe import describe
from turbos.model.hub import resolve_checkpoint
from turbos.model.lm import LanguageModel
from turbos.model.package import check_vocabulary
from turbos.rl.advantages import group_advantages
from turbos.rl.losses import LossConfig
from turbos.rl.objective import Objective
from turbos.rl.rollout import RolloutConfig, draw_tasks, rewards_of, sample_groups, training_samples
from turbos.rl.statistics import Update, rollout_figures, update_figures
from turbos.text.tokenizer import Tokenizer
from turbos.train.checkpoint import TrainingState, restore_optimizer, save_checkpoint, save_final
from turbos.train.loop import final_checkpoint, open_run, require_seed_and_threads, stop_requests
from turbos.train.optim import OptimConfig
from turbos.train.problems import ProblemMix
from turbos.train.progress import ProgressLine
from turbos.train.trainer import Trainer


@dataclass(frozen=True)
class RLConfig:
    """How long to train. A step is one rollout, whose groups are spread over `updates` optimizer steps.

    `threads` None leaves torch's choice; `keep` counts kept checkpoints; `report_every` prints a summary line.
    """

    steps: int
    updates: int = 1
    micro_batch_tokens: int = 4096
    save_every: int = 10
    report_every: int = 10
    keep: int = 2
    seed: int = 0
    threads: int | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        counts = (self.steps, self.updates, self.micro_batch_tokens, self.save_every, self.report_every, self.keep)
        if min(counts) < 1:
            raise UserError(
                "train: steps, updates, micro_batch_tokens, save_every, report_every, keep must be at least 1"
            )
        require_seed_and_threads(self.seed, self.threads)


@dataclass(frozen=True)
class RLRecipe:
    """A run: `init` is a checkpoint (directory or hub id); `pass_mark` None is plain GRPO (see `advantages`).

    `problems.thinking_share` of the prompts have thinking on.
    """

    init: str
    train: RLConfig
    problems: ProblemMix = ProblemMix()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    pass_mark: float | None = None
    optim: OptimConfig = OptimConfig(lr=2e-4, weight_decay=0.0, decay_fraction=0.0)

    def __post_init__(self) -> None:
        if self.pass_mark is not None and not math.isfinite(self.pass_mark):
            raise UserError(f"pass_mark must be a finite number or null, not {self.pass_mark}")


def rl(recipe: RLRecipe, run_dir: Path) -> Path:
    """Reinforce as the recipe says in `run_dir`, resuming where it stopped; returns the final checkpoint's path."""
    set_threads(recipe.train.threads)
    resumed = open_run(recipe, run_dir)
    final = final_checkpoint(run_dir)
    if final is not None:
        return final
    start = resumed or resolve_checkpoint(recipe.init)
    model, tokenizer = load_model(start), Tokenizer.load(start)
    check_vocabulary(start, tokenizer)
    reference = None
    if recipe.loss.kl_coefficient > 0:
        reference = load_model(resolve_checkpoint(recipe.init)).requires_grad_(False)
    learner = Learner(recipe, model, tokenizer, reference)
    return reinforce(learner, run_dir, resumed)


def reinforce(learner: Learner, run_dir: Path, resumed: Path | None) -> Path:
    """The loop: step after step from the checkpoint `resumed` (None: from the start), logging and saving.

    On Ctrl-C or SIGTERM the running step is finished and saved, then KeyboardInterrupt goes on.
    """
    config, model, trainer = learner.recipe.train, learner.model, learner.trainer
    state = TrainingState(0) if resumed is None else restore_optimizer(resumed, model, trainer.optimizer)
    truncate_after(run_dir / METRICS_FILE, state.step)
    with (
        closing(MetricsLog(run_dir / METRICS_FILE, config.tensorboard)) as log,
        ProgressLine("rl", config.steps, state.step, describe(model.config).active_params) as line,
        stop_requests() as stop,
    ):
        while state.step < config.steps:
            started = time.perf_counter()
            figures = learner.step(state.step)
            seconds = time.perf_counter() - started
            tokens = int(figures["tokens"])
            state = TrainingState(state.step + 1, state.tokens + tokens)
            log.log(state.step, {**figures, "seconds": seconds})
            line.update(state.step, figures["loss"], tokens, seconds)
            if state.step % config.report_every == 0 or state.step == config.steps:
                line.note(_summary(state.step, figures))
            if state.step % config.save_every == 0 or state.step == config.steps or stop.is_set():
                save_checkpoint(run_dir, state, model, learner.tokenizer, trainer.optimizer, config.keep)
            if stop.is_set() and state.step < config.steps:
                line.note(f"stopped and saved at step {state.step}; run the same command again to resume")
                raise KeyboardInterrupt
    final = save_final(run_dir, model, learner.tokenizer)
    if stop.is_set():
        # Asked for in the last step: this run is whole, but whoever runs stages in a row must stop too.
        raise KeyboardInterrupt
    return final


class Learner:
    """A model under reinforcement; `step(n)` does step n (from 0) and gives its figures."""

    def __init__(
        self, recipe: RLRecipe, model: LanguageModel, tokenizer: Tokenizer, reference: LanguageModel | None = None
    ) -> None:
        self.recipe, self.model, self.tokenizer, self.reference = recipe, model, tokenizer, reference
        self.trainer = Trainer(model, recipe.optim, recipe.train.steps * recipe.train.updates)

    def step(self, step: int) -> dict[str, float]:
        """Rollout, advantages, update. Groups with equal rewards are dropped; if all groups are, there is no update."""
        recipe, key = self.recipe, f"seed {self.recipe.train.seed} step {step}"
        started = time.perf_counter()
        tasks = draw_tasks(recipe.problems, recipe.rollout.groups, key)
        groups = sample_groups(self.model, self.tokenizer, tasks, recipe.rollout, key)
        sampled = time.perf_counter()
        result = group_advantages(rewards_of(groups), recipe.pass_mark)
        kept = [place for place, keep in enumerate(result.kept_G.tolist()) if keep]
        samples = [training_samples(groups[place], result.advantages_GN[place]) for place in kept]
        updates = [self._update(step, number, part) for number, part in enumerate(self._parts(samples))]
        return {
            **rollout_figures(groups, len(kept), sampled - started),
            **update_figures(updates, time.perf_counter() - sampled),
        }

    def _parts(self, samples: Sequence[list[Sample]]) -> list[list[Sample]]:
        """Whole groups dealt out to the optimizer steps; fewer steps where there are fewer groups."""
        count = self.recipe.train.updates
        dealt = [samples[number::count] for number in range(min(count, len(samples)))]
        return [[sample for group in part for sample in group] for part in dealt]

    def _update(self, step: int, number: int, samples: Sequence[Sample]) -> Update:
        objective = Objective(self.recipe.loss, self.recipe.rollout.temperature, self.reference)
        # The schedule depends on the step alone, not on how many updates dropped groups left out.
        self.trainer.step = step * self.recipe.train.updates + number
        lr = self.trainer.lr
        stats = self.trainer.forward_backward(self._batches(samples), objective)
        return Update(stats, lr, self.trainer.optim_step(), objective.largest_mismatch)

    def _batches(self, samples: Sequence[Sample]) -> list[Batch]:
        bins = pack_samples(samples, self.recipe.train.micro_batch_tokens)
        return [batch_of([samples[index] for index in indices]) for indices in bins]


def _summary(step: int, figures: dict[str, float]) -> str:
    modes = "".join(
        f", {mode} {figures[f'reward/{mode}']:.2f}" for mode in ("off", "on") if f"reward/{mode}" in figures
    )
    return (
        f"step {step}: reward {figures['reward']:.2f}{modes}, {figures['completion_tokens']:.0f} tokens an answer, "
        f"{figures['groups_dropped']:.0f} groups dropped, mismatch {figures['mismatch']:.1e}"
    )
