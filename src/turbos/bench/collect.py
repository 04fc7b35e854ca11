"""Turn what a command measured into a result file of `docs/results`, with commit, date and machine.

    turbos bench train --json | python -m turbos.bench.collect bench train
    turbos bench length --budget 4GiB --json | python -m turbos.bench.collect bench length --options="--budget 4GiB"
    python -m turbos.bench.collect demo runs/seed0 runs/seed1 runs/seed2
    python -m turbos.bench.collect twins runs/bench-twins
    python -m turbos.bench.collect guidellm benchmarks.json --command="guidellm run ..."

It computes means and differences over seeds and nothing else; tables are rendered by `bench.tables`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbos.bench import guidellm
from turbos.bench.tables import Cell, Result, write_result
from turbos.common.errors import UserError
from turbos.common.machine import describe_machine

STAGES = ("pretrain", "sft", "rl")
DEMO_COLUMNS = (
    *("family", "thinking", "pretrained %", "after SFT %", "after RL %", "RL adds", "lowest seed %"),
    *("thinking tokens after SFT", "after RL"),
)


def provenance(name: str, command: str, seeds: Sequence[int], machine: str = "") -> dict[str, Any]:
    """The fields of a result that say where it comes from."""
    here = describe_machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    return {
        "name": name,
        "command": command,
        "commit": commit,
        "date": datetime.date.today().isoformat(),
        "machine": machine or f"{here.cpu}, {here.cores} cores, torch {here.torch}",
        "seeds": tuple(seeds),
    }


def bench_result(work: str, text: str, options: str = "") -> Result:
    """The rows that `turbos bench WORK --json` printed; `options` are further words of that command."""
    rows = json.loads(text)["rows"]
    peers = list(dict.fromkeys(peer for row in rows for peer in row["ratios"]))
    cells = [(row["name"], row["value"], row["unit"], *(row["ratios"].get(peer) for peer in peers)) for row in rows]
    columns = ("measurement", "value", "unit", *(f"times {peer}" for peer in peers))
    origin = provenance(f"bench-{work}", f"turbos bench {work} {options}".strip(), ())
    return Result(**origin, columns=columns, rows=tuple(cells))


def demo_result(runs: Sequence[Path]) -> Result:
    """Accuracy and thinking tokens by family, mode and stage: means over the demos of several seeds."""
    outcomes = [json.loads((run / "demo.json").read_text(encoding="utf-8")) for run in runs]
    scores = [{stage: _by_case(outcome["scores"][stage]) for stage in STAGES} for outcome in outcomes]
    rows = tuple(_demo_row(case, scores) for case in scores[0]["rl"])
    minutes = ", ".join(f"{outcome['total_seconds'] / 60:.1f}" for outcome in outcomes)
    seeds = [outcome["seed"] for outcome in outcomes]
    origin = provenance("demo", f"turbos demo --seed N ({minutes} minutes)", seeds)
    return Result(**origin, columns=DEMO_COLUMNS, rows=rows)


def _by_case(scores: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(f"{score['family']}/{score['level']}", score["mode"]): score for score in scores}


def _demo_row(case: tuple[str, str], seeds: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    percent = {stage: [100 * seed[stage][case]["accuracy"] for seed in seeds] for stage in STAGES}
    means = [statistics.mean(percent[stage]) for stage in STAGES]
    tokens = [statistics.mean(seed[stage][case]["thinking_tokens"] for seed in seeds) for stage in STAGES[1:]]
    return (*case, *(round(mean, 1) for mean in means), round(means[2] - means[1], 1), round(min(percent["rl"]), 1),
            *(round(count, 1) for count in tokens))  # fmt: skip


def twins_result(directory: Path) -> Result:
    """What `turbos bench twins` kept in its directory, of all its seeds."""
    # They import this module for `provenance`.
    from turbos.bench import twins, twins_table

    return twins_table.twins_result(twins.read_results(directory, ()))


def guidellm_result(report: Path, command: str) -> Result:
    """The key figures of guidellm's report; `command` is how it was called."""
    rows = guidellm.guidellm_rows(report)
    origin = provenance("guidellm", f"{command} ({guidellm.describe_run(report)})", ())
    return Result(**origin, columns=guidellm.COLUMNS, rows=tuple(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Write one result file below the current directory."""
    parser = argparse.ArgumentParser(prog="python -m turbos.bench.collect", description="Write docs/results files.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    bench = kinds.add_parser("bench", help="from stdin: what turbos bench WORK --json printed")
    bench.add_argument("work")
    bench.add_argument("--options", default="", metavar="WORDS", help="further words of that command")
    kinds.add_parser("demo", help="from demo runs").add_argument("runs", nargs="+", type=Path)
    kinds.add_parser("twins", help="from the directory of turbos bench twins").add_argument("directory", type=Path)
    outside = kinds.add_parser("guidellm", help="from a JSON report of guidellm")
    outside.add_argument("report", type=Path)
    outside.add_argument("--command", default="guidellm run", metavar="WORDS", help="how guidellm was called")
    args = parser.parse_args(argv)
    try:
        if args.kind == "twins":
            result = twins_result(args.directory)
        elif args.kind == "guidellm":
            result = guidellm_result(args.report, args.command)
        else:
            measured = args.kind == "bench"
            result = bench_result(args.work, sys.stdin.read(), args.options) if measured else demo_result(args.runs)
    except (OSError, ValueError, KeyError) as error:
        print(f"collect: error: not a measurement: {error!r}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"collect: error: {error}", file=sys.stderr)
        return 2
    print(write_result(result, Path.cwd()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
