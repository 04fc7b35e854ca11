"""`turbos bench train|prefill|decode|length|serve|scan|peers|twins`: speed and memory against peers and against twins.

The measuring is in `turbos.bench`; here its rows are printed, as a table or as one JSON object, and drawn. What twins
need besides is in `cli.twins`.

    turbos bench train --json
    turbos bench peers --vllm ~/vllm-env --png peers.png
    turbos bench length --lengths 2048,32768 --budget 4GiB
    turbos bench serve --checkpoint runs/demo/final
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

WORKS = ("train", "prefill", "decode", "length", "serve", "scan", "peers", "twins")
DRAWN = ("peers", "decode", "length", "serve")
OPTIONS_OF = {
    **{name: ("peers",) for name in ("llama_bench", "vllm")},
    "png": (*DRAWN, "twins"),
    **{name: ("length",) for name in ("lengths", "budget")},
    "checkpoint": ("serve",),
    **{name: ("twins",) for name in ("quick", "seeds", "dir")},
}
"""Options that say nothing with other work."""


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("bench", help="measure speed and memory against peers", allow_abbrev=False)
    parser.add_argument(
        "work",
        choices=WORKS,
        help="what to measure (decode: token by token, against peers; length: the hybrid against its attention twin, "
        "by length; serve: the server under load, and what it reads again; peers: all, against all; twins: what "
        "attention-only, Mamba-only and hybrid learn)",
    )
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--llama-bench", type=Path, metavar="FILE", help="with peers: this program for llama.cpp")
    parser.add_argument("--vllm", type=Path, metavar="DIR", help="with peers: a virtual environment that has vLLM")
    drawn = ", ".join(DRAWN)
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help=f"with {drawn} or twins: where to draw (default: bench-WORK.png)"
    )
    parser.add_argument("--lengths", metavar="N,...", help="with length: tokens before (default: 128 to 131072)")
    parser.add_argument("--budget", metavar="SIZE", help="with length: also all sessions that such memory holds, 4GiB")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="with serve: this one (default: random weights of bench-26m)"
    )
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
        from turbos.bench.prefill import ENGINE_LENGTHS, bench_prefill

        return bench_prefill(engine_lengths=ENGINE_LENGTHS)
    if args.work == "scan":
        from turbos.bench.scan import bench_scan

        return bench_scan()
    png = args.png or Path(f"bench-{args.work}.png")
    measured = {"length": measure_length, "serve": measure_serve}.get(args.work, measure_peers)
    rows, drawn = measured(args, png)
    print(f"bench {args.work}: drawn in {drawn}")
    return rows


def measure_peers(args: argparse.Namespace, png: Path) -> tuple[Sequence[Row], Path]:
    """The rows of a benchmark against peers, and their picture."""
    from turbos.bench.chart import draw_rows

    if args.work == "decode":
        from turbos.bench.decode import Sizes, bench_decode

        rows = bench_decode(Sizes() if args.threads is None else Sizes(threads=(args.threads,)))
    else:
        from turbos.bench.contest import Elsewhere, bench_peers

        rows = bench_peers(Elsewhere(args.llama_bench, args.vllm))
    return rows, draw_rows(rows, png)


def measure_length(args: argparse.Namespace, png: Path) -> tuple[Sequence[Row], Path]:
    """The rows by length, and their picture."""
    from turbos.bench.length import LENGTHS, Plan, bench_length
    from turbos.bench.length_budget import parse_bytes
    from turbos.bench.length_chart import draw_length

    lengths = LENGTHS if args.lengths is None else parse_lengths(args.lengths)
    rows = bench_length(Plan(lengths, None if args.budget is None else parse_bytes(args.budget)))
    return rows, draw_length(rows, png)


def measure_serve(args: argparse.Namespace, png: Path) -> tuple[Sequence[Row], Path]:
    """The rows of the server, and their picture."""
    from turbos.bench.serve import bench_serve
    from turbos.bench.serve_chart import draw_serve
    from turbos.bench.serve_plan import ServePlan

    rows = bench_serve(ServePlan() if args.threads is None else ServePlan(threads=args.threads), args.checkpoint)
    return rows, draw_serve(rows, png)


def parse_lengths(text: str) -> tuple[int, ...]:
    """Lengths as given, shortest first; UserError for what is no list of them.

    >>> parse_lengths("32768,2048")
    (2048, 32768)
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"bench length: --lengths {text!r} is no list of lengths: write it like 2048,32768")
    return tuple(sorted({int(word) for word in words}))
