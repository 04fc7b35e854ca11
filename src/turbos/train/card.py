"""The card of a run's checkpoints: data with licences, the recipe and its hash, and the checkpoint it began with.

Everything comes from the `recipe.yaml` that the run keeps, so a resumed run writes the same card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from turbos.common.config import RECIPE_FILE, parse_yaml, values_hash
from turbos.data.sources import SOURCES
from turbos.model.card import Card


def run_card(run_dir: Path) -> Card:
    """What a run's recipe says of its checkpoints; a run without a recipe leaves it open."""
    path = run_dir / RECIPE_FILE
    if not path.is_file():
        return Card(title=run_dir.name)
    text = path.read_text(encoding="utf-8")
    values: Mapping[str, Any] = parse_yaml(text, str(path))
    base = values.get("init")
    return Card(
        title=run_dir.name,
        base=None if base is None else str(base),
        data=tuple(_data_lines(values)),
        recipe=text,
        recipe_hash=values_hash(values),
    )


def _data_lines(values: Mapping[str, Any]) -> Iterator[str]:
    sources: Mapping[str, float] = (values.get("data") or {}).get("sources") or {}
    for name, weight in sources.items():
        line = f"{name}, weight {weight:g}"
        known = SOURCES.get(name)
        yield line if known is None else f"{line}: {known.what} ({known.language}; {known.licence})"
    if "problems" in values:
        names = ", ".join((values["problems"] or {}).get("families") or {}) or "all families"
        yield f"generated problems with checked answers: {names}"
