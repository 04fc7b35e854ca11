"""Rows of `turbos bench serve` as a picture: rate, waiting and re-reading, ours beside the engine and llama-server.

The rows have our values and ratios; the others' values follow from those.

    draw_serve(rows, Path("bench-serve.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbos.bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"turbos serve": "#2a8f4f", "engine": "#9a9a9a", "llama-server": "#4c72b0"}
PANEL_WIDTH, HEIGHT = 4.3, 4.2


@dataclass(frozen=True)
class Panel:
    """Rows that begin alike."""

    begins: str
    title: str
    unit: str
    more_is_better: bool


PANELS = (
    Panel("serve aggregate ", "all streams together", "tok/s", True),
    Panel("serve first token ", "to the first token", "ms", False),
    Panel("serve between tokens ", "from one token to the next", "ms", False),
    Panel("serve reread ", "tokens read when a talk comes again", "tokens", False),
)


def draw_serve(rows: Sequence[Row], out: Path) -> Path:
    """Write a PNG with a panel for each kind of row that is there; returns `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(panel, [row for row in rows if row.name.startswith(panel.begins)]) for panel in PANELS]
    found = [(panel, own) for panel, own in found if own]
    size = (PANEL_WIDTH * len(found), HEIGHT)
    figure, grid = pyplot.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    for axes, (panel, own) in zip(grid[0], found, strict=True):
        _draw(axes, panel, own, rows)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def values_of(panel: Panel, own: Sequence[Row], rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Values of each program for a panel's rows, None where one has none.

    >>> values_of(PANELS[0], [Row("serve aggregate 64", 600.0, "tok/s", {"engine": 0.9, "llama-server": 2.0})], [])
    {'turbos serve': [600.0], 'engine': [666.6666666666666], 'llama-server': [300.0]}
    """
    found: dict[str, list[float | None]] = {"turbos serve": [row.value for row in own]}
    # What was read is counted exactly, in rows of the peer's own; a ratio knows no zero.
    counted = {row.name: row.value for row in rows if not row.name.startswith("serve")}
    for peer in ("engine", "llama-server"):
        values = [counted.get(row.name.replace("serve", peer, 1), _value(row, peer, panel)) for row in own]
        if any(value is not None for value in values):
            found[peer] = values
    return found


def _value(row: Row, peer: str, panel: Panel) -> float | None:
    if peer not in row.ratios:
        return None
    return row.value / row.ratios[peer] if panel.more_is_better else row.value * row.ratios[peer]


def _draw(axes: Axes, panel: Panel, own: Sequence[Row], rows: Sequence[Row]) -> None:
    """A group of bars for each row, one for each program, with its value over it."""
    values = values_of(panel, own, rows)
    width = 0.8 / len(values)
    for number, (name, bars) in enumerate(values.items()):
        places = [place + (number - (len(values) - 1) / 2) * width for place in range(len(own))]
        drawn = axes.bar(places, [bar or 0.0 for bar in bars], width * 0.92, color=COLORS[name], label=name)
        labels = ["" if bar is None else value_text(bar, panel.unit) for bar in bars]
        axes.bar_label(drawn, labels, padding=2, fontsize=7.5, rotation=0 if len(own) < 4 else 90)
    axes.set_xticks(range(len(own)), [_label(row, panel) for row in own], fontsize=8)
    axes.margins(y=0.16)
    better = "more" if panel.more_is_better else "less"
    axes.set_ylabel(f"{panel.unit}, {better} is better", fontsize=9)
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def value_text(value: float, unit: str) -> str:
    """A value for reading; long times in seconds.

    >>> value_text(57.875, "ms"), value_text(14682.0, "ms"), value_text(1645.0, "tokens")
    ('57.9', '14.7 s', '1,645')
    """
    if unit == "ms" and value >= 1000:
        return f"{value / 1000:.3g} s"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _label(row: Row, panel: Panel) -> str:
    """What tells a row from its neighbours, and how many of its tokens are new."""
    name = row.name.removeprefix(panel.begins)
    if panel.unit != "tokens":
        return f"{name} streams" if panel.more_is_better else name.split()[0]
    return f"{name}\n{row.unit.rpartition(', ')[2]}"
