"""The plan of a run, which the demo writes and the live page reads: stages in order, and which of them runs.

>>> plan = Plan(seed=0, stages=(PlannedStage("fetch", 0.2, "done"), PlannedStage("pretrain", 2.5, "running", 1e9)))
>>> read_plan_text(plan_text(plan)) == plan
True
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

PLAN_FILE = "plan.json"
StageState = Literal["waiting", "running", "done"]


@dataclass(frozen=True)
class PlannedStage:
    """A stage, the minutes to expect of it, and the Unix time at which it began, where it runs."""

    name: str
    minutes: float
    state: StageState = "waiting"
    since: float | None = None


@dataclass(frozen=True)
class Plan:
    """All stages of a run, in order."""

    seed: int
    stages: tuple[PlannedStage, ...] = ()


def plan_text(plan: Plan) -> str:
    """A plan as JSON."""
    return json.dumps(asdict(plan)) + "\n"


def read_plan_text(text: str) -> Plan | None:
    """A plan from its JSON; None where it is none."""
    try:
        found = json.loads(text)
        stages = [PlannedStage(**stage) for stage in found["stages"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    is_sound = all(
        isinstance(stage.name, str)
        and isinstance(stage.minutes, int | float)
        and isinstance(stage.since, int | float | None)
        and stage.state in get_args(StageState)
        for stage in stages
    )
    return Plan(found.get("seed", 0), tuple(stages)) if is_sound else None


def write_plan(plan: Plan, run_dir: Path) -> None:
    """Write a plan whole or not at all."""
    partial = run_dir / f"{PLAN_FILE}.partial"
    partial.write_text(plan_text(plan), encoding="utf-8")
    partial.replace(run_dir / PLAN_FILE)
