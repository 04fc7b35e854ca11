"""A phase of pretraining: a model, a mixture and a schedule through the shared loop, with batches made ahead.

Pretraining and annealing are phases (`train.pretrain`, `train.anneal`). At its start a phase says in one line what it
asks of each source and how often it will see each text, and lists the conversations that are too long for it in
`waiting.jsonl`, for a phase with a longer context.

    phase = Phase("pretrain", run_dir, recipe.train, recipe.optim, model, tokenizer, ingredients, recipe.data)
    final = run_phase(phase, resumed)
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.common.records import Batch
from turbos.data.loader import Loader, Part, Waiting
from turbos.data.mixture import supplies, supply_line
from turbos.data.prefetch import Prefetch
from turbos.data.shards import ShardReader
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.held_out import held_out_figures
from turbos.train.ingredients import DataConfig, Ingredient
from turbos.train.loop import Run, TrainConfig, train
from turbos.train.optim import OptimConfig
from turbos.train.trainer import Trainer

WAITING_FILE = "waiting.jsonl"


@dataclass(frozen=True)
class Phase:
    """What a phase needs; `data` says how long documents may be and how many held-out tokens are measured."""

    label: str
    run_dir: Path
    train: TrainConfig
    optim: OptimConfig
    model: LanguageModel
    tokenizer: Tokenizer
    ingredients: Sequence[Ingredient]
    data: DataConfig


def run_phase(phase: Phase, resumed: Path | None) -> Path:
    """Train the phase from the checkpoint `resumed` (None: from its start); returns the final checkpoint's path."""
    config = phase.train
    loader = build_loader(phase.ingredients, phase.tokenizer, config, phase.data.longest_document)
    _say(phase, loader)
    count = config.tokens_per_step // config.micro_batch_tokens

    def batches_of(step: int) -> Sequence[Batch]:
        return [loader.batch(step * count + number) for number in range(count)]

    def evaluate() -> Mapping[str, float]:
        tokens = phase.data.held_out_tokens
        return held_out_figures(phase.model, phase.tokenizer, phase.ingredients, config.micro_batch_tokens, tokens)

    trainer = Trainer(phase.model, phase.optim, config.steps, config.seed)
    with Prefetch(batches_of, config.steps - 1) as batches:
        run = Run(phase.label, phase.run_dir, config, trainer, phase.tokenizer, batches.at, evaluate)
        return train(run, resumed)


def require_whole_batches(config: TrainConfig) -> None:
    """Refuse a step that is no whole number of micro-batches."""
    if config.tokens_per_step % config.micro_batch_tokens:
        raise UserError(
            f"train.tokens_per_step {config.tokens_per_step} must be a multiple of "
            f"train.micro_batch_tokens {config.micro_batch_tokens}"
        )


def build_loader(
    ingredients: Sequence[Ingredient], tokenizer: Tokenizer, config: TrainConfig, longest_document: int | None
) -> Loader:
    """Loader of micro-batches over the training shards."""
    parts = [
        Part(one.shards.name, (ShardReader(one.shards.train, tokenizer),), one.weight, one.targets)
        for one in ingredients
    ]
    return Loader(parts, config.micro_batch_tokens, config.seed, longest_document)


def _say(phase: Phase, loader: Loader) -> None:
    """What the run asks of its sources, and what must wait, each in one line on stderr."""
    shares = {one.shards.name: one.weight for one in phase.ingredients}
    there = {one.shards.name: ShardReader(one.shards.train, phase.tokenizer).info.tokens for one in phase.ingredients}
    found = supplies(shares, phase.train.steps * phase.train.tokens_per_step, there)
    print(f"{phase.label} {supply_line(found)}", file=sys.stderr, flush=True)
    if any(one.targets is not None for one in phase.ingredients):
        write_waiting(phase.run_dir / WAITING_FILE, loader.waiting)
        conversations = sum(
            len(ShardReader(one.shards.train, phase.tokenizer)) for one in phase.ingredients if one.targets is not None
        )
        tokens = sum(one.tokens for one in loader.waiting)
        print(
            f"{phase.label} {len(loader.waiting)} of {conversations} conversations ({tokens} tokens) are longer than "
            f"{loader.slot_tokens} tokens and wait for a longer context: {phase.run_dir / WAITING_FILE}",
            file=sys.stderr,
            flush=True,
        )


def write_waiting(path: Path, waiting: Sequence[Waiting]) -> None:
    """Write the list, one JSON object a line (source, shard, document, tokens), whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in waiting)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_waiting(path: Path) -> list[Waiting]:
    """The list again; UserError where there is none."""
    if not path.is_file():
        raise UserError(f"no list of waiting conversations at {path}: run the phase that makes it")
    return [Waiting(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
