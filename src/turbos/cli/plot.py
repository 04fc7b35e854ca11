"""`turbos plot RUN`: draw the curves of a run from its metrics.jsonl, one panel for each kind of figure.

Any number that a run logs is drawn: names that start alike (`held_out/books`, `held_out/code`) share a panel. The PNG
is written to the run's folder. This is for looking at one run, not for comparing many (use TensorBoard).

    turbos plot runs/demo        # prints runs/demo/curves.png
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.common.errors import UserError
from turbos.common.metrics import METRICS_FILE, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
PANEL_INCHES = (4.6, 3.0)
SMOOTH_FROM = 60
"""A series of so many points is drawn pale, with its running mean on top."""


@dataclass(frozen=True)
class Kind:
    """A panel's title and unit, and the names of the figures that belong to it; panels come in this order.

    A group in the pattern divides the kind: there is a panel for each text that it matches. `is_exact` figures are
    without noise and are not smoothed.
    """

    title: str
    unit: str
    pattern: str
    is_exact: bool = False


KINDS = (
    Kind("loss", "nats per token", r"loss"),
    Kind("held-out loss", "nats per token", r"held_out_loss.*"),
    Kind("held-out texts", "bits per byte", r"bits_per_byte.*"),
    Kind("accuracy", "share solved", r"accuracy.*|.*/accuracy"),
    Kind("reward", "mean reward", r"reward(?:/\w+)?"),
    Kind("reward", "mean reward", r"reward/(\w+)/.*"),
    Kind("length of answers", "tokens", r"(?:completion|thinking)_tokens"),
    Kind("shares", "", r"pass_rate|finished|clip_fraction"),
    Kind("entropy and distance", "nats", r"entropy|kl_reference"),
    Kind("mismatch of sampler and trainer", "nats", r"mismatch.*"),
    Kind("learning rate", "", r"lr", is_exact=True),
    Kind("speed", "tokens per second", r"(?:\w+_)?tokens_per_second"),
    Kind("share of the machine's matmul rate", "", r"share_of_sgemm"),
    Kind("expert load", "largest over mean", r"load.*"),
    Kind("balancing losses", "", r"balance_loss|z_loss"),
    Kind("gradient norm", "", r"grad_norm"),
)
BOOKKEEPING = re.compile(r"step|tokens|loss_weight|(\w+_)?seconds")
"""Figures that are logged for reckoning and make no curve."""


@dataclass
class Panel:
    """Series to draw together: name -> (steps, values)."""

    title: str
    unit: str
    is_exact: bool = False
    series: dict[str, tuple[list[float], list[float]]] = field(default_factory=dict)


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("plot", help="draw the curves of a run", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN", help=f"folder with {METRICS_FILE}, or with such folders")
    parser.add_argument("--out", type=Path, metavar="FILE", help="path of the PNG (default: RUN/curves.png)")


def run(args: argparse.Namespace) -> int:
    """Draw each run of the folder and print the paths."""
    inner = sorted(path.parent for path in args.run_dir.glob(f"*/{METRICS_FILE}"))
    runs = [args.run_dir] if (args.run_dir / METRICS_FILE).is_file() or not inner else inner
    if args.out and args.out.suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: the picture is a PNG, give it a name that ends in .png")
    if args.out and len(runs) > 1:
        raise UserError(f"{args.run_dir} holds {len(runs)} runs; name one of them to use --out")
    for run_dir in runs:
        print(plot_run(run_dir, args.out or run_dir / "curves.png"))
    return 0


def plot_run(run_dir: Path, out: Path) -> Path:
    """Draw the run's metrics into the PNG `out` and return it; no figures at all is a UserError."""
    panels = panels_of(read_metrics(run_dir / METRICS_FILE))
    if not panels:
        raise UserError(f"{run_dir / METRICS_FILE} holds no figures yet; let the run log a step first")
    draw(panels, str(run_dir), out)
    return out


def panels_of(records: Sequence[Mapping[str, float | str]]) -> list[Panel]:
    """Sort the figures of all records into panels, the known kinds first, then one for each other first part."""
    panels: dict[tuple[int, str], Panel] = {}
    for record in records:
        for name, value in record.items():
            if BOOKKEEPING.fullmatch(name) or isinstance(value, str):
                continue
            place, title = place_of(name)
            if (place, title) not in panels:
                kind = KINDS[place] if place < len(KINDS) else Kind("", "", "")
                panels[place, title] = Panel(title, kind.unit, kind.is_exact)
            steps, values = panels[place, title].series.setdefault(name, ([], []))
            steps.append(float(record["step"]))
            values.append(value)
    return [panels[key] for key in sorted(panels, key=lambda key: key[0])]


def place_of(name: str) -> tuple[int, str]:
    """A figure's rank among the kinds, and the title of its panel.

    >>> place_of("loss"), place_of("reward/gcd/0/on")[1], place_of("odd/a")[1]
    ((0, 'loss'), 'reward: gcd', 'odd')
    """
    for place, kind in enumerate(KINDS):
        if match := re.fullmatch(kind.pattern, name):
            return place, ": ".join([kind.title, *match.groups()]).replace("_", " ")
    return len(KINDS), name.split("/")[0].replace("_", " ")


def draw(panels: Sequence[Panel], title: str, out: Path) -> None:
    """Write all panels as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    # A path may hold dollar signs, which would begin a formula.
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color="0.35", parse_math=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_panel(axes, panel)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def draw_panel(axes: Axes, panel: Panel) -> None:
    """One panel: a line for each series, named as briefly as the panel allows."""
    for name, (steps, values) in panel.series.items():
        label = name.split("/", 1)[-1].replace("_", " ")
        is_long = len(values) >= SMOOTH_FROM and not panel.is_exact
        (line,) = axes.plot(
            steps, values, label=None if is_long else label, alpha=0.3 if is_long else 1.0, linewidth=1.2,
            marker="o" if len(values) <= 20 else "", markersize=3,
        )  # fmt: skip
        if is_long:
            axes.plot(steps, running_mean(values), color=line.get_color(), linewidth=1.6, label=label)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(panel.series) > 1:
        axes.legend(fontsize=7, frameon=False, ncols=1 + len(panel.series) // 8)


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean of the values around each one, over a fortieth of the series; NaN values are left out.

    >>> running_mean([1.0, 1.0, 4.0])
    [1.0, 2.0, 2.5]
    """
    half = max(1, len(values) // 80)
    means = []
    for place in range(len(values)):
        near = [value for value in values[max(0, place - half) : place + half + 1] if not math.isnan(value)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
