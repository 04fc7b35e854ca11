"""What a run's directory says, as the page wants it: stages with progress, curves, scores, thinking rates, samples.

Everything here only reads, and takes files as they are while somebody else writes them: a missing, half written or
damaged one is as if it were not there yet. A metrics log is read on from where the last look ended.

    look = RunReader(Path("runs/demo"))
    look.read()     # {"state": "running", "stages": [...], "curves": [...], ...}
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbos.common.config import RECIPE_FILE, parse_yaml
from turbos.common.errors import UserError
from turbos.common.metrics import METRICS_FILE
from turbos.serve.live.plan import PLAN_FILE, Plan, PlannedStage, read_plan_text

CLOCK_FILE, EVAL_FILE, THINKING_FILE, SAMPLES_FILE = "clock.json", "eval.json", "thinking.json", "samples.json"
"""Written by the demo and by `eval`, which a process without torch cannot import; a test compares the names."""

MOST_POINTS = 240
"""Of a curve: more than a screen shows."""


@dataclass(frozen=True)
class CurveKind:
    """Which figures of a stage are drawn together, and their unit; the page has words for all three."""

    stage: str
    title: str
    unit: str
    pattern: str


CURVES = (
    CurveKind("pretrain", "loss", "nats", r"loss"),
    CurveKind("sft", "loss", "nats", r"loss|held_out_loss/\w+"),
    CurveKind("rl", "reward", "share", r"reward"),
    CurveKind("rl", "length", "tokens", r"thinking_tokens|completion_tokens"),
)
TRAINED = tuple(dict.fromkeys(kind.stage for kind in CURVES))


class MetricsTail:
    """The numbers of a metrics log, by name: what was read stays, and only what was added is read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._forget(None)

    def _forget(self, file: int | None) -> None:
        self._file, self._offset = file, 0
        self.step = 0
        self.series: dict[str, list[tuple[int, float]]] = {}

    def read(self) -> None:
        """Look at the file again. One that was replaced (a run that goes on from a checkpoint) is read anew."""
        try:
            with self.path.open("rb") as file:
                status = self.path.stat()
                if status.st_ino != self._file or status.st_size < self._offset:
                    self._forget(status.st_ino)
                file.seek(self._offset)
                # A line without its end is still being written.
                whole = file.read().rpartition(b"\n")[0:2]
        except OSError:
            self._forget(None)
            return
        added = b"".join(whole)
        self._offset += len(added)
        for line in added.splitlines():
            self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            step = record.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return
        if type(step) is not int:
            return
        self.step = max(self.step, step)
        for name, value in record.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                self.series.setdefault(name, []).append((step, value))

    def last(self, name: str) -> float | None:
        """The last value of a figure."""
        points = self.series.get(name)
        return points[-1][1] if points else None


class RunReader:
    """Reads one run's directory, again and again; `model` tells the page that the model itself is served beside it."""

    def __init__(self, run_dir: Path, model: str | None = None) -> None:
        self.run_dir, self.model = run_dir, model
        self._recipes: dict[str, Mapping[str, object]] = {}
        self._tails = {name: MetricsTail(run_dir / name / METRICS_FILE) for name in TRAINED}

    def read(self, now: float | None = None) -> dict[str, object]:
        """All that the page shows, as JSON has it."""
        now = time.time() if now is None else now
        plan = read_plan_text(read_text(self.run_dir / PLAN_FILE)) or Plan(0)
        clock = numbers_of(read_json(self.run_dir / CLOCK_FILE))
        for tail in self._tails.values():
            tail.read()
        stages = [self._stage(stage, clock.get(stage.name, 0.0), now) for stage in plan.stages]
        return {
            "run": str(self.run_dir),
            "seed": plan.seed,
            "model": self.model,
            "state": state_of(plan),
            "seconds": sum(stage["seconds"] for stage in stages),
            "seconds_left": sum(stage["seconds_left"] for stage in stages),
            "stages": stages,
            "trained": list(self._trained()),
            "families": self._families(),
            "curves": [self._curve(kind) for kind in CURVES],
            "scores": self._lists(EVAL_FILE, "scores"),
            "thinking": self._lists(THINKING_FILE, "rates"),
            "samples": self._lists(SAMPLES_FILE, "samples"),
        }

    def _stage(self, stage: PlannedStage, before: float, now: float) -> dict[str, Any]:
        tail, steps = self._tails.get(stage.name), self._steps(stage.name)
        share = None
        if stage.state == "done":
            share = 1.0
        elif tail is not None and steps:
            share = min(1.0, tail.step / steps)
        seconds = before
        if stage.state == "running" and stage.since is not None:
            seconds += max(0.0, now - stage.since)
        return {
            "name": stage.name,
            "state": stage.state,
            "minutes": stage.minutes,
            "seconds": round(seconds, 1),
            "seconds_left": 0.0
            if stage.state == "done"
            else round(seconds_left(60 * stage.minutes, seconds, share), 1),
            "share": share,
            "step": tail.step if tail is not None else None,
            "steps": steps,
        }

    def _recipe(self, name: str) -> Mapping[str, object]:
        """What a stage was told to do; empty until it begins. A recipe that was read does not change any more."""
        if name not in self._recipes:
            try:
                recipe = parse_yaml(read_text(self.run_dir / name / RECIPE_FILE), RECIPE_FILE)
            except UserError:
                return {}
            if not recipe:
                return {}
            self._recipes[name] = recipe
        return self._recipes[name]

    def _steps(self, name: str) -> int | None:
        """How many steps a stage trains, once its recipe is there."""
        train = self._recipe(name).get("train") if name in self._tails else None
        steps = train.get("steps") if isinstance(train, Mapping) else None
        return steps if isinstance(steps, int) and steps > 0 else None

    def _trained(self) -> Sequence[str]:
        """The families, with or without a level, that fine-tuning draws from."""
        problems = self._recipe("sft").get("problems")
        families = problems.get("families") if isinstance(problems, Mapping) else None
        return [str(name) for name in families] if isinstance(families, Mapping) else []

    def _families(self) -> Sequence[str]:
        """What the demo measures, in its order."""
        families = self._recipe(".").get("families")
        return [str(name) for name in families] if isinstance(families, list) else []

    def _curve(self, kind: CurveKind) -> dict[str, object]:
        series = self._tails[kind.stage].series
        names = [name for name in series if re.fullmatch(kind.pattern, name)]
        return {
            "stage": kind.stage,
            "title": kind.title,
            "unit": kind.unit,
            "steps": self._steps(kind.stage),
            "series": [{"name": name, "points": thinned(series[name])} for name in names],
        }

    def _lists(self, file: str, key: str) -> dict[str, list[object]]:
        """A list that is written after each stage, by stage."""
        found = {}
        for name in TRAINED:
            values = read_json(self.run_dir / name / file)
            listed = values.get(key) if isinstance(values, dict) else None
            if isinstance(listed, list):
                found[name] = listed
        return found


def state_of(plan: Plan) -> str:
    """`waiting` before anything has begun, `done` after the last stage, else `running`.

    >>> state_of(Plan(0)), state_of(Plan(0, (PlannedStage("fetch", 1.0, "done"),)))
    ('waiting', 'done')
    """
    states = {stage.state for stage in plan.stages}
    if not states or states == {"waiting"}:
        return "waiting"
    return "done" if states == {"done"} else "running"


def seconds_left(expected: float, seconds: float, share: float | None) -> float:
    """What a stage still takes: from its own pace once that can be told, before that what was expected of it.

    >>> seconds_left(120.0, 30.0, None), seconds_left(120.0, 30.0, 0.5)
    (90.0, 30.0)
    """
    if share and share >= 0.05 and seconds > 0:
        return seconds * (1 - share) / share
    return max(0.0, expected - seconds)


def thinned(points: Sequence[tuple[int, float]], most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means of neighbours, the last point as it is.

    >>> thinned([(1, 4.0), (2, 2.0), (3, 1.0), (4, 3.0), (5, 2.0)], most=3)
    [(1.5, 3.0), (3.5, 2.0), (5, 2.0)]
    """
    if len(points) <= most:
        return [(step, round(value, 5)) for step, value in points]
    width = math.ceil((len(points) - 1) / (most - 1))
    bins = [points[start : start + width] for start in range(0, len(points) - 1, width)]
    means = [(mean([step for step, _ in part]), round(mean([value for _, value in part]), 5)) for part in bins]
    return [*means, (points[-1][0], round(points[-1][1], 5))]


def mean(values: Sequence[float]) -> float:
    """Mean of some numbers, at least one."""
    return sum(values) / len(values)


def numbers_of(value: object) -> dict[str, float]:
    """The numbers of a mapping; nothing where it is none."""
    pairs = value.items() if isinstance(value, dict) else ()
    return {str(key): float(number) for key, number in pairs if isinstance(number, int | float)}


def read_text(path: Path) -> str:
    """A file's text, empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> Any:
    """What a JSON file holds, its numbers that are not finite as None; None where there is none or it is damaged."""
    try:
        return json.loads(read_text(path), parse_constant=lambda name: None)
    except (ValueError, RecursionError):
        return None
