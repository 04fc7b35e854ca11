"""`turbos describe RECIPE|CKPT`: what a model costs in parameters, work and memory, without building it.

The name is looked up as a checkpoint directory, a model preset (`recipes/model`), a pretraining recipe, then a hub id;
`--dotted.key value` changes a recipe first. The counting is `model.describe`'s.

    turbos describe turbos-560b --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.common.config import known_recipes, load_recipe, read_values
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from turbos.model.config import ModelConfig
    from turbos.model.describe import Description


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    presets = ", ".join(known_recipes("model"))
    parser = subparsers.add_parser(
        "describe",
        help="count a model's parameters, work and memory",
        allow_abbrev=False,
        epilog=f"Any key of a recipe can be set: --dotted.key VALUE. Model presets: {presets}",
    )
    parser.add_argument(
        "model", metavar="RECIPE|CKPT", help="model preset, pretraining recipe, checkpoint directory or hub id"
    )
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the counts as a table or as JSON."""
    config = find_config(args.model, args.overrides)
    from turbos.model.describe import describe

    description = describe(config)
    if args.json:
        print(json.dumps(dataclasses.asdict(description)))
    else:
        print_table(args.model, description)
    return 0


def find_config(name: str, overrides: list[str]) -> ModelConfig:
    """The model's configuration behind a checkpoint directory, a preset's or recipe's name, or a YAML file."""
    from turbos.model.config import ModelConfig

    path = Path(name)
    if path.is_dir():
        from turbos.model.checkpoint import load_config

        if overrides:
            raise UserError(f"{name} is a checkpoint, whose shape is fixed; {overrides[0]} can only change a recipe")
        return load_config(path)
    is_file = path.suffix in (".yaml", ".yml") and path.is_file()
    if name in known_recipes("model") or (is_file and "model" not in read_values(path)):
        return load_recipe(ModelConfig, "model", name, overrides)
    if name in known_recipes("pretrain") or is_file:
        from turbos.train.pretrain import PretrainRecipe

        return load_recipe(PretrainRecipe, "pretrain", name, overrides).model
    if "/" in name:
        from turbos.model.hub import resolve_checkpoint

        return find_config(str(resolve_checkpoint(name)), overrides)
    known = ", ".join([*known_recipes("model"), *known_recipes("pretrain")])
    raise UserError(f"no checkpoint directory, model preset or pretraining recipe {name!r}; known: {known}")


def print_table(name: str, description: Description) -> None:
    """The counts for reading, with units."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{name}: {description.layers}", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters in all", readable(description.total_params))
    table.add_row("parameters active per token", readable(description.active_params))
    table.add_row("forward work per token", f"{readable(description.flops_per_token)}FLOP")
    table.add_row("attention cache per token", f"{readable(description.kv_bytes_per_token)}B")
    table.add_row("constant state per sequence", f"{readable(description.state_bytes)}B")
    table.add_row("routed experts multiplied by", description.expert_product)
    Console().print(table)


def readable(number: int) -> str:
    """A count with three digits and a decimal prefix: 559.1 G, 26.4 M, 512.

    >>> readable(26_412_000), readable(512), readable(1_000)
    ('26.4 M', '512 ', '1.0 k')
    """
    value, prefixes = float(number), ["", "k", "M", "G", "T", "P"]
    while value >= 1000 and len(prefixes) > 1:
        value, prefixes = value / 1000, prefixes[1:]
    return f"{number} " if prefixes[0] == "" else f"{value:.1f} {prefixes[0]}"
