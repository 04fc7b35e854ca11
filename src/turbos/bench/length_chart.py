"""Rows of `turbos bench length` as a picture: what a token costs and a session holds, by length, for all three shapes.

The rows have the hybrid's values and ratios; the others' values are those divided by the ratios.

    draw_length(rows, Path("bench-length.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from turbos.bench.length_plan import ATTENTION, HYBRID, SHAPES, Shape
from turbos.bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"attention": "#c44e52", "mamba": "#4c72b0", "hybrid": "#2a8f4f"}
PANEL_WIDTH, HEIGHT = 4.3, 4.2


@dataclass(frozen=True)
class Panel:
    """Rows that begin alike, over length; `faster_up` where more is better."""

    begins: str
    title: str
    unit: str
    faster_up: bool


PANELS = (
    Panel("decode int8 ", "decoding, one session, int8 weights", "tok/s", True),
    Panel("prefill ", "reading a segment at that depth", "tok/s", True),
    Panel("bytes ", "bytes that a session holds", "MB", False),
    Panel("aggregate ", "decoding, all sessions of one budget", "tok/s", True),
)


def draw_length(rows: Sequence[Row], out: Path) -> Path:
    """Write a PNG with a panel for each kind of row that is there; returns `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [(panel, rows_of(panel, rows)) for panel in PANELS]
    found = [(panel, own) for panel, own in found if own]
    figure, grid = pyplot.subplots(
        1, len(found), figsize=(PANEL_WIDTH * len(found), HEIGHT), layout="constrained", squeeze=False
    )
    for axes, (panel, own) in zip(grid[0], found, strict=True):
        _draw(axes, panel, own)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(SHAPES), frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def rows_of(panel: Panel, rows: Sequence[Row]) -> dict[int, Row]:
    """A panel's rows by length, shortest first."""
    named = {row.name.removeprefix(panel.begins): row for row in rows if row.name.startswith(panel.begins)}
    return {length: named[str(length)] for length in sorted(int(name) for name in named if name.isdigit())}


def value_of(shape: Shape, row: Row, faster_up: bool) -> float:
    """A shape's value in the hybrid's row.

    >>> value_of(ATTENTION, Row("decode int8 2048", 300.0, "tok/s", {"attention": 1.5}), faster_up=True)
    200.0
    """
    if shape == HYBRID:
        return row.value
    return row.value / row.ratios[shape.name] if faster_up else row.value * row.ratios[shape.name]


def ratio_text(ratio: float) -> str:
    """A ratio for reading, which never rounds a loss away.

    >>> ratio_text(0.98), ratio_text(6.54)
    ('0.98x', '6.5x')
    """
    return f"{ratio:.2f}x" if ratio < 2 else f"{ratio:.1f}x"


def _draw(axes: Axes, panel: Panel, rows: dict[int, Row]) -> None:
    """A line for each shape, and over or under the hybrid's points how many times better than attention it is."""
    lengths = list(rows)
    for shape in SHAPES:
        values = [value_of(shape, row, panel.faster_up) for row in rows.values()]
        width = 2.4 if shape == HYBRID else 1.6
        axes.plot(lengths, values, "-o", color=COLORS[shape.name], linewidth=width, markersize=4, label=shape.title)
    for length, row in rows.items():
        axes.annotate(
            ratio_text(row.ratios[ATTENTION.name]),
            (length, row.value),
            xytext=(0, -14 if panel.faster_up else 7),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color=COLORS[HYBRID.name],
            fontweight="bold",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    axes.minorticks_off()
    axes.margins(x=0.12, y=0.14)
    better = "more" if panel.faster_up else "less"
    axes.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel("tokens before; numbers: hybrid against attention", fontsize=9)
    axes.set_ylabel(f"{panel.unit}, {better} is better", fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
