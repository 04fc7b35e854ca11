"""`turbos bench twins`: attention-only, Mamba-only and a hybrid of equal active size, from equal data in equal order.

Text and recall are learnt in the same runs (`twins_data`), then measured (`twins_measure`), and what each costs at
growing lengths (`twins_cost`). Runs go two at a time, one thread each. Every figure is kept in the directory as soon as
it is there, and the same command goes on from what it finds. It is no comparison of trained models of any use: a
million parameters and tokens show what a mixer can learn at once, not what it can learn.

    results = bench_twins(Plan(), seeds=(0, 1, 2), directory=Path("runs/twins"))
    twins_result(results)       # bench.twins_table: the table;  bench.twins_chart.draw_twins: the picture
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from turbos.bench.twins_cost import Cost, read_cost
from turbos.bench.twins_data import prepare
from turbos.bench.twins_plan import QUICK, TWINS, Plan, Twin, require_equal_sizes
from turbos.bench.twins_run import TwinFigures, read_figures, run_place, write_json
from turbos.common.config import plain_values
from turbos.common.errors import UserError
from turbos.common.machine import usable_cores
from turbos.common.metrics import METRICS_FILE, read_metrics
from turbos.train.loop import sole_owner, stop_requests

PLAN_FILE = "plan.json"
POLL_SECONDS = 1.0
TOGETHER = 2
"""Runs at a time, if there are so many cores."""


@dataclass(frozen=True)
class Results:
    """All that was measured; `figures` of every twin and seed, `costs` of every twin and length."""

    plan: Plan
    seeds: tuple[int, ...]
    figures: tuple[TwinFigures, ...]
    costs: tuple[Cost, ...]

    @property
    def is_quick(self) -> bool:
        """Whether it only shows that everything runs."""
        return self.plan == QUICK


@dataclass
class Job:
    """A run of one twin from one seed, on its way."""

    twin: Twin
    seed: int
    process: subprocess.Popen[bytes]
    bar: TaskID


def bench_twins(plan: Plan, seeds: Sequence[int], directory: Path) -> Results:
    """Measure what is not measured yet in the directory, and return everything.

    The directory belongs to one plan: another is refused. Ctrl-C lets running steps end, saves them and goes on up.
    """
    require_equal_sizes()
    if len(set(seeds)) < max(1, len(seeds)):
        raise UserError("bench twins: name each seed once, and at least one")
    with sole_owner(directory):
        keep_plan(plan, directory)
        prepare(directory, plan)
        train_all(plan, seeds, directory)
        measure_costs(plan, directory)
    return read_results(directory, seeds)


def keep_plan(plan: Plan, directory: Path) -> None:
    """Write the plan into a fresh directory; UserError where another one is there."""
    path, wanted = directory / PLAN_FILE, json.loads(json.dumps(plain_values(plan)))
    if not path.is_file():
        write_json(path, wanted)
    elif (kept := json.loads(path.read_text(encoding="utf-8"))) != wanted:
        changed = ", ".join(sorted(key for key in kept.keys() | wanted.keys() if kept.get(key) != wanted.get(key)))
        raise UserError(f"{directory} belongs to another plan, differing in {changed}: name another with --dir")


def read_plan(directory: Path) -> Plan:
    """Which of the two plans a directory belongs to; UserError where it is neither."""
    path = directory / PLAN_FILE
    if not path.is_file():
        raise UserError(f"no {path}: run `turbos bench twins --dir {directory}` first")
    kept = json.loads(path.read_text(encoding="utf-8"))
    for plan in (Plan(), QUICK):
        if json.loads(json.dumps(plain_values(plan))) == kept:
            return plan
    raise UserError(f"{path} is the plan of another version: run the bench again in another directory")


def read_results(directory: Path, seeds: Sequence[int]) -> Results:
    """What lies in a directory for these seeds (none named: for all there are); UserError where a part is missing."""
    plan = read_plan(directory)
    if not seeds:
        found = {path.stem.rpartition("seed")[2] for path in (directory / "runs").glob("*-seed*.json")}
        seeds = sorted(int(number) for number in found)
    places = [run_place(directory, twin, seed).with_suffix(".json") for seed in seeds for twin in TWINS]
    costs = [_cost_place(directory, twin, length) for twin in TWINS for length in plan.cost_lengths]
    missing = [path for path in (*places, *costs) if not path.is_file()]
    if missing or not seeds:
        raise UserError(f"{directory} lacks {missing[0] if missing else 'runs'}: let `turbos bench twins` end first")
    return Results(plan, tuple(seeds), tuple(map(read_figures, places)), tuple(map(read_cost, costs)))


def train_all(plan: Plan, seeds: Sequence[int], directory: Path) -> None:
    """Run every twin from every seed that has no figures yet, `TOGETHER` at a time."""
    wanted = [
        (twin, seed)
        for seed in seeds
        for twin in TWINS
        if not run_place(directory, twin, seed).with_suffix(".json").is_file()
    ]
    if not wanted:
        return
    together = min(TOGETHER, usable_cores())
    _say(f"{len(wanted)} runs of {plan.tokens:,} tokens, {together} at a time, in {directory}")
    jobs: list[Job] = []
    with stop_requests() as stop, _progress() as progress, _ended_with(jobs):
        while wanted or jobs:
            if stop.is_set():
                _say(f"stopped; the same command goes on in {directory}")
                raise KeyboardInterrupt
            while wanted and len(jobs) < together:
                jobs.append(_start(*wanted.pop(0), plan, directory, progress))
            time.sleep(POLL_SECONDS)
            for job in list(jobs):
                _look_after(job, jobs, directory, progress)


def _start(twin: Twin, seed: int, plan: Plan, directory: Path, progress: Progress) -> Job:
    """A process of its own: one thread, its messages in a file beside its directory."""
    command = [sys.executable, "-m", "turbos.bench.twins_run", str(directory), twin.name, str(seed)]
    place = run_place(directory, twin, seed)
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [*command, "--quick"] if plan == QUICK else command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # In a group of its own: Ctrl-C reaches it once, through `_ended_with`; twice would mean without saving.
            process_group=0,
        )
    return Job(twin, seed, process, progress.add_task(f"{twin.title}, seed {seed}", total=plan.steps))


def _look_after(job: Job, jobs: list[Job], directory: Path, progress: Progress) -> None:
    """Show how far a job is; take it off the list when it has ended, and fail where it has failed."""
    place = run_place(directory, job.twin, job.seed)
    metrics = place / METRICS_FILE
    if progress.live.is_started and metrics.is_file():
        progress.update(job.bar, completed=float((read_metrics(metrics) or [{"step": 0}])[-1]["step"]))
    code = job.process.poll()
    if code is None:
        return
    jobs.remove(job)
    progress.remove_task(job.bar)
    if code:
        lines = place.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
        raise UserError(f"{job.twin.title}, seed {job.seed} ended with code {code}: {lines[-1] if lines else ''}")
    figures = read_figures(place.with_suffix(".json"))
    abilities = figures.abilities
    _say(
        f"{job.twin.title}, seed {job.seed}: {abilities.mean_bits:.4f} bits per byte, {abilities.mean_recall:.1%} "
        f"recall, {figures.tokens / figures.seconds:,.0f} tok/s on one thread"
    )


@contextmanager
def _ended_with(jobs: list[Job]) -> Iterator[None]:
    """However the block ends, the jobs are asked to save and stop, and waited for."""
    try:
        yield
    finally:
        for job in jobs:
            job.process.send_signal(signal.SIGINT)
        for job in jobs:
            job.process.wait()


@contextmanager
def _progress() -> Iterator[Progress]:
    """Bars on a terminal; nothing elsewhere, where each run's last line is enough."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console)
    if not console.is_terminal:
        yield progress
        return
    with progress:
        yield progress


def measure_costs(plan: Plan, directory: Path) -> None:
    """Measure the costs that are not there yet, alone on the machine, with torch's threads."""
    for length in plan.cost_lengths:
        for twin in TWINS:
            if not (place := _cost_place(directory, twin, length)).is_file():
                _say(f"cost of {twin.title} at {length} tokens, {torch.get_num_threads()} threads")
                command = [sys.executable, "-m", "turbos.bench.twins_cost", twin.name, str(length)]
                env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
                told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
                write_json(place, asdict(Cost(**json.loads(told.stdout))))


def _cost_place(directory: Path, twin: Twin, length: int) -> Path:
    return directory / "costs" / f"{twin.name}-{length}.json"


def _say(line: str) -> None:
    print(f"bench twins: {line}", file=sys.stderr, flush=True)
