"""The card of a run's checkpoints: data with licences, the recipe and its hash, and the checkpoint it began with.

Everything comes from the `recipe.yaml` that the run keeps, so a resumed run writes the same card.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from turbos.common.config import RECIPE_FILE, parse_yaml, values_hash
from turbos.data.sources import GROUPS, SOURCES, expand
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
        yield line if name not in SOURCES else f"{line}: {_on_card(name)}"
        # A group's licences are those of its sources.
        yield from (f"{name}, {one}: {_on_card(one)}" for one in (expand([name]) if name in GROUPS else ()))
    chats: Mapping[str, float] = (values.get("chats") or {}).get("sources") or {}
    yield from (f"conversations {name}, weight {weight:g}" for name, weight in chats.items())
    if "problems" in values:
        names = ", ".join((values["problems"] or {}).get("families") or {}) or "all families"
        yield f"generated problems with checked answers: {names}"


def _on_card(name: str) -> str:
    source = SOURCES[name]
    return f"{source.what} ({source.language}; {source.licence})"
