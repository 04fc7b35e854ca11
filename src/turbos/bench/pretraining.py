"""Experiments of pretraining whose results stand in docs: shares of English, Muon against AdamW, curves, tokenising.

Each is a row of runs that differ in one thing. A run lies in a directory below `--out`, goes on where it was stopped
and is not run twice; tokenizer and shards are shared by all. The last run writes the result file.

    python -m turbos.bench.pretraining shares --out runs/shares
    python -m turbos.bench.pretraining optimizers --out runs/optimizers
    python -m turbos.bench.pretraining curve runs/pretrain-laptop --name laptop
    python -m turbos.bench.pretraining tokenise
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbos.bench.collect import provenance
from turbos.bench.tables import Cell, Result, write_result
from turbos.common.config import load_recipe
from turbos.common.errors import UserError
from turbos.common.machine import keep_freed_memory, set_threads
from turbos.common.metrics import METRICS_FILE, read_metrics
from turbos.data.mixture import CHINESE, ENGLISH, languages_of
from turbos.data.shards import write_shard
from turbos.data.sources import documents
from turbos.text.tokenizer import Tokenizer
from turbos.train.loop import sole_owner
from turbos.train.pretrain import PretrainRecipe, prepare_tokenizer, pretrain

MODULE = "python -m turbos.bench.pretraining"
SHARES = (0.3, 0.5, 0.7)
FRACTIONS = (0.5, 0.625, 0.75, 1.0)
"""Of AdamW's steps, for Muon: each its own whole run, because a rate that has not fallen yet hides what was learnt."""
CURVE_POINTS = 12
TOKENISE_CHARACTERS, TOKENISE_ROUNDS = 6_000_000, 3


@dataclass(frozen=True)
class Case:
    """A run: its directory's name, and the overrides that tell it from the others."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """What a run came to: its recipe, its last held-out bits per byte by source, tokens, and seconds of all steps."""

    recipe: PretrainRecipe
    bits: Mapping[str, float]
    tokens: int
    seconds: float

    def mean_bits(self, language: str) -> float:
        """Mean over the sources in a language."""
        languages = languages_of(list(self.bits), self.recipe.data.languages)
        return statistics.mean(bits for name, bits in self.bits.items() if languages[name] == language)

    @property
    def mixture_bits(self) -> float:
        """Mean over the sources, weighted as they are in the mixture."""
        weights = self.recipe.data.weights()
        return sum(weights[name] * bits for name, bits in self.bits.items()) / sum(weights[name] for name in self.bits)


def run_case(recipe_name: str, case: Case, out: Path, common: Sequence[str]) -> Measured:
    """Do a run that is not done yet, and read what it came to."""
    shared = (f"--data.tokenizer={out / 'tokenizer'}", f"--data.shards={out / 'shards'}")
    recipe = load_recipe(PretrainRecipe, "pretrain", recipe_name, [*common, *case.overrides, *shared])
    prepare_shared_tokenizer(recipe_name, out, common)
    print(f"{case.name}: {out / case.name}", file=sys.stderr)
    with sole_owner(out / case.name):
        pretrain(recipe, out / case.name)
    return measured(recipe, out / case.name)


def prepare_shared_tokenizer(recipe_name: str, out: Path, common: Sequence[str]) -> None:
    """The tokenizer that all runs below `out` share, made from the recipe as it is."""
    prepare_tokenizer(load_recipe(PretrainRecipe, "pretrain", recipe_name, common), out / "tokenizer")


def measured(recipe: PretrainRecipe, run_dir: Path) -> Measured:
    """Read a run's figures."""
    prefix = "bits_per_byte/"
    bits: dict[str, float] = {}
    tokens, seconds = 0, 0.0
    for record in read_metrics(run_dir / METRICS_FILE):
        bits |= {name.removeprefix(prefix): float(value) for name, value in record.items() if name.startswith(prefix)}
        tokens += int(record.get("tokens", 0))
        seconds += float(record.get("seconds", 0.0))
    if not bits:
        raise UserError(f"{run_dir} holds no held-out figures: let its run reach an evaluation")
    return Measured(recipe, bits, tokens, seconds)


def shares(out: Path, seeds: Sequence[int], common: Sequence[str]) -> Result:
    """Bits per byte of English, Chinese and both at each share of English, means over seeds, at equal tokens."""
    rows: list[tuple[Cell, ...]] = []
    for share in SHARES:
        cases = [
            Case(f"english-{100 * share:.0f}-seed-{seed}", (f"--data.english_share={share}", f"--train.seed={seed}"))
            for seed in seeds
        ]
        runs = [run_case("shares", case, out, common) for case in cases]
        both = [(run.mean_bits(ENGLISH) + run.mean_bits(CHINESE)) / 2 for run in runs]
        figures = [statistics.mean(run.mean_bits(language) for run in runs) for language in (ENGLISH, CHINESE)]
        spread = max(both) - min(both)
        mean = statistics.mean(both)
        rows.append((round(100 * share), runs[0].tokens, *(round(x, 4) for x in (*figures, mean, spread))))
    columns = ("English %", "tokens", "English bits/byte", "Chinese bits/byte", "mean of both", "spread over seeds")
    best = parabola_minimum([float(row[0]) for row in rows], [float(row[4]) for row in rows])  # type: ignore[arg-type]
    lowest = min(rows, key=lambda row: float(row[4]))[0]  # type: ignore[arg-type]
    command = f"{MODULE} shares (lowest of the three: {lowest} %; lowest of the parabola through them: {best:.0f} %)"
    return Result(**provenance("shares", command, seeds), columns=columns, rows=tuple(rows))


def parabola_minimum(places: Sequence[float], values: Sequence[float]) -> float:
    """Where the parabola through three points is lowest, kept inside them; the lowest point where it has no minimum.

    >>> round(parabola_minimum([30, 50, 70], [(x - 55) ** 2 for x in (30, 50, 70)]), 6)
    55.0
    """
    curvature, slope, _ = np.polyfit(places, values, 2)
    if curvature <= 0:
        return places[int(np.argmin(values))]
    return float(min(max(-slope / (2 * curvature), min(places)), max(places)))


def optimizers(out: Path, seeds: Sequence[int], common: Sequence[str]) -> Result:
    """AdamW with the demo's recipe, and Muon with the same but for the optimizer's kind at parts of its tokens."""
    steps = load_recipe(PretrainRecipe, "pretrain", "demo", common).train.steps
    runs: dict[tuple[str, float], list[Measured]] = {}
    for seed in seeds:
        for kind, fraction in (("adamw", 1.0), *(("muon", fraction) for fraction in FRACTIONS)):
            count = round(steps * fraction)
            overrides = (f"--optim.kind={kind}", f"--train.steps={count}", f"--train.seed={seed}")
            run = run_case("demo", Case(f"{kind}-{count}-seed-{seed}", overrides), out, common)
            runs.setdefault((kind, fraction), []).append(run)
    bits = {key: statistics.mean(run.mixture_bits for run in found) for key, found in runs.items()}
    rows = tuple(
        (kind, round(100 * fraction, 1), found[0].tokens, round(bits[kind, fraction], 4),
         round(statistics.mean(run.seconds for run in found), 1))
        for (kind, fraction), found in runs.items()
    )  # fmt: skip
    reached = tokens_to_reach(bits["adamw", 1.0], [(fraction, bits["muon", fraction]) for fraction in FRACTIONS])
    said = "not within the same tokens" if reached is None else f"at {100 * reached:.0f} % of its tokens"
    columns = ("optimizer", "% of AdamW's tokens", "tokens", "held-out bits/byte", "seconds")
    command = f"{MODULE} optimizers (Muon reaches AdamW's bits per byte {said})"
    return Result(**provenance("optimizers", command, seeds), columns=columns, rows=rows)


def tokens_to_reach(target: float, points: Sequence[tuple[float, float]]) -> float | None:
    """The fraction of tokens at which falling losses reach a target, in a line between runs; None where none does.

    The first run's fraction where that is low enough already: less was not tried.

    >>> tokens_to_reach(2.5, [(0.5, 3.0), (0.75, 2.25), (1.0, 2.0)])
    0.6666666666666666
    """
    before: tuple[float, float] | None = None
    for fraction, loss in points:
        if loss <= target:
            if before is None:
                return fraction
            return before[0] + (fraction - before[0]) * (before[1] - target) / (before[1] - loss)
        before = fraction, loss
    return None


def curve(run_dir: Path, name: str) -> Result:
    """At most twelve evaluations of a run, from first to last: tokens, hours, loss, bits per byte by source."""
    points: list[tuple[Cell, ...]] = []
    names: list[str] = []
    losses: list[float] = []
    tokens, seconds = 0, 0.0
    for record in read_metrics(run_dir / METRICS_FILE):
        held_out = {key: float(value) for key, value in record.items() if key.startswith("bits_per_byte/")}
        if held_out:
            names = list(held_out)
            loss = round(statistics.mean(losses), 4) if losses else None
            bits = (round(value, 4) for value in held_out.values())
            points.append((int(record["step"]), tokens, round(seconds / 3600, 2), loss, *bits))
            losses = []
        if "loss" in record:
            tokens, seconds = tokens + int(record["tokens"]), seconds + float(record["seconds"])
            losses.append(float(record["loss"]))
    if not points:
        raise UserError(f"{run_dir} holds no held-out figures: let its run reach an evaluation")
    kept = np.unique(np.linspace(0, len(points) - 1, min(CURVE_POINTS, len(points))).round().astype(int))
    columns = ("step", "tokens", "hours", "loss", *(f"{key.removeprefix('bits_per_byte/')} bits/byte" for key in names))
    origin = provenance(name, f"turbos pretrain {name} --run {run_dir.name}", ())
    return Result(**origin, columns=columns, rows=tuple(points[place] for place in kept))


def tokenise() -> Result:
    """Megabytes of text a second that the tokenizer library alone encodes, and that become shards on disk."""
    texts: list[str] = []
    for name in ("english", "chinese"):
        room = TOKENISE_CHARACTERS // 2
        for text in documents(name):
            texts.append(text)
            room -= len(text)
            if room <= 0:
                break
    tokenizer = Tokenizer.train(texts[::20], vocab_size=8192)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    alone, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TOKENISE_ROUNDS):
            started = time.perf_counter()
            tokenizer.encode_batch(texts)
            alone.append(time.perf_counter() - started)
            started = time.perf_counter()
            write_shard(Path(folder, "one.shard"), texts, tokenizer)
            written.append(time.perf_counter() - started)
    rates = [megabytes / min(alone), megabytes / min(written)]
    rows = (
        ("tokenizers' encode_batch alone", round(rates[0], 2), None),
        ("texts to a shard on disk", round(rates[1], 2), round(100 * rates[1] / rates[0])),
    )
    columns = ("work", "MB/s, all cores", "% of the library's rate")
    return Result(**provenance("tokenise", f"{MODULE} tokenise", ()), columns=columns, rows=rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Do one experiment and write its result below the current directory."""
    parser = argparse.ArgumentParser(prog=MODULE, description="Experiments of pretraining, written to docs/results.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for name in ("shares", "optimizers"):
        one = kinds.add_parser(name)
        one.add_argument("--out", type=Path, default=Path("runs", name), help="directory of the runs")
        one.add_argument("--seeds", default="0", help="seeds, with commas (default: 0)")
        one.add_argument("--threads", type=int, default=1, help="threads of each run (default: 1)")
    one = kinds.add_parser("curve")
    one.add_argument("run", type=Path)
    one.add_argument("--name", required=True, help="name of the result, and of the recipe")
    kinds.add_parser("tokenise")
    args, overrides = parser.parse_known_args(argv)
    if overrides and args.kind not in ("shares", "optimizers"):
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    try:
        print(write_result(_result(args, overrides), Path.cwd()))
    except UserError as error:
        print(f"pretraining: error: {error}", file=sys.stderr)
        return 2
    return 0


def _result(args: argparse.Namespace, overrides: Sequence[str]) -> Result:
    if args.kind == "tokenise":
        return tokenise()
    if args.kind == "curve":
        return curve(args.run, args.name)
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        raise UserError(f"--seeds takes whole numbers with commas, not {args.seeds!r}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    set_threads(args.threads)
    keep_freed_memory()
    common = [f"--train.threads={args.threads}", *overrides]
    return shares(args.out, seeds, common) if args.kind == "shares" else optimizers(args.out, seeds, common)


if __name__ == "__main__":
    sys.exit(main())
