"""Pretraining: from named texts to a language model, with its own tokenizer, in one run directory.

It prepares tokenizer, shards and a fresh model; the rest is what any phase does (`train.phase`).

    recipe = PretrainRecipe(model=ModelConfig(vocab_size=2048, hidden_size=128, layers="(MF)*3AF"),
                            data=DataConfig(sources={"english": 1.0, "problems": 2.0}), train=TrainConfig(steps=500))
    final = pretrain(recipe, Path("runs/base"))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turbos.common.machine import set_threads
from turbos.data.corpus import training_texts
from turbos.data.mixture import require_sources
from turbos.data.sources import fetch
from turbos.model.checkpoint import load_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.checkpoint import write_whole
from turbos.train.ingredients import DataConfig, text_ingredients
from turbos.train.loop import TrainConfig, final_checkpoint, open_run, require_fit
from turbos.train.optim import OptimConfig
from turbos.train.phase import Phase, require_whole_batches, run_phase


@dataclass(frozen=True)
class PretrainRecipe:
    """A pretraining run."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig(warmup_steps=20)


def pretrain(recipe: PretrainRecipe, run_dir: Path) -> Path:
    """Pretrain as the recipe says in `run_dir`, resuming where it stopped; returns the path of the final checkpoint."""
    config, data = recipe.train, recipe.data
    require_whole_batches(config)
    require_sources(list(data.weights()))
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
    ingredients = text_ingredients(data, tokenizer, Path(data.shards or run_dir / "shards"))
    return run_phase(Phase("pretrain", run_dir, config, recipe.optim, model, tokenizer, ingredients, data), resumed)


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
