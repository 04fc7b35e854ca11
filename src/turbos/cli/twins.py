"""`turbos bench twins`: does the hybrid earn its place? Three twins trained, measured, tabled and drawn.

It is a part of the verb `bench` (`cli.bench`), apart because it trains, resumes, and has options of its own.

    turbos bench twins                       # three seeds, at most 35 minutes on two cores; again: goes on
    turbos bench twins --quick               # a minute, to see that everything runs
    python -m turbos.bench.collect twins runs/bench-twins      # -> docs/results/twins.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from turbos.cli.stages import use_threads
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from turbos.bench.tables import Cell

DIRECTORY, QUICK_DIRECTORY, SEEDS = Path("runs", "bench-twins"), Path("runs", "bench-twins-quick"), 3


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of twins alone."""
    parser.add_argument("--quick", action="store_true", help="with twins: a minute, to see that everything runs")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"with twins: how many seeds (default: {SEEDS})")
    parser.add_argument("--dir", type=Path, metavar="DIR", help=f"with twins: work here (default: {DIRECTORY})")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, print the table, draw the picture."""
    seeds = args.seeds if args.seeds is not None else (1 if args.quick else SEEDS)
    if seeds < 1:
        raise UserError(f"bench twins: --seeds must be at least 1, not {seeds}")
    directory = args.dir or (QUICK_DIRECTORY if args.quick else DIRECTORY)
    use_threads(args.threads)
    from turbos.bench.twins import bench_twins
    from turbos.bench.twins_chart import draw_twins
    from turbos.bench.twins_plan import QUICK, Plan
    from turbos.bench.twins_table import COLUMNS, twins_rows

    with contextlib.redirect_stdout(sys.stderr):
        results = bench_twins(QUICK if args.quick else Plan(), range(seeds), directory)
        print(f"bench twins: drawn in {draw_twins(results, args.png or directory / 'twins.png')}")
    rows = twins_rows(results)
    if args.json:
        print(json.dumps({"columns": COLUMNS, "rows": rows, "seeds": results.seeds}))
    else:
        from rich.console import Console

        Console().print(table_of(COLUMNS, rows))
    return 0


def table_of(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Table:
    """Rows for reading; the first two columns and the last hold words."""
    from rich.table import Table

    from turbos.bench.tables import cell_text

    table = Table()
    for column in columns:
        is_text = column in (columns[0], columns[1], columns[-1])
        table.add_column(column, justify="left" if is_text else "right")
    for row in rows:
        table.add_row(*map(cell_text, row))
    return table
