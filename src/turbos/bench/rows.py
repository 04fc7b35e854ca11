"""What a measurement yields: a named value, its unit, and how many times better it is than each peer's.

>>> row = Row("train 2048", 742.0, "tok/s", {"transformers": 1.4})
>>> rows_object([row])
{'rows': [{'name': 'train 2048', 'value': 742.0, 'unit': 'tok/s', 'ratios': {'transformers': 1.4}}]}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One measured figure; `ratios` has one entry per peer, above 1 where ours is better."""

    name: str
    value: float
    unit: str
    ratios: Mapping[str, float] = field(default_factory=dict)


def rows_object(rows: Sequence[Row]) -> Mapping[str, Any]:
    """The object that `--json` prints."""
    return {"rows": [dataclasses.asdict(row) for row in rows]}


def rows_table(rows: Sequence[Row]) -> Table:
    """The rows for reading, with a column for each peer."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.ratios))
    table = Table()
    table.add_column("measurement")
    table.add_column("value", justify="right")
    table.add_column("unit")
    for peer in peers:
        table.add_column(f"times better than {peer}", justify="right")
    for row in rows:
        ratios = [f"{row.ratios[peer]:.2f}" if peer in row.ratios else "" for peer in peers]
        table.add_row(row.name, f"{row.value:,.4g}" if row.value < 1000 else f"{row.value:,.0f}", row.unit, *ratios)
    return table
