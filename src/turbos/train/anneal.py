"""Annealing: a pretrained model goes on with a better mixture while the rate falls along a cosine to its floor.

High-quality texts stay, and conversations join them: instructions and long chains of thought, with loss on what the
assistant says only (TurboS report p.5-6). No conversation is cut: what is longer than `data.longest_document` waits in
`waiting.jsonl`. Resuming and the loop are those of every phase (`train.phase`).

    recipe = AnnealRecipe(init="runs/base/final", data=DataConfig(sources={"english": 1.0}),
                          chats=ChatConfig(sources={"problems": 1.0}), train=TrainConfig(steps=100))
    final = anneal(recipe, Path("runs/annealed"))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.common.machine import set_threads
from turbos.data.mixture import require_sources
from turbos.data.sources import fetch
from turbos.model.checkpoint import load_model
from turbos.model.hub import resolve_checkpoint
from turbos.model.package import check_vocabulary
from turbos.text.tokenizer import Tokenizer
from turbos.train.ingredients import ChatConfig, DataConfig, chat_ingredients, text_ingredients
from turbos.train.loop import TrainConfig, final_checkpoint, open_run
from turbos.train.optim import OptimConfig
from turbos.train.phase import Phase, require_whole_batches, run_phase


@dataclass(frozen=True)
class AnnealRecipe:
    """An annealing run: `init` is a checkpoint (directory or hub id), whose tokenizer is taken too.

    The rate starts at `optim.lr`, which is best the one that pretraining ended its stable part with.
    """

    init: str
    data: DataConfig
    chats: ChatConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig(decay="cosine", decay_fraction=1.0, final_lr_ratio=0.01)

    def __post_init__(self) -> None:
        if self.data.tokenizer is not None:
            raise UserError("data: tokenizer says nothing in annealing, the checkpoint brings its own: leave it out")


def anneal(recipe: AnnealRecipe, run_dir: Path) -> Path:
    """Anneal as the recipe says in `run_dir`, resuming where it stopped; returns the path of the final checkpoint."""
    config, data = recipe.train, recipe.data
    require_whole_batches(config)
    require_sources(list(data.weights()))
    set_threads(config.threads)
    resumed = open_run(recipe, run_dir)
    if (final := final_checkpoint(run_dir)) is not None:
        return final
    start = resumed or resolve_checkpoint(recipe.init)
    model, tokenizer = load_model(start), Tokenizer.load(start)
    check_vocabulary(start, tokenizer)
    fetch(list(data.weights()), data.cache_dir)
    shards = Path(data.shards or run_dir / "shards")
    ingredients = [
        *text_ingredients(data, tokenizer, shards),
        *chat_ingredients(recipe.chats, tokenizer, shards, config.seed),
    ]
    return run_phase(Phase("anneal", run_dir, config, recipe.optim, model, tokenizer, ingredients, data), resumed)
