"""`turbos demo`: the whole life of a small reasoning model, from text to a table of what each stage brought.

fetch -> tokenizer -> pretrain -> SFT -> RL, with an evaluation on held-out problems after each of the three, then
curves, samples and the table. The stages and their expected minutes are printed first, and the address of a page that
shows them as they go. A stage whose output is complete is skipped, so that Ctrl-C and the same command again go on. On
a terminal (or with SERVE=1) the model is served at the end, at the same address. The work is done elsewhere; here it is
put in order.

    turbos demo                      # runs/demo, about 11 minutes on 2 cores
    turbos demo --run runs/two --seed 2 --json
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.cli.demo_page import page_socket, serve_final, wants_server, watched
from turbos.cli.stages import load_stage, use_threads
from turbos.cli.terminal import printable
from turbos.common.config import load_recipe
from turbos.common.errors import UserError
from turbos.serve.live.plan import Plan, PlannedStage, write_plan

if TYPE_CHECKING:
    from rich.console import Console

    from turbos.eval.report import StageScores
    from turbos.eval.samples import ShownProblem
    from turbos.train.pretrain import PretrainRecipe

TRAINED = ("pretrain", "sft", "rl")
CLOCK_FILE, OUTCOME_FILE = "clock.json", "demo.json"
TABLE_FILE, CHART_FILE, SAMPLES_FILE = "table.md", "scores.png", "samples.md"


@dataclass(frozen=True)
class DemoRecipe:
    """Which recipes the stages take (names or paths), what is evaluated, and minutes to expect of each stage.

    `families` are evaluated (`gcd/0`: family and level), `num_problems` of each in each mode; the first `samples` of
    them are shown with a problem each.
    """

    families: list[str]
    pretrain: str = "demo"
    sft: str = "demo"
    rl: str = "demo"
    seed: int = 0
    num_problems: int = 128
    max_new_tokens: int = 192
    samples: int = 3
    minutes: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """A stage: what it is called, whether its output is complete, and the work."""

    name: str
    is_done: Callable[[], bool]
    work: Callable[[], object]


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "demo",
        help="the whole life of a small reasoning model, from text to a table",
        allow_abbrev=False,
        description="Train a small reasoning model from text to RL. The same command resumes a demo that was stopped.",
    )
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--recipe", default="demo", metavar="RECIPE", help="name of a recipe, or path of a YAML file")
    parser.add_argument("--seed", type=int, help="seed of all stages (default: the recipe's, 0)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--port", type=int, metavar="N", help="of the page, on this machine only (default: a free one)")
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Print the plan, do what is not done yet, show samples and the table."""
    from rich.console import Console

    from turbos.train.loop import open_run, sole_owner

    recipe = load_recipe(DemoRecipe, "demo", args.recipe, [] if args.seed is None else [f"--seed={args.seed}"])
    if args.json and args.port is not None:
        raise UserError("--port is for the page, which --json goes without: leave one of them out")
    console = Console(file=sys.stderr)
    demo = Demo(recipe, args.run, console)
    use_threads(args.threads)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    with contextlib.ExitStack() as stack:
        listening = None
        with contextlib.redirect_stdout(sys.stderr), sole_owner(args.run):
            demo.check()
            open_run(recipe, args.run)
            serves = not args.json and wants_server()
            if not args.json and (serves or not demo.is_done()):
                listening = page_socket(args.port, tell)
            if listening is not None:
                stack.enter_context(listening)
            with watched(args.run, listening):
                demo.run()
        if args.json:
            print((args.run / OUTCOME_FILE).read_text(encoding="utf-8").strip())
        else:
            demo.show(Console())
        if serves and listening is not None:
            serve_final(args.run, listening, tell)
    return 0


class Demo:
    """One demo in one run directory; every output lies there."""

    def __init__(self, recipe: DemoRecipe, run_dir: Path, console: Console) -> None:
        self.recipe, self.run_dir, self.console = recipe, run_dir, console

    def check(self) -> None:
        """Refuse, before anything is written, what would only fail or be passed over minutes later.

        That is an unknown family or stage, a stage's recipe that cannot be, and one that is not the recipe of what has
        been trained already.
        """
        from turbos.eval.problems import parse_family
        from turbos.train.loop import has_begun, require_same_recipe

        for family in self.recipe.families:
            parse_family(family)
        known = [stage.name for stage in self.stages()]
        unknown = sorted(self.recipe.minutes.keys() - set(known))
        if unknown:
            raise UserError(
                f"demo recipe: minutes for unknown stages {', '.join(unknown)}; stages are {', '.join(known)}"
            )
        for name in TRAINED:
            recipe = self._stage_recipe(name)
            if has_begun(self.run_dir / name):
                require_same_recipe(recipe, self.run_dir / name)

    def run(self) -> None:
        """Do every stage that is not complete, in order, and keep the time it took."""
        stages = self.stages()
        self._print_plan(stages)
        for place, stage in enumerate(stages):
            if not stage.is_done():
                self.console.print(f"[bold]{stage.name}[/bold]", highlight=False)
                self._keep_plan(stages, place)
                with self._timed(stage.name):
                    stage.work()
        self._keep_plan(stages, len(stages))
        # Last, and every time, because only here all the times are known.
        self._write_outcome()

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return all(stage.is_done() for stage in self.stages())

    def stages(self) -> list[Stage]:
        """All stages in order. The tokenizer and its texts are wanted only until pretraining is over."""
        tokenizer = self.run_dir / "pretrain" / "tokenizer"
        stages = [
            Stage("fetch", lambda: self._trained("pretrain"), self._fetch),
            Stage("tokenizer", lambda: self._trained("pretrain") or tokenizer.is_dir(), self._tokenizer),
        ]
        for name in TRAINED:
            stages.append(self._training(name))
            stages.append(self._evaluation(name))
        report = [self.run_dir / name for name in (TABLE_FILE, CHART_FILE, SAMPLES_FILE, "final")]
        return [*stages, Stage("report", lambda: all(path.exists() for path in report), self._report)]

    def show(self, console: Console) -> None:
        """Samples, the table, and where everything lies."""
        from turbos.eval.report import rich_table

        console.print((self.run_dir / SAMPLES_FILE).read_text(encoding="utf-8"), markup=False, highlight=False)
        console.print(rich_table(self.scores()))
        seconds = sum(self._clock().values())
        where = f"{self.run_dir / 'final'} (checkpoint), {CHART_FILE}, {TABLE_FILE}, */curves.png"
        console.print(f"{seconds / 60:.1f} minutes in all. See {where}", markup=False, highlight=False, soft_wrap=True)

    def scores(self) -> list[StageScores]:
        """What was measured after each training stage."""
        from turbos.eval.problems import EVAL_FILE, load_scores
        from turbos.eval.report import StageScores

        return [StageScores(name, tuple(load_scores(self.run_dir / name / EVAL_FILE))) for name in TRAINED]

    def _trained(self, name: str) -> bool:
        return (self.run_dir / name / "final").is_dir()

    @cached_property
    def _pretrain_recipe(self) -> PretrainRecipe:
        recipe: PretrainRecipe = self._stage_recipe("pretrain")
        return recipe

    def _stage_recipe(self, name: str) -> Any:
        """A training stage's recipe with the demo's seed, starting from the stage before it."""
        overrides = [f"--train.seed={self.recipe.seed}"]
        place = TRAINED.index(name)
        if place:
            overrides.append(f"--init={self.run_dir / TRAINED[place - 1] / 'final'}")
        source = {"pretrain": self.recipe.pretrain, "sft": self.recipe.sft, "rl": self.recipe.rl}[name]
        return load_recipe(load_stage(name).recipe, name, source, overrides)

    def _fetch(self) -> None:
        from turbos.data.sources import fetch

        data = self._pretrain_recipe.data
        fetch(list(data.sources), data.cache_dir)

    def _tokenizer(self) -> None:
        from turbos.train.pretrain import prepare_tokenizer

        prepare_tokenizer(self._pretrain_recipe, self.run_dir / "pretrain" / "tokenizer")

    def _training(self, name: str) -> Stage:
        def work() -> None:
            load_stage(name).train(self._stage_recipe(name), self.run_dir / name)

        return Stage(name, lambda: self._trained(name), work)

    def _evaluation(self, name: str) -> Stage:
        from turbos.eval.problems import EVAL_FILE, evaluate, parse_family, save_scores
        from turbos.eval.samples import SAMPLES_FILE as SHOWN_FILE
        from turbos.eval.samples import sample_answers, save_samples
        from turbos.eval.thinking import THINKING_FILE, save_rates, thinking_rates
        from turbos.model.checkpoint import load_model
        from turbos.text.tokenizer import Tokenizer

        recipe, run_dir = self.recipe, self.run_dir / name

        def work() -> None:
            families = [parse_family(family) for family in recipe.families]
            model, tokenizer = load_model(run_dir / "final"), Tokenizer.load(run_dir / "final")
            # The quick ones first: the page shows them meanwhile.
            names, limit = [family for family, _ in families], recipe.max_new_tokens
            rates = thinking_rates(model, tokenizer, names, max_new_tokens=limit)
            save_rates(rates, run_dir / THINKING_FILE)
            shown = sample_answers(model, tokenizer, families[: recipe.samples], limit)
            save_samples(shown, run_dir / SHOWN_FILE)
            scores = evaluate(model, tokenizer, families, recipe.num_problems, max_new_tokens=limit)
            save_scores(scores, run_dir / EVAL_FILE)

        paths = [run_dir / file for file in (THINKING_FILE, SHOWN_FILE, EVAL_FILE)]
        return Stage(f"evaluate {name}", lambda: all(path.is_file() for path in paths), work)

    def _report(self) -> None:
        from turbos.cli.plot import plot_run
        from turbos.eval.report import markdown_table, plot_scores
        from turbos.train.checkpoint import write_whole

        for name in TRAINED:
            plot_run(self.run_dir / name, self.run_dir / name / "curves.png")
        plot_scores(self.scores(), self.run_dir / CHART_FILE)
        (self.run_dir / TABLE_FILE).write_text(markdown_table(self.scores()), encoding="utf-8")
        (self.run_dir / SAMPLES_FILE).write_text(self._samples(), encoding="utf-8")
        write_whole(self.run_dir / "final", self._copy_final)

    def _copy_final(self, place: Path) -> None:
        from turbos.eval.report import markdown_table
        from turbos.model.card import EVALUATION, set_section

        shutil.copytree(self.run_dir / "rl" / "final", place, dirs_exist_ok=True)
        command = f"Measured by `turbos demo --seed {self.recipe.seed}`, stage by stage."
        set_section(place, EVALUATION, f"{markdown_table(self.scores())}\n{command}")

    def _samples(self) -> str:
        """What the last model answers to a held-out problem of each of the first families."""
        from turbos.eval.samples import SAMPLES_FILE as SHOWN_FILE
        from turbos.eval.samples import load_samples

        return "\n".join(sample_text(shown) for shown in load_samples(self.run_dir / "rl" / SHOWN_FILE))

    def _print_plan(self, stages: list[Stage]) -> None:
        minutes = self.recipe.minutes
        left = sum(minutes.get(stage.name, 0.0) for stage in stages if not stage.is_done())
        self.console.print(
            f"TurboS demo in {self.run_dir}, seed {self.recipe.seed}: about {left:.0f} minutes to go on 2 cores.\n"
            "Ctrl-C stops it, the same command goes on.",
            markup=False,
            highlight=False,
        )
        for stage in stages:
            expected = "done" if stage.is_done() else f"{minutes.get(stage.name, 0.0):4.1f} min"
            self.console.print(f"  {stage.name:<18} {expected}", markup=False, highlight=False)

    def _keep_plan(self, stages: Sequence[Stage], running: int) -> None:
        """Note for the page which stage runs. Those before it are done, whatever of theirs is wanted no more."""
        now, planned = time.time(), []
        for place, stage in enumerate(stages):
            minutes = self.recipe.minutes.get(stage.name, 0.0)
            if place == running:
                planned.append(PlannedStage(stage.name, minutes, "running", now))
            else:
                is_done = place < running or stage.is_done()
                planned.append(PlannedStage(stage.name, minutes, "done" if is_done else "waiting"))
        write_plan(Plan(self.recipe.seed, tuple(planned)), self.run_dir)

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add the wall time to what the stage has taken before, also where it is stopped half way."""
        started = time.perf_counter()
        try:
            yield
        finally:
            clock = self._clock()
            seconds = clock.get(name, 0.0) + time.perf_counter() - started
            write_json(self.run_dir / CLOCK_FILE, {**clock, name: round(seconds, 2)})

    def _clock(self) -> dict[str, float]:
        path = self.run_dir / CLOCK_FILE
        clock: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return clock

    def _rates(self, name: str) -> list[dict[str, object]]:
        from turbos.eval.thinking import THINKING_FILE, load_rates

        return [dataclasses.asdict(rate) for rate in load_rates(self.run_dir / name / THINKING_FILE)]

    def _write_outcome(self) -> None:
        """All figures of the demo in one file."""
        import torch

        from turbos.common.machine import describe_machine

        clock = self._clock()
        outcome = {
            "seed": self.recipe.seed,
            "machine": dataclasses.asdict(describe_machine()),
            "threads": torch.get_num_threads(),
            "final": str(self.run_dir / "final"),
            "total_seconds": round(sum(clock.values()), 2),
            "seconds": clock,
            "thinking_rates": {name: self._rates(name) for name in TRAINED},
            "scores": {stage.stage: [dataclasses.asdict(score) for score in stage.scores] for stage in self.scores()},
        }
        write_json(self.run_dir / OUTCOME_FILE, outcome)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value) + "\n", encoding="utf-8")
    partial.replace(path)


def sample_text(shown: ShownProblem) -> str:
    """A question and its answers in plain text."""
    lines = [f"{shown.question}   (right: {shown.right})"]
    for answer in shown.answers:
        mark = "right" if answer.verdict == "pass" else "wrong"
        thinking = f"<think>{printable(answer.thinking)}</think> " if answer.mode == "on" else ""
        lines.append(f"  thinking {answer.mode:<3}  {thinking}{printable(answer.content)}   [{mark}]")
    return "\n".join(lines) + "\n"
