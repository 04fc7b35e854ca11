"""The certificate: one row per check, and its forms for reading, for programs and for a model card.

>>> check = Check(True, 2e-7, 1e-5, "", "fp32 sums in another order", name="packed == separate")
>>> report = Report("runs/demo/final", "turbos", "granitemoehybrid", (check,), (), 1.5)
>>> report.ok, json.loads(report.to_json())["checks"][0]["error"]
(True, 2e-07)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Check:
    """What one comparison gave.

    `error` and `tolerance` are relative to the largest logit unless `why` says otherwise; `where` names the first place
    that diverges. A check that does not `decide` is a warning: it leaves `Report.ok` alone. `note` says what was
    measured or set aside on the way. `name` and `seconds` are filled in by whoever runs the check.
    """

    ok: bool
    error: float
    tolerance: float
    where: str
    why: str
    note: str = ""
    decides: bool = True
    name: str = ""
    seconds: float = 0.0

    @property
    def verdict(self) -> str:
        """`ok`, `FAILED` or `warning`."""
        return "ok" if self.ok else "FAILED" if self.decides else "warning"


@dataclass(frozen=True)
class Report:
    """All checks of one checkpoint under one implementation; `left_out` has a line for each that could not run."""

    checkpoint: str
    implementation: str
    family: str
    checks: tuple[Check, ...]
    left_out: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """No deciding check failed."""
        return all(check.ok for check in self.checks if check.decides)

    def to_json(self) -> str:
        """One JSON object; an error that is no number becomes null."""
        checks = [
            {
                "name": check.name,
                "ok": check.ok,
                "error": check.error if math.isfinite(check.error) else None,
                "tolerance": check.tolerance,
                "where": check.where,
                "why": check.why,
                "note": check.note,
                "decides": check.decides,
                "seconds": round(check.seconds, 2),
            }
            for check in self.checks
        ]
        frame = {"checkpoint": self.checkpoint, "implementation": self.implementation, "family": self.family}
        return json.dumps(
            {
                "ok": self.ok,
                **frame,
                "checks": checks,
                "left_out": list(self.left_out),
                "seconds": round(self.seconds, 1),
            }
        )


CARD_TITLE = "Parity certificate"
COLOURS = {"ok": "green", "FAILED": "bold red", "warning": "yellow"}


def table_of(report: Report) -> Table:
    """The certificate for a terminal."""
    from rich.table import Table
    from rich.text import Text

    title = f"{report.checkpoint}: {report.family}, computed by {report.implementation}"
    table = Table(title=title, title_justify="left", show_lines=False)
    for heading in ("check", "", "error", "tolerance"):
        table.add_column(heading, justify="right" if heading in ("error", "tolerance") else "left")
    table.add_column("why this tolerance, and where it fails", overflow="fold")
    for check in report.checks:
        text = Text(check.why, style="dim")
        for line, style in ((check.where, COLOURS[check.verdict]), (check.note, "default")):
            if line:
                text.append(f"\n{line}", style=style)
        verdict = Text(check.verdict, style=COLOURS[check.verdict])
        table.add_row(check.name, verdict, number(check.error), number(check.tolerance), text)
    return table


def number(value: float) -> str:
    """An error or tolerance in few signs.

    >>> number(1.234e-6), number(0.0), number(3.0)
    ('1.2e-06', '0', '3')
    """
    return f"{value:.0f}" if math.isfinite(value) and value == round(value) else f"{value:.1e}"


def card_section(report: Report) -> str:
    """The certificate as the text of a model card's section `CARD_TITLE`, in Markdown."""
    how = "" if report.implementation == "turbos" else f" --implementation {report.implementation}"
    passed = sum(check.ok for check in report.checks)
    lines = [
        f"`turbos verify{how}` ({report.family}, computed by {report.implementation}): "
        f"**{'passed' if report.ok else 'FAILED'}**, {passed} of {len(report.checks)} checks. "
        "Errors and tolerances are relative to the largest logit where nothing else is said.",
        "",
        "| check | result | error | tolerance | why this tolerance; where it fails |",
        "|---|---|---|---|---|",
    ]
    for check in report.checks:
        words = "; ".join(text for text in (check.why, check.where, check.note) if text).replace("|", "\\|")
        figures = f"{number(check.error)} | {number(check.tolerance)}"
        lines.append(f"| {check.name} | {check.verdict} | {figures} | {words} |")
    lines += [f"\nLeft out: {line}" for line in report.left_out]
    return "\n".join(lines) + "\n"
