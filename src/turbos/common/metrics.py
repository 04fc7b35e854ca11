"""The one metrics log: a line of JSON per record, in `metrics.jsonl`, and TensorBoard beside it where asked for.

A record is a step and scalars. A line is flushed as soon as it is written; a torn last line (power cut, `kill -9`) is
dropped when the log is opened or read. This is not a progress display and not a plot (`turbos plot` draws the file).

>>> import tempfile
>>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
>>> log = MetricsLog(path)
>>> log.log(1, {"loss": 2.5, "source": "stdlib"}); log.log(2, {"loss": 2.25}); log.close()
>>> truncate_after(path, 1)
>>> read_metrics(path)
[{'step': 1, 'loss': 2.5, 'source': 'stdlib'}]
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.common.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
"""Name of the log in a run's folder."""


class MetricsLog:
    """Appends records to a file; a run that resumes opens the same path again.

    With `tensorboard`, numbers also go to `<folder of path>/tensorboard`.
    """

    def __init__(self, path: Path, tensorboard: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        drop_torn_line(path)
        self._writer = open_tensorboard(path) if tensorboard else None
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Append one record and flush it. A number that is not finite is written as null (JSON has no NaN)."""
        record = {"step": step} | {name: plain_scalar(value) for name, value in values.items()}
        self._file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                if not isinstance(value, str):
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


def read_metrics(path: Path) -> list[Mapping[str, float | str]]:
    """All whole records in the order they were written; null is read as NaN. A missing file raises `UserError`."""
    if not path.is_file():
        raise UserError(f"no metrics at {path}; give the folder of a run that has logged at least one step")
    return [
        {name: math.nan if value is None else value for name, value in record_of(line, path, number).items()}
        for number, line in enumerate(whole_lines(path), start=1)
    ]


def record_of(line: str, path: Path, number: int) -> dict[str, Any]:
    """A line's record, its numbers that are not finite as None; UserError where it is none (a damaged file)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {number}, is not a metrics record: {error}") from error
    is_record = isinstance(record, dict) and type(record.get("step")) is int
    if not is_record or not all(isinstance(value, float | int | str | None) for value in record.values()):
        raise UserError(f"{path}, line {number}, is not a metrics record: take the line out or mend it")
    return dict(record)


def truncate_after(path: Path, step: int) -> None:
    """Drop the records after `step`, as a run must that resumes from a checkpoint of that step.

    The file is replaced in one move; a missing one stays missing.
    """
    if not path.is_file():
        return
    lines = enumerate(whole_lines(path), start=1)
    kept = [line for number, line in lines if record_of(line, path, number)["step"] <= step]
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def plain_scalar(value: float | str) -> float | str | None:
    """A value as JSON can hold it: strings and whole numbers stay, other numbers are floats, not finite is None."""
    if isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def whole_lines(path: Path) -> list[str]:
    """Lines that end in a line break: the last one may be torn."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        return [line for line in file if line.endswith("\n")]


def drop_torn_line(path: Path) -> None:
    """Cut a file back to the end of its last whole line; a missing file stays missing."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def open_tensorboard(path: Path) -> SummaryWriter:
    """TensorBoard's writer beside the log; steps after the last record are purged, since a resumed run repeats them."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard is not installed; run: pip install 'turbos[tensorboard]'") from error
    records = read_metrics(path) if path.is_file() else []
    purge_step = int(records[-1]["step"]) + 1 if records else None
    return SummaryWriter(log_dir=str(path.parent / "tensorboard"), purge_step=purge_step)
