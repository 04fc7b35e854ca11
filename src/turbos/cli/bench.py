"""`turbos bench train|prefill`: speed and memory against peers of the same shape, in one interleaved run.

The measuring is in `turbos.bench`; here its rows are printed, as a table or as one JSON object.

    turbos bench train --json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from turbos.cli.stages import use_threads

if TYPE_CHECKING:
    from turbos.bench.rows import Row


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("bench", help="measure speed and memory against peers", allow_abbrev=False)
    parser.add_argument("work", choices=("train", "prefill"), help="what to measure")
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def run(args: argparse.Namespace) -> int:
    """Measure and print the rows."""
    use_threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr):
        rows = measure(args.work)
    from turbos.bench.rows import rows_object, rows_table

    if args.json:
        print(json.dumps(rows_object(rows)))
    else:
        from rich.console import Console

        Console().print(rows_table(rows))
    return 0


def measure(work: str) -> Sequence[Row]:
    """The rows of one benchmark."""
    if work == "train":
        from turbos.bench.train import bench_train

        return bench_train()
    from turbos.bench.prefill import bench_prefill

    return bench_prefill()
