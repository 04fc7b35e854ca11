"""Tables of results in README and docs, rendered from `docs/results/*.json`; a test fails when they differ.

A table stands between `<!-- results:NAME -->` and `<!-- /results -->`, and says what `docs/results/NAME.json` says. A
result is made by a command and kept with its commit and machine; it is never written by hand.

    python -m turbos.bench.tables --write       # from the repository's root
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError

BLOCK = re.compile(r"<!-- results:(?P<name>[\w-]+) -->\n(?P<table>.*?)<!-- /results -->", re.DOTALL)
RESULTS_DIR = Path("docs", "results")
Cell = str | float | None


@dataclass(frozen=True)
class Result:
    """One result file. `columns` names the cells of each row; `seeds` are those that the figures are over."""

    name: str
    command: str
    commit: str
    date: str
    machine: str
    seeds: tuple[int, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def read_result(path: Path) -> Result:
    """A result file, checked: its name is the file's, and every row has a cell for each column."""
    if not path.is_file():
        raise UserError(f"no result {path}; write it with the command that measures it, or remove the table's markers")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        result = Result(
            name=str(read["name"]),
            command=str(read["command"]),
            commit=str(read["commit"]),
            date=str(read["date"]),
            machine=str(read["machine"]),
            seeds=tuple(int(seed) for seed in read["seeds"]),
            columns=tuple(str(column) for column in read["columns"]),
            rows=tuple(tuple(row) for row in read["rows"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a result: {error!r}; see {__name__}.Result for its fields") from error
    if result.name != path.stem:
        raise UserError(f"{path} has the name {result.name!r}; it must be that of the file")
    for row in result.rows:
        if len(row) != len(result.columns):
            raise UserError(f"{path}: row {list(row)} has {len(row)} cells for {len(result.columns)} columns")
    return result


def write_result(result: Result, root: Path) -> Path:
    """Write `docs/results/<name>.json` under the repository's root."""
    path = root / RESULTS_DIR / f"{result.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {key: getattr(result, key) for key in ("name", "command", "commit", "date", "machine", "seeds", "columns")}
    lines = [f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()]
    rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in result.rows)
    path.write_text("{\n" + ",\n".join([*lines, f' "rows": [\n{rows}\n ]']) + "\n}\n", encoding="utf-8")
    return path


def render_table(result: Result) -> str:
    """A result as a Markdown table with its provenance below; the text ends in a line break."""
    lines = [markdown_row(result.columns)]
    numeric = [all(not isinstance(row[place], str) for row in result.rows) for place in range(len(result.columns))]
    lines.append(markdown_row(["---:" if is_number else "---" for is_number in numeric]))
    lines += [markdown_row([cell_text(cell) for cell in row]) for row in result.rows]
    seeds = ", ".join(str(seed) for seed in result.seeds)
    source = f"`{result.command}`, seeds {seeds}" if seeds else f"`{result.command}`"
    lines += ["", f"{source}; {result.machine}; {result.date}, commit {result.commit[:10]}"]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[str]) -> str:
    """Cells between bars."""
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def cell_text(cell: Cell) -> str:
    """A cell: nothing for null, whole numbers in full, others with three significant digits.

    >>> [cell_text(cell) for cell in (None, 1234, 0.5, 61.26, 1234.5, "gcd")]
    ['', '1234', '0.5', '61.3', '1234', 'gcd']
    """
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return str(cell)


def fill_tables(text: str, root: Path) -> str:
    """The text with each table rendered anew from its result."""

    def rendered(block: re.Match[str]) -> str:
        name = block["name"]
        table = render_table(read_result(root / RESULTS_DIR / f"{name}.json"))
        return f"<!-- results:{name} -->\n{table}<!-- /results -->"

    return BLOCK.sub(rendered, text)


def documents(root: Path) -> list[Path]:
    """Files that may hold tables: those of the root and of docs."""
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def stale_documents(root: Path) -> list[Path]:
    """Documents whose tables differ from the results."""
    return [path for path in documents(root) if fill_tables(path.read_text("utf-8"), root) != path.read_text("utf-8")]


def main(argv: Sequence[str] | None = None) -> int:
    """Name the documents with stale tables (exit code 1), or with `--write` rewrite them."""
    parser = argparse.ArgumentParser(
        prog="python -m turbos.bench.tables", description="Tables of results in documents."
    )
    parser.add_argument("--write", action="store_true", help="rewrite stale tables (default: name them)")
    args = parser.parse_args(argv)
    root = Path.cwd()
    try:
        stale = stale_documents(root)
        for path in stale:
            print(path.relative_to(root))
            if args.write:
                path.write_text(fill_tables(path.read_text("utf-8"), root), encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if stale and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
