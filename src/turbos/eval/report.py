"""The one table and the one chart of an evaluation: what each stage brought to each family, thinking off and on.

It only shows scores that `eval.problems` measured. Accuracy is in percent with its standard error (Wilson, z = 1);
thinking tokens are means over all answers, unfinished ones included.

    stages = [StageScores("pretrain", scores_a), StageScores("sft", scores_b)]
    Console().print(rich_table(stages)); Path("table.md").write_text(markdown_table(stages)); plot_scores(stages, path)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from turbos.common.errors import UserError
from turbos.eval.problems import FamilyScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Held-out accuracy, % ± standard error · mean thinking tokens"
MODE_STYLE = {
    "off": ("tab:gray", "--", "thinking off"),
    "on": ("tab:blue", "-", "thinking on"),
    "auto": ("tab:green", ":", "auto"),
}
MOST_COLUMNS = 4
PANEL_INCHES = (3.1, 2.7)


@dataclass(frozen=True)
class StageScores:
    """All scores measured after one stage."""

    stage: str
    scores: tuple[FamilyScore, ...]


@dataclass(frozen=True)
class Row:
    """One family, level and mode over the stages; None where a stage was not measured."""

    family: str
    level: int
    mode: str
    scores: tuple[FamilyScore | None, ...]

    @property
    def name(self) -> str:
        """`gcd/0`."""
        return f"{self.family}/{self.level}"


def rows_of(stages: Sequence[StageScores]) -> list[Row]:
    """Rows in the order in which families were first measured, the modes of a family together."""
    measured: dict[tuple[str, int, str], dict[str, FamilyScore]] = {}
    for stage in stages:
        for score in stage.scores:
            measured.setdefault((score.family, score.level, score.mode), {})[stage.stage] = score
    families = list(dict.fromkeys(key[:2] for key in measured))
    keys = sorted(measured, key=lambda key: families.index(key[:2]))
    return [Row(*key, tuple(measured[key].get(stage.stage) for stage in stages)) for key in keys]


def cells_of(stages: Sequence[StageScores]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table as text; the last line of each mode averages over the families."""
    head = ["problems", "thinking", *(stage.stage for stage in stages)]
    rows = rows_of(stages)
    lines = [[row.name, row.mode, *map(_cell, row.scores)] for row in rows]
    for mode in dict.fromkeys(row.mode for row in rows):
        members = [row for row in rows if row.mode == mode]
        means = [_mean_accuracy([row.scores[place] for row in members]) for place in range(len(stages))]
        lines.append(["mean", mode, *means])
    return head, lines


def _cell(score: FamilyScore | None) -> str:
    if score is None:
        return ""
    accuracy = f"{100 * score.accuracy:.1f} ± {100 * score.stderr:.1f}"
    return accuracy if score.mode == "off" else f"{accuracy} · {score.thinking_tokens:.0f}"


def _mean_accuracy(scores: Sequence[FamilyScore | None]) -> str:
    found = [score for score in scores if score is not None]
    if not found:
        return ""
    mean = sum(score.accuracy for score in found) / len(found)
    stderr = math.sqrt(sum(score.stderr**2 for score in found)) / len(found)
    return f"{100 * mean:.1f} ± {100 * stderr:.1f}"


def rich_table(stages: Sequence[StageScores]) -> Table:
    """The table for a terminal; families are set apart by a rule."""
    head, lines = cells_of(stages)
    table = Table(title=TITLE, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for place, text in enumerate(head):
        table.add_column(text, justify="left" if place < 2 else "right", no_wrap=True)
    for line, following in zip(lines, [*lines[1:], None], strict=True):
        table.add_row(*line, end_section=following is not None and following[0] != line[0])
    return table


def markdown_table(stages: Sequence[StageScores]) -> str:
    """The table for a document, its legend below it."""
    head, lines = cells_of(stages)
    rule = ["---" if place < 2 else "---:" for place in range(len(head))]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines]) + f"\n\n{TITLE}\n"


def plot_scores(stages: Sequence[StageScores], out: Path) -> Path:
    """Write a PNG with a panel for each family: accuracy after each stage, a line for each mode; returns `out`."""
    rows = rows_of(stages)
    if not rows:
        raise UserError("there are no scores to draw: evaluate at least one stage first")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row.name for row in rows))
    lines = math.ceil(len(names) / MOST_COLUMNS)
    columns = math.ceil(len(names) / lines)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * lines + 0.7)
    figure, grid = pyplot.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained", sharey=True)
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    for axes, name in zip(grid.flat, names, strict=False):
        _draw_family(axes, name, [row for row in rows if row.name == name], [stage.stage for stage in stages])
    for line in grid:
        line[0].set_ylabel("accuracy, %")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle("Held-out accuracy after each stage", x=0.01, ha="left", fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)
    return out


def _draw_family(axes: Axes, name: str, rows: Sequence[Row], stages: Sequence[str]) -> None:
    for row in rows:
        color, style, label = MODE_STYLE[row.mode]
        found = [(place, score) for place, score in enumerate(row.scores) if score is not None]
        places = [place for place, _ in found]
        percent = [100 * score.accuracy for _, score in found]
        errors = [100 * score.stderr for _, score in found]
        axes.errorbar(
            places, percent, errors, color=color, linestyle=style, marker="o", markersize=4, capsize=3, label=label
        )
        # Number by the last point, so that the chart can be read without the table.
        axes.annotate(
            f"{percent[-1]:.0f}",
            (places[-1], percent[-1]),
            (7, -3),
            textcoords="offset points",
            fontsize=8,
            color=color,
        )
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
    axes.set_xticks(range(len(stages)), stages, fontsize=9)
    axes.set_xlim(-0.3, len(stages) - 0.6)
    axes.set_ylim(-4, 104)
    axes.tick_params(axis="y", labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
