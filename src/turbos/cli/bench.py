"""`turbos bench train|prefill|scan|peers|twins`: speed and memory against peers of the same shape, and against twins.

The measuring is in `turbos.bench`; here its rows are printed, as a table or as one JSON object, and drawn. What twins
need besides is in `cli.twins`.

    turbos bench train --json
    turbos bench peers --vllm ~/vllm-env --png peers.png
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.cli import twins
from turbos.cli.stages import use_threads
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from turbos.bench.rows import Row

PNG = Path("bench-peers.png")
OPTIONS_OF = {
    **{name: ("peers",) for name in ("llama_bench", "vllm")},
    "png": ("peers", "twins"),
    **{name: ("twins",) for name in ("quick", "seeds", "dir")},
}
"""Options that say nothing with other work."""


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("bench", help="measure speed and memory against peers", allow_abbrev=False)
    parser.add_argument(
        "work",
        choices=("train", "prefill", "scan", "peers", "twins"),
        help="what to measure (peers: all, against all; twins: attention-only, Mamba-only, hybrid)",
    )
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--llama-bench", type=Path, metavar="FILE", help="with peers: this program for llama.cpp")
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="with peers: a virtual environment that has vLLM")
    parser.add_argument("--png", type=Path, metavar="FILE", help=f"with peers or twins: where to draw (peers: {PNG})")
    twins.add_options(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print the rows."""
    for name, works in OPTIONS_OF.items():
        if args.work not in works and getattr(args, name) not in (None, False):
            raise UserError(f"bench: --{name.replace('_', '-')} says nothing with {args.work}")
    if args.work == "twins":
        return twins.run(args)
    use_threads(args.threads)
    with contextlib.redirect_stdout(sys.stderr):
        rows = measure(args)
    from turbos.bench.rows import rows_object, rows_table

    if args.json:
        print(json.dumps(rows_object(rows)))
    else:
        from rich.console import Console

        Console().print(rows_table(rows))
    return 0


def measure(args: argparse.Namespace) -> Sequence[Row]:
    """The rows of one benchmark."""
    if args.work == "train":
        from turbos.bench.train import bench_train

        return bench_train()
    if args.work == "prefill":
        from turbos.bench.prefill import bench_prefill

        return bench_prefill()
    if args.work == "scan":
        from turbos.bench.scan import bench_scan

        return bench_scan()
    from turbos.bench.chart import draw_rows
    from turbos.bench.contest import Elsewhere, bench_peers

    rows = bench_peers(Elsewhere(args.llama_bench, args.vllm))
    print(f"bench peers: drawn in {draw_rows(rows, args.png or PNG)}")
    return rows
