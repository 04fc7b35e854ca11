"""Key figures of a report that guidellm, a load client of others, wrote about a server.

rows = guidellm_rows(Path("benchmarks.json"))
python -m turbos.bench.collect guidellm benchmarks.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbos.common.errors import UserError

COLUMNS = ("measurement", "mean", "p50", "p90", "p99", "unit")
LATENCIES = {
    "first token": ("time_to_first_token_ms", "ms"),
    "between tokens": ("inter_token_latency_ms", "ms"),
    "whole request": ("request_latency", "s"),
}
RATES = {"written": ("output_tokens_per_second", "tok/s"), "requests": ("requests_per_second", "per second")}
COUNTS = ("successful", "errored", "incomplete")
Row = tuple[str, float | None, float | None, float | None, float | None, str]


def guidellm_rows(path: Path) -> Sequence[Row]:
    """Rates, latencies of requests that succeeded, and how many did not. UserError for what is no such report."""
    try:
        benchmark = json.loads(path.read_text(encoding="utf-8"))["benchmarks"][0]
        return [*_rows(benchmark["metrics"])]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is no JSON report of guidellm: {error!r}") from error


def describe_run(path: Path) -> str:
    """The version of guidellm, how many streams at once, and for how long."""
    report = json.loads(path.read_text(encoding="utf-8"))
    strategy = report["benchmarks"][0]["config"]["strategy"]
    seconds = report["benchmarks"][0]["duration"]
    return f"guidellm {report['metadata']['guidellm_version']}, {strategy['streams']} streams, {seconds:.0f} s"


def _rows(metrics: Mapping[str, Any]) -> Sequence[Row]:
    found: list[Row] = [
        (name, metrics[key]["successful"]["mean"], None, None, None, unit) for name, (key, unit) in RATES.items()
    ]
    for name, (key, unit) in LATENCIES.items():
        figures = metrics[key]["successful"]
        percentiles = [figures["percentiles"][percent] for percent in ("p50", "p90", "p99")]
        found.append((name, figures["mean"], *percentiles, unit))
    totals = metrics["request_totals"]
    return [*found, *((f"{name} requests", totals[name], None, None, None, "") for name in COUNTS)]
