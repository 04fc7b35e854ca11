"""Rows of a benchmark as a bar chart: how fast each peer is, as a share of our speed.

draw_rows(rows, Path("bench-peers.png"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from turbos.bench.rows import Row

COLORS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#937860")
HEIGHT_OF_ROW, HEIGHT_AROUND, WIDTH = 0.9, 1.3, 7.5


def draw_rows(rows: Sequence[Row], out: Path) -> Path:
    """Write a PNG with a group of bars for each row, ours in front at 1; returns `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peers = list(dict.fromkeys(peer for row in rows for peer in row.ratios))
    names = ["turbos", *peers]
    size = (WIDTH, HEIGHT_OF_ROW * len(rows) + HEIGHT_AROUND)
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    thickness = 0.8 / len(names)
    for number, name in enumerate(names):
        speeds = [1.0 if name == "turbos" else _speed(row, name) for row in rows]
        places = [place + number * thickness for place in range(len(rows))]
        bars = axes.barh(places, speeds, thickness * 0.92, color=COLORS[number % len(COLORS)], label=name)
        labels = [f"{row.value * speed:,.0f}" if speed else "" for row, speed in zip(rows, speeds, strict=True)]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    middle = (len(names) - 1) * thickness / 2
    axes.set_yticks([place + middle for place in range(len(rows))], [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("speed as a share of turbos', by the median of the rounds' ratios; numbers are tokens per second")
    axes.xaxis.label.set_fontsize(8)
    axes.margins(x=0.1, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=len(names), frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def _speed(row: Row, peer: str) -> float:
    """A peer's speed as a share of ours; 0 where it was not measured."""
    return 1 / row.ratios[peer] if peer in row.ratios else 0.0
