"""Texts of local files and of `datasets` repositories: what a user brings, so nothing about it is taken for granted.

A text file is UTF-8 and read in parts of a bounded size, so that one giant line fills no memory; a damaged or binary
file is named in one line.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from turbos.common.errors import UserError
from turbos.data.sources.texts import pieces

TEXT_FIELDS = ("text", "content")
"""Where a JSON object or a table keeps its text; the first that is there counts."""

TEXT_TYPES = ("string", "large_string", "string_view")
"""Arrow's types of text; a column of bytes, numbers or lists is refused, not printed."""

LINE_PART = 1 << 20
"""A line of a text file is read in parts of so many characters."""

JSON_LINE_LIMIT = 256 << 20
"""No document of a JSON file may have more characters."""

BYTE_ORDER_MARKS = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip",
    b"PK": "zip",
    b"\x28\xb5": "zstd",
}


def local_texts(path: Path) -> Iterator[str]:
    """Texts of one file, or of every readable file below a folder in the order of their names."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in READERS and file.is_file()]
        if not files:
            raise UserError(f"no {', '.join(READERS)} files below {path}")
        return itertools.chain.from_iterable(READERS[file.suffix](file) for file in files)
    if path.suffix not in READERS:
        raise UserError(f"cannot read {path}: only {', '.join(READERS)} files are text sources")
    return READERS[path.suffix](path)


def _lines(path: Path, part: int = LINE_PART) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends, in parts of at most `part` characters; UserError where it is none."""
    with path.open("rb") as start:
        found = BYTE_ORDER_MARKS.get(start.read(2))
    if found:
        raise UserError(f"{path} is {found}, not UTF-8 text: convert or unpack it first")
    number = 0
    try:
        with path.open(encoding="utf-8-sig") as file:
            while line := file.readline(part):
                number += 1
                if "\0" in line:
                    raise UserError(f"{path} is binary, not text (a zero byte near line {number}): leave it out")
                yield line
    except UnicodeDecodeError as error:
        # The file is decoded in blocks, so the place is only known to lie behind the last whole line.
        where = f"after line {number}" if number else "at its beginning"
        raise UserError(f"{path} is not UTF-8 text ({error.reason}, {where}): convert it first") from error


def _text_file(path: Path) -> Iterator[str]:
    return pieces(_lines(path))


def _json_lines(path: Path) -> Iterator[str]:
    """The text of each line's object."""
    for number, line in enumerate(_lines(path, JSON_LINE_LIMIT), 1):
        if not line.strip():
            continue
        if len(line) >= JSON_LINE_LIMIT and not line.endswith("\n"):
            raise UserError(f"{path} line {number} has more than {JSON_LINE_LIMIT:,} characters: split that document")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        yield text_of(row, f"{path} line {number}")


def _parquet(path: Path) -> Iterator[str]:
    """The text column of a table, a batch of rows at a time."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        column = next((field for field in TEXT_FIELDS if field in table.schema_arrow.names), None)
        if column is None:
            raise UserError(f"{path} has no column {' or '.join(TEXT_FIELDS)}: it has {table.schema_arrow.names}")
        kind = str(table.schema_arrow.field(column).type)
        if kind not in TEXT_TYPES:
            raise UserError(f"{path}: column {column} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a parquet file, or damaged: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _text_file, ".jsonl": _json_lines, ".parquet": _parquet}


def text_of(row: Any, where: str) -> str:
    """The text field of a row; UserError where it has none."""
    for field in TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            text: str = row[field]
            # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"{where} holds half a surrogate pair: mend or leave out that text")
            return text
    raise UserError(f"{where} has no text field ({' or '.join(TEXT_FIELDS)})")


def dataset_texts(name: str) -> Iterator[str]:
    """The train split of a `datasets` repository, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"source datasets:{name} needs the datasets package: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # whatever the network or the repository brings
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot open datasets:{name}: {first}") from error
    return (text_of(row, f"a row of datasets:{name}") for row in rows)
