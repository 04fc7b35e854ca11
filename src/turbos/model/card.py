"""The model card: `README.md` of a checkpoint, with what the model is, its data, its recipe, and measured results.

A card is written with the checkpoint; what is found out later (an evaluation, a parity certificate) replaces its
section and leaves the others alone. Front matter is what the Hugging Face hub reads.

>>> EvalRow("gcd", "solved", "81 %", "turbos eval runs/demo/final").cells
('gcd', 'solved', '81 %', '`turbos eval runs/demo/final`')
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.model.families import NATIVE, family_of
from turbos.model.hub import HUB_ID

CARD_FILE = "README.md"
EVALUATION = "Evaluation"


@dataclass(frozen=True)
class EvalRow:
    """One measured figure and the command that measures it again."""

    task: str
    metric: str
    value: str
    command: str

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The row's cells in a table; the command is code."""
        return self.task, self.metric, self.value, f"`{self.command}`"


@dataclass(frozen=True)
class Card:
    """What a card says beyond the configuration: `data` are lines, `recipe` is YAML, `base` the checkpoint before."""

    title: str = "TurboS checkpoint"
    licence: str | None = None
    base: str | None = None
    data: tuple[str, ...] = ()
    recipe: str | None = None
    recipe_hash: str | None = None
    evaluation: tuple[EvalRow, ...] = ()


def card_text(card: Card, config: ModelConfig) -> str:
    """The card as Markdown."""
    parts = [_front_matter(card, config), f"# {card.title}\n", _model(config)]
    if card.base:
        parts.append(f"Made from `{card.base}`.\n")
    parts.append(_section("Data", "\n".join(f"- {line}" for line in card.data) or "Not recorded."))
    if card.recipe:
        mark = f"Recipe hash `{card.recipe_hash}`.\n\n" if card.recipe_hash else ""
        parts.append(_section("Recipe", f"{mark}```yaml\n{card.recipe.rstrip()}\n```"))
    parts.append(_section(EVALUATION, evaluation_table(card.evaluation) if card.evaluation else "Not measured yet."))
    return "\n".join(parts)


def write_card(directory: Path, card: Card, config: ModelConfig) -> None:
    """Write README.md into a checkpoint directory."""
    (directory / CARD_FILE).write_text(card_text(card, config), encoding="utf-8")


def evaluation_table(rows: Sequence[EvalRow]) -> str:
    """A Markdown table of figures, each with its command."""
    lines = [("task", "metric", "value", "command"), ("---",) * 4, *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def set_section(directory: Path, title: str, text: str) -> None:
    """Put Markdown under `## title` of a checkpoint's card, replacing that section or adding it at the end.

    A checkpoint without a card gets one with this section alone. `text` must not have headings of that level itself.
    """
    path = directory / CARD_FILE
    card = path.read_text(encoding="utf-8") if path.is_file() else "# Checkpoint\n\n"
    section = _section(title, text)
    place = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if place is None:
        card = f"{card.rstrip()}\n\n{section}"
    else:
        card = f"{card[: place.start()]}{section}\n{card[place.end() :]}".rstrip() + "\n"
    path.write_text(card, encoding="utf-8")


def shortened(layers: str) -> str:
    """A string of sublayers with its repetition counted, as a recipe may spell it.

    >>> shortened("MFAFMFAF"), shortened("MFA")
    ('(MFAF)*2', 'MFA')
    """
    for size in range(1, len(layers) // 2 + 1):
        if layers[:size] * (len(layers) // size) == layers:
            return f"({layers[:size]})*{len(layers) // size}"
    return layers


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text.strip()}\n"


def _front_matter(card: Card, config: ModelConfig) -> str:
    licence = [f"license: {card.licence}"] if card.licence else []
    # A path may look like a hub id.
    on_hub = card.base and HUB_ID.fullmatch(card.base) and not Path(card.base).is_dir()
    base = [f"base_model: {card.base}"] if on_hub else []
    library = "turbos" if family_of(config) is NATIVE else "transformers"
    lines = ["---", *licence, *base, f"library_name: {library}", "pipeline_tag: text-generation", "tags: [turbos]"]
    return "\n".join([*lines, "---", ""])


def _model(config: ModelConfig) -> str:
    counts = describe(config)
    family = family_of(config)
    loads = "TurboS alone" if family is NATIVE else "`transformers.AutoModelForCausalLM`, without remote code"
    rows = [
        ("family", f"`{family.name}`, loaded by {loads}"),
        ("sublayers", f"`{shortened(config.layers)}` (M Mamba2, S Mamba-1, A attention, F experts, D dense)"),
        ("parameters", f"{counts.total_params:,} in all, {counts.active_params:,} a token"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("longest text", f"{config.max_positions:,} tokens"),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])
