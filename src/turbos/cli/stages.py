"""The stages of training as verbs: `turbos pretrain`, `turbos anneal`, `turbos sft`, `turbos rl`.

All have one form, `turbos STAGE RECIPE [--run DIR] [--dry-run] [--json] [--threads N] [--dotted.key value ...]`. What
a stage does is in `train.pretrain`, `train.anneal`, `train.sft` and `rl.loop`; here a recipe is resolved and a run
directory chosen.

    turbos pretrain demo --train.steps 50 --run runs/short
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbos.common.config import dump_recipe, known_recipes, load_recipe, plain_values, recipe_hash
from turbos.common.errors import UserError

HELP = {
    "pretrain": "train a model on text and problems",
    "anneal": "end pretraining with conversations and a falling rate",
    "sft": "teach a model to answer, with and without thinking",
    "rl": "improve a model by checked answers (GRPO)",
}


@dataclass(frozen=True)
class Stage:
    """A stage's recipe type, and the function that runs it in a directory and returns the final checkpoint's path."""

    recipe: type
    train: Callable[[Any, Path], Path]


def add_parser(subparsers: Any) -> None:
    """Declare the verbs, which differ in nothing but their recipes."""
    for verb, text in HELP.items():
        parser = subparsers.add_parser(
            verb,
            help=text,
            allow_abbrev=False,
            description=f"{text[0].upper()}{text[1:]}. The same command resumes a run that was stopped.",
            epilog=f"Any key of the recipe can be set: --dotted.key VALUE. Recipes: {', '.join(known_recipes(verb))}",
        )
        parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe of the package, or path of a YAML file")
        parser.add_argument("--run", type=Path, metavar="DIR", help=f"run directory (default: runs/{verb}-RECIPE)")
        parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
        parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")
        parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run(args: argparse.Namespace) -> int:
    """Resolve the recipe, then print it (`--dry-run`) or train."""
    stage = load_stage(args.verb)
    recipe: Any = load_recipe(stage.recipe, args.verb, args.recipe, args.overrides)
    if args.dry_run:
        print(json.dumps(plain_values(recipe)) if args.json else dump_recipe(recipe), end="\n" if args.json else "")
        return 0
    use_threads(args.threads)
    if args.threads is not None and recipe.train.threads not in (None, args.threads):
        raise UserError(f"--threads {args.threads} contradicts train.threads {recipe.train.threads} of the recipe")
    run_dir = args.run or Path("runs") / f"{args.verb}-{Path(args.recipe).stem}"
    from turbos.train.loop import sole_owner

    with contextlib.redirect_stdout(sys.stderr), sole_owner(run_dir):
        final = stage.train(recipe, run_dir)
    if args.json:
        outcome = {"verb": args.verb, "run": str(run_dir), "final": str(final), "recipe_hash": recipe_hash(recipe)}
        print(json.dumps(outcome | {"last": dict(last_values(run_dir))}))
    else:
        print(final)
    return 0


def load_stage(verb: str) -> Stage:
    """Import one stage; the others stay unloaded."""
    if verb == "pretrain":
        from turbos.train.pretrain import PretrainRecipe, pretrain

        return Stage(PretrainRecipe, pretrain)
    if verb == "anneal":
        from turbos.train.anneal import AnnealRecipe, anneal

        return Stage(AnnealRecipe, anneal)
    if verb == "sft":
        from turbos.train.sft import SFTRecipe, sft

        return Stage(SFTRecipe, sft)
    from turbos.rl.loop import RLRecipe, rl

    return Stage(RLRecipe, rl)


def use_threads(count: int | None) -> None:
    """Get this process ready to compute: so many threads (None leaves torch's choice), freed memory kept for reuse."""
    from turbos.common.machine import keep_freed_memory, set_threads

    if count is not None and count < 1:
        raise UserError(f"--threads must be at least 1, not {count}")
    set_threads(count)
    keep_freed_memory()


def last_values(run_dir: Path) -> Mapping[str, float | str | None]:
    """The last value of each figure that a run logged; a value that is not finite is None, as JSON has no NaN."""
    from turbos.common.metrics import METRICS_FILE, plain_scalar, read_metrics

    last: dict[str, float | str | None] = {}
    for record in read_metrics(run_dir / METRICS_FILE):
        last |= {name: plain_scalar(value) for name, value in record.items()}
    return last
