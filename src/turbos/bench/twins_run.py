"""One twin from one seed: trained by the shared loop, measured, and its figures kept as JSON.

It goes on from its last checkpoint where it was stopped, and is not run again once its figures are there. A run is a
process of its own with one thread:

    python -m turbos.bench.twins_run runs/twins hybrid 0          # -> runs/twins/runs/hybrid-seed0.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbos.bench.twins_data import Mixture, open_data
from turbos.bench.twins_measure import Abilities, measure
from turbos.bench.twins_plan import QUICK, Plan, Twin, twin_model, twin_named
from turbos.common.errors import UserError
from turbos.common.machine import keep_freed_memory, set_threads
from turbos.common.metrics import METRICS_FILE, read_metrics
from turbos.data.corpus import SourceShards
from turbos.model.checkpoint import load_model
from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.loop import Run, TrainConfig, final_checkpoint, open_run, sole_owner, train
from turbos.train.optim import OptimConfig
from turbos.train.trainer import Trainer


@dataclass(frozen=True)
class TwinRecipe:
    """What a run directory belongs to."""

    model: ModelConfig
    train: TrainConfig
    optim: OptimConfig


@dataclass(frozen=True)
class TwinFigures:
    """What a run came to; `seconds` are those of its training steps, on one thread."""

    twin: str
    seed: int
    active_params: int
    tokens: int
    seconds: float
    abilities: Abilities


def run_place(directory: Path, twin: Twin, seed: int) -> Path:
    """The run's directory; its figures lie beside it, with `.json`."""
    return directory / "runs" / f"{twin.name}-seed{seed}"


def run_twin(twin: Twin, seed: int, plan: Plan, directory: Path) -> TwinFigures:
    """Train and measure, as far as it is not done yet; returns and keeps the figures."""
    run_dir = run_place(directory, twin, seed)
    if (kept := run_dir.with_suffix(".json")).is_file():
        return read_figures(kept)
    set_threads(1)
    tokenizer, shards = open_data(directory, plan)
    recipe = TwinRecipe(twin_model(twin), plan.train_config(seed), plan.optim)
    with sole_owner(run_dir):
        model = trained(recipe, plan, run_dir, tokenizer, shards)
    records = [record for record in read_metrics(run_dir / METRICS_FILE) if "seconds" in record]
    figures = TwinFigures(
        twin.name,
        seed,
        describe(recipe.model).active_params,
        sum(int(record["tokens"]) for record in records),
        sum(float(record["seconds"]) for record in records),
        measure(model, plan, tokenizer, shards),
    )
    write_json(kept, dataclasses.asdict(figures))
    return figures


def trained(
    recipe: TwinRecipe, plan: Plan, run_dir: Path, tokenizer: Tokenizer, shards: Sequence[SourceShards]
) -> LanguageModel:
    """The model at the end of its run, which goes on from the last checkpoint."""
    resumed = open_run(recipe, run_dir)
    model = LanguageModel(recipe.model).init_weights(recipe.train.seed)
    if (done := final_checkpoint(run_dir) or resumed) is not None:
        model.load_state_dict(load_model(done).state_dict())
    if final_checkpoint(run_dir) is None:
        mixture = Mixture(plan, recipe.train.seed, tokenizer, shards)
        trainer = Trainer(model, recipe.optim, recipe.train.steps, recipe.train.seed)
        run = Run(run_dir.name, run_dir, recipe.train, trainer, tokenizer, lambda step: [mixture.batch(step)])
        train(run, resumed)
    return model.eval()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_figures(path: Path) -> TwinFigures:
    """Figures as they were kept; UserError for a file that is not such."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = content.pop("abilities")
        by_number = {
            name: {int(key): float(value) for key, value in told[name].items()}
            for name in ("recall", "needle", "stretched")
        }
        return TwinFigures(**content, abilities=Abilities(told["bits_per_byte"], **by_number))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no figures of a twin ({error!r}): delete it and run the bench again") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one twin in this process."""
    parser = argparse.ArgumentParser(prog="python -m turbos.bench.twins_run", description="Train and measure one twin.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("twin")
    parser.add_argument("seed", type=int)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    keep_freed_memory()
    try:
        run_twin(twin_named(args.twin), args.seed, QUICK if args.quick else Plan(), args.directory)
    except UserError as error:
        print(f"twins_run: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
