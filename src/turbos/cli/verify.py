"""`turbos verify CKPT`: the parity certificate of a checkpoint, as a table or as JSON; exit code 0 if it holds, else 1.

turbos verify runs/demo/final --quick
turbos verify owner/name --json --implementation transformers
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from turbos.verify.report import Check, Report

FAILED = 1


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("verify", help="prove that a checkpoint gives the same numbers", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory of any family, or hub id")
    parser.add_argument("--quick", action="store_true", help="shorter texts: under a minute for 30M parameters")
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")
    parser.add_argument("--card", action="store_true", help="put the certificate into the checkpoint's README.md")
    parser.add_argument(
        "--implementation",
        choices=("turbos", "transformers"),
        default="turbos",
        help="whose code is checked (default turbos)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the checks and print the certificate."""
    from turbos.model.card import set_section
    from turbos.model.hub import resolve_checkpoint
    from turbos.verify.certificate import verify
    from turbos.verify.report import CARD_TITLE, card_section

    directory = resolve_checkpoint(args.checkpoint)
    report = verify(directory, args.quick, args.implementation, _tell)
    if args.json:
        print(report.to_json())
    else:
        print_certificate(report)
    if args.card:
        set_section(directory, CARD_TITLE, card_section(report))
    return 0 if report.ok else FAILED


def print_certificate(report: Report) -> None:
    """The table, what was left out, and the verdict."""
    from rich.console import Console

    from turbos.verify.report import table_of

    console = Console()
    console.print(table_of(report))
    for line in report.left_out:
        console.print(f"left out: {line}", highlight=False, markup=False)
    console.print(f"{'passed' if report.ok else 'FAILED'} in {report.seconds:.1f} s", highlight=False)


def _tell(check: Check) -> None:
    """Progress goes to stderr, and only where somebody watches."""
    if sys.stderr.isatty():
        print(f"{check.verdict:8}{check.name} ({check.seconds:.1f} s)", file=sys.stderr)
