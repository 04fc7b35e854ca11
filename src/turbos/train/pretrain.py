"""Pretraining: from named texts to a language model, with its own tokenizer, in one run directory.

It prepares what the shared loop needs (tokenizer, shards, loader, held-out texts) and leaves the loop to `train.loop`.

    recipe = PretrainRecipe(model=ModelConfig(vocab_size=2048, hidden_size=128, layers="(MF)*3AF"),
                            data=DataConfig(sources={"english": 1.0, "problems": 2.0}), train=TrainConfig(steps=500))
    final = pretrain(recipe, Path("runs/base"))
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from turbos.common.errors import UserError
from turbos.common.machine import set_threads
from turbos.common.records import IGNORED, Batch
from turbos.data.corpus import SourceShards, build_shards, training_texts
from turbos.data.loader import Loader, Part, batches_once
from turbos.data.shards import ShardReader
from turbos.data.sources import fetch
from turbos.model.checkpoint import load_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.checkpoint import write_whole
from turbos.train.loop import Run, TrainConfig, final_checkpoint, open_run, require_fit, train
from turbos.train.optim import OptimConfig
from turbos.train.trainer import Trainer, next_token_loss


@dataclass(frozen=True)
class DataConfig:
    """What to read: `sources` are names or paths with their shares of the tokens (weights).

    `tokenizer` is a directory that holds one; None trains one of `model.vocab_size` tokens on about
    `tokenizer_characters` of each source. `longest_document` cuts longer ones (None: one micro-batch); where several
    fit a micro-batch, it mixes sources. Each evaluation reads about `held_out_tokens` of each source.
    """

    sources: dict[str, float]
    tokenizer: str | None = None
    tokenizer_characters: int = 1_000_000
    longest_document: int | None = None
    held_out_tokens: int = 16_384
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data: sources names no text: add at least one")
        if self.tokenizer_characters < 1 or self.held_out_tokens < 1:
            raise UserError("data: tokenizer_characters and held_out_tokens must be at least 1")


@dataclass(frozen=True)
class PretrainRecipe:
    """A pretraining run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig(warmup_steps=20)


def pretrain(recipe: PretrainRecipe, run_dir: Path) -> Path:
    """Pretrain as the recipe says in `run_dir`, resuming where it stopped; returns the path of the final checkpoint."""
    config = recipe.train
    if config.tokens_per_step % config.micro_batch_tokens:
        raise UserError(
            f"train.tokens_per_step {config.tokens_per_step} must be a multiple of "
            f"train.micro_batch_tokens {config.micro_batch_tokens}"
        )
    set_threads(config.threads)
    resumed = open_run(recipe, run_dir)
    if (final := final_checkpoint(run_dir)) is not None:
        return final
    tokenizer = prepare_tokenizer(recipe, run_dir / "tokenizer")
    require_fit(recipe.model, tokenizer)
    model = LanguageModel(recipe.model).init_weights(config.seed)
    if resumed is not None:
        # Into a model of the recipe: a checkpoint need not keep options that only training reads.
        model.load_state_dict(load_model(resumed).state_dict())
    shards = build_shards(list(recipe.data.sources), tokenizer, run_dir / "shards", recipe.data.cache_dir)
    loader = build_loader(recipe, shards, tokenizer)
    count = config.tokens_per_step // config.micro_batch_tokens

    def batch_at(step: int) -> Sequence[Batch]:
        return [loader.batch(step * count + number) for number in range(count)]

    def evaluate() -> Mapping[str, float]:
        return held_out_figures(model, tokenizer, recipe, shards)

    trainer = Trainer(model, recipe.optim, config.steps)
    return train(Run("pretrain", run_dir, config, trainer, tokenizer, batch_at, evaluate), resumed)


def prepare_tokenizer(recipe: PretrainRecipe, directory: Path) -> Tokenizer:
    """The given tokenizer, or one trained on the sources and kept in `directory` for the next start."""
    data = recipe.data
    if data.tokenizer is not None:
        return Tokenizer.load(data.tokenizer)
    if not directory.is_dir():
        names = list(data.sources)
        fetch(names, data.cache_dir)
        texts = training_texts(names, data.tokenizer_characters, data.cache_dir)
        tokenizer = Tokenizer.train(texts, recipe.model.vocab_size)
        write_whole(directory, tokenizer.save)
    return Tokenizer.load(directory)


def build_loader(recipe: PretrainRecipe, shards: Sequence[SourceShards], tokenizer: Tokenizer) -> Loader:
    """Loader of micro-batches over the training shards."""
    parts = [Part(one.name, (ShardReader(one.train, tokenizer),), recipe.data.sources[one.name]) for one in shards]
    return Loader(parts, recipe.train.micro_batch_tokens, recipe.train.seed, recipe.data.longest_document)


def held_out_figures(
    model: LanguageModel, tokenizer: Tokenizer, recipe: PretrainRecipe, shards: Sequence[SourceShards]
) -> dict[str, float]:
    """Bits per byte of each source's held-out texts, as `bits_per_byte/<name>`."""
    figures = {}
    for one in shards:
        reader = ShardReader(one.held_out, tokenizer)
        batches: list[Batch] = []
        for batch in batches_once(reader, recipe.train.micro_batch_tokens):
            if sum(earlier.documents.total for earlier in batches) >= recipe.data.held_out_tokens:
                break
            batches.append(batch)
        figures[f"bits_per_byte/{one.name}"] = bits_per_byte(model, tokenizer, batches)
    return figures


@torch.no_grad()
def bits_per_byte(model: LanguageModel, tokenizer: Tokenizer, batches: Sequence[Batch]) -> float:
    """Bits over UTF-8 bytes of the predicted text; a document's first token is context, its end is predicted too.

    NaN where that leaves no text (documents of a single token).
    """
    nats, num_bytes = 0.0, 0
    for batch in batches:
        nats += next_token_loss(model, batch).loss_sum.item()
        predicted = batch.targets_T[batch.targets_T != IGNORED].tolist()
        num_bytes += len(tokenizer.decode(predicted, skip_special=True).encode())
    return nats / math.log(2) / num_bytes if num_bytes else math.nan
