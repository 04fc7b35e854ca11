"""The twins as a picture: what they learnt above, what they cost below; each panel says how the hybrid stands.

draw_twins(results, Path("bench-twins.png"))
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turbos.bench.twins import Results
from turbos.bench.twins_plan import ATTENTION, HYBRID, TWINS, Twin
from turbos.bench.twins_run import TwinFigures
from turbos.bench.twins_table import PLACES, Measurement, measurements

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"attention": "#c44e52", "mamba": "#4c72b0", "hybrid": "#2a8f4f"}
BAR = 0.27
SIZE, RING = (14.0, 7.8), "#111111"
STANDING_COLORS = {"first": "#2a8f4f", "level": "#666666", "second": "#c77a00", "last": "#c44e52"}


def draw_twins(results: Results, out: Path) -> Path:
    """Write the PNG; returns `out`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = measurements(results)
    figure, grid = pyplot.subplots(2, 4, figsize=SIZE, layout="constrained")
    _draw_bits(grid[0][0], found)
    _note_standing(grid[0][0], found, "text, ")
    _draw_recall(grid[0][1], results)
    _ring(grid[0][1], results.plan.pairs, [one for one in found if one.name.startswith("recall, ")][1:])
    _note_standing(grid[0][1], found, "recall, ", but="mean")
    _draw_needles(grid[0][2], results)
    needles = [one for one in found if one.name.startswith("needle") and "stretched" not in one.name]
    _ring(grid[0][2], [multiple * results.plan.length for multiple in results.plan.multiples], needles)
    _note_standing(grid[0][2], found, "needle", but="stretched")
    _draw_legend(grid[0][3], results)
    kinds = ("training speed", "training memory", "decoding, bytes held", "decoding, time")
    for axes, kind in zip(grid[1], kinds, strict=True):
        _draw_cost(axes, [one for one in found if one.name.startswith(kind)], kind, results.plan.cost_lengths)
        _note_standing(axes, found, kind)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def _of(figures: Sequence[TwinFigures], twin: Twin) -> list[TwinFigures]:
    return [one for one in figures if one.twin == twin.name]


def _draw_bits(axes: Axes, found: Sequence[Measurement]) -> None:
    """A group of bars for the mixture and for each source; a point for each seed."""
    groups = [one for one in found if one.name.startswith("text")]
    everything = [value for one in groups for values in one.values.values() for value in values]
    for number, twin in enumerate(TWINS):
        places = [place + (number - 1) * BAR for place in range(len(groups))]
        means = [one.mean(twin.name) for one in groups]
        axes.bar(places, means, BAR * 0.94, color=COLORS[twin.name], alpha=0.85)
        for place, one in zip(places, groups, strict=True):
            axes.plot([place] * len(one.values[twin.name]), one.values[twin.name], "k.", markersize=2.5)
        axes.annotate(f"{means[0]:.3f}", (places[0], max(groups[0].values[twin.name])), xytext=(0, 4), rotation=90,
                      textcoords="offset points", ha="center", va="bottom", fontsize=8)  # fmt: skip
    _ring(axes, [place + BAR for place in range(len(groups))], groups)
    # A bar from 0 would hide every difference; the axis says where it begins.
    room = max(0.05, max(everything) - min(everything))
    axes.set_ylim(min(everything) - 0.3 * room, max(everything) + 0.25 * room)
    axes.set_xticks(range(len(groups)), [one.name.removeprefix("text, ") for one in groups])
    _dress(axes, "held-out text (axis cut)", "", "bits per byte, less is better")


def _draw_recall(axes: Axes, results: Results) -> None:
    for twin in TWINS:
        runs = [one.abilities.recall for one in _of(results.figures, twin)]
        _draw_shares(axes, runs, lambda pairs: float(pairs), twin)
    _ticks(axes, results.plan.pairs, [str(pairs) for pairs in results.plan.pairs])
    _dress(axes, "associative recall", "key-value pairs in mind", "right answers, %")
    axes.set_ylim(-3, 103)


def _draw_needles(axes: Axes, results: Results) -> None:
    length, multiples = results.plan.length, results.plan.multiples
    for twin in TWINS:
        runs = [one.abilities.needle for one in _of(results.figures, twin)]
        _draw_shares(axes, runs, lambda multiple: float(multiple * length), twin)
    stretched = [one.abilities.stretched for one in _of(results.figures, ATTENTION)]
    _draw_shares(axes, stretched, lambda multiple: float(multiple * length), ATTENTION, "--")
    axes.axhline(100 / results.plan.needles, color="0.6", linewidth=0.8, linestyle=":")
    _ticks(axes, [multiple * length for multiple in multiples], [f"{multiple}x" for multiple in multiples])
    _dress(axes, f"{results.plan.needles} needles in text", f"length, 1x = {length} trained", "right answers, %")
    axes.set_ylim(-3, 103)


def _draw_shares(
    axes: Axes, runs: Sequence[Mapping[int, float]], place: Callable[[int], float], twin: Twin, style: str = "-"
) -> None:
    """A line through the means over seeds, and a pale point for each seed."""
    keys = list(runs[0]) if runs else []
    places = [place(key) for key in keys]
    for run in runs:
        axes.plot(places, [100 * run[key] for key in keys], ".", color=COLORS[twin.name], alpha=0.35)
    means = [100 * statistics.mean(run[key] for run in runs) for key in keys]
    width = 2.4 if twin == HYBRID else 1.6
    axes.plot(places, means, style, color=COLORS[twin.name], linewidth=width, marker="o", markersize=3)


def _draw_cost(axes: Axes, found: Sequence[Measurement], kind: str, lengths: Sequence[int]) -> None:
    for twin in TWINS:
        values = [one.mean(twin.name) for one in found]
        width = 2.4 if twin == HYBRID else 1.6
        axes.plot(lengths, values, "-o", color=COLORS[twin.name], linewidth=width, markersize=4)
    for one, length in zip(found, lengths, strict=True):
        _write_values(axes, one, length)
    _ring(axes, lengths, found)
    axes.set_yscale("log")
    axes.margins(x=0.16, y=0.12)
    axes.tick_params(axis="y", which="both", labelleft=False)
    _ticks(axes, lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
    better = "more" if found[0].sign > 0 else "less"
    _dress(axes, kind, "tokens", f"{found[0].unit}, {better} is better")


def _write_values(axes: Axes, found: Measurement, length: float) -> None:
    """Each twin's value: the least below its point, the middle one beside it, the greatest above."""
    for rank, twin in enumerate(sorted(TWINS, key=lambda twin: found.mean(twin.name))):
        value = found.mean(twin.name)
        axes.annotate(
            f"{value:,.0f}" if value >= 100 else f"{value:.3g}",
            (length, value),
            xytext=((0, -13), (11, 0), (0, 5))[rank],
            textcoords="offset points",
            ha="left" if rank == 1 else "center",
            va="center" if rank == 1 else "bottom",
            fontsize=7.5,
            color=COLORS[twin.name],
        )


def _ring(axes: Axes, places: Sequence[float], found: Sequence[Measurement]) -> None:
    """A ring around the hybrid's points where it loses."""
    for place, one in zip(places, found, strict=True):
        if one.standing in PLACES[1:]:
            axes.plot(place, one.mean(HYBRID.name), "o", markersize=11, fillstyle="none", color=RING)


def _draw_legend(axes: Axes, results: Results) -> None:
    """The key, and what was the same for all."""
    axes.axis("off")
    for twin in TWINS:
        axes.plot([], [], color=COLORS[twin.name], linewidth=2.4, label=f"{twin.title}: {twin.layers}")
    axes.plot([], [], "--", color=COLORS[ATTENTION.name], label="attention-only, rotary base stretched")
    axes.plot([], [], ":", color="0.6", label="a guess among the needles")
    axes.plot([], [], "o", markersize=10, fillstyle="none", color=RING, label="the hybrid loses to one or both")
    axes.legend(loc="upper left", frameon=False, fontsize=9)
    sizes = sorted({one.active_params for one in results.figures})
    lines = [
        f"{sizes[0] / 1e6:.2f} to {sizes[-1] / 1e6:.2f} M active parameters",
        f"{results.figures[0].tokens / 1e6:.2f} M tokens each, the same in the same order",
        f"seeds {', '.join(map(str, results.seeds))}: points; lines are means",
        "A, M, D: attention, Mamba2, feed-forward",
    ]
    if results.is_quick:
        lines.append("QUICK: the figures say nothing about the models")
    axes.text(0.03, 0.02, "\n".join(lines), transform=axes.transAxes, fontsize=8.5, va="bottom", color="0.25")


def _note_standing(axes: Axes, found: Sequence[Measurement], begins: str, but: str = "-") -> None:
    """Say in a panel where the hybrid stands, from the left of its axis to the right."""
    standings = [one.standing for one in found if one.name.startswith(begins) and but not in one.name]
    words = list(dict.fromkeys(standings))
    text = words[0] if len(words) == 1 else ", ".join(standings)
    worst = next((word for word in ("last", "second", "level", "first") if word in words), "first")
    axes.text(
        0.0, 1.01, f"hybrid: {text}", transform=axes.transAxes, fontsize=8.5, va="bottom", color=STANDING_COLORS[worst]
    )


def _ticks(axes: Axes, places: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(places), list(labels))
    axes.minorticks_off()


def _dress(axes: Axes, title: str, across: str, up: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=17)
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
