"""Supervised fine-tuning on worked problems, with and without thinking; the loss lies on what the assistant says.

Problems are made on the fly as a pure function of (seed, step), so a run resumes without any data state. Text corpora
belong to `train.pretrain`.

    recipe = SFTRecipe(init="runs/base/final", train=TrainConfig(steps=200))
    final = sft(recipe, Path("runs/sft"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from turbos.common.errors import UserError
from turbos.common.machine import set_threads
from turbos.common.records import Batch, Sample
from turbos.data.packing import batch_of, pack_samples
from turbos.data.prefetch import Prefetch
from turbos.model.checkpoint import load_model
from turbos.model.hub import resolve_checkpoint
from turbos.model.lm import LanguageModel
from turbos.model.package import check_vocabulary
from turbos.text.tokenizer import Tokenizer
from turbos.train.loop import Run, TrainConfig, final_checkpoint, open_run, train
from turbos.train.optim import OptimConfig
from turbos.train.problems import Mode, ProblemMix, held_out_samples, problem_stream
from turbos.train.trainer import Trainer, next_token_loss

MODES: tuple[Mode, ...] = ("think", "short")


@dataclass(frozen=True)
class SFTRecipe:
    """A fine-tuning run: `init` is a checkpoint (directory or hub id), `held_out` problems are scored per mode."""

    init: str
    train: TrainConfig
    problems: ProblemMix = ProblemMix()
    optim: OptimConfig = OptimConfig(lr=1e-3)
    held_out: int = 64

    def __post_init__(self) -> None:
        if self.held_out < 1:
            raise UserError("held_out must be at least 1")


def sft(recipe: SFTRecipe, run_dir: Path) -> Path:
    """Fine-tune as the recipe says in `run_dir`, resuming where it stopped; returns the final checkpoint's path."""
    set_threads(recipe.train.threads)
    resumed = open_run(recipe, run_dir)
    if (final := final_checkpoint(run_dir)) is not None:
        return final
    start = resumed or resolve_checkpoint(recipe.init)
    model, tokenizer = load_model(start), Tokenizer.load(start)
    check_vocabulary(start, tokenizer)

    def batches_of(step: int) -> Sequence[Batch]:
        return sft_batches(recipe, tokenizer, step)

    def evaluate() -> Mapping[str, float]:
        return held_out_losses(model, tokenizer, recipe)

    trainer = Trainer(model, recipe.optim, recipe.train.steps, recipe.train.seed)
    with Prefetch(batches_of, recipe.train.steps - 1) as batches:
        return train(Run("sft", run_dir, recipe.train, trainer, tokenizer, batches.at, evaluate), resumed)


def sft_batches(recipe: SFTRecipe, tokenizer: Tokenizer, step: int) -> list[Batch]:
    """Micro-batches of step `step`: at most `tokens_per_step` tokens of fresh samples, packed best-fit."""
    samples: list[Sample] = []
    room = recipe.train.tokens_per_step
    for sample in problem_stream(recipe.problems, tokenizer, f"seed {recipe.train.seed} step {step}"):
        room -= len(sample.ids)
        if room < 0 and samples:
            break
        samples.append(sample)
    bins = pack_samples(samples, recipe.train.micro_batch_tokens)
    return [batch_of([samples[index] for index in indices]) for indices in bins]


@torch.no_grad()
def held_out_losses(model: LanguageModel, tokenizer: Tokenizer, recipe: SFTRecipe) -> dict[str, float]:
    """Nats per token of the assistant on held-out problems, with worked steps and without."""
    losses = {}
    for mode in MODES:
        samples = held_out_samples(recipe.problems, tokenizer, mode, recipe.held_out)
        loss = weight = 0.0
        for indices in pack_samples(samples, recipe.train.micro_batch_tokens):
            batch = batch_of([samples[index] for index in indices])
            loss += next_token_loss(model, batch).loss_sum.item()
            weight += batch.loss_weights_T.sum().item()
        losses[f"held_out_loss/{mode}"] = loss / weight
    return losses
