"""The metrics log: whole lines, resume, NaN and TensorBoard; and the machine's yardstick."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from turbos.common.errors import UserError
from turbos.common.machine import describe_machine, set_threads, sgemm_flops
from turbos.common.metrics import MetricsLog, read_metrics, truncate_after


def write_steps(path: Path, first: int, last: int) -> None:
    log = MetricsLog(path)
    for step in range(first, last + 1):
        log.log(step, {"loss": 1.0 / step, "source": "é"})
    log.close()


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write_steps(path, 1, 3)
    write_steps(path, 4, 4)
    assert read_metrics(path) == [{"step": step, "loss": 1.0 / step, "source": "é"} for step in range(1, 5)]


def test_each_record_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log(1, {"loss": 2.0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    log.close()


def test_lines_are_strict_json_and_nan_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.log(1, {"loss": math.nan, "ratio": torch.tensor(0.5).item(), "tokens": 7})
    log.close()
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "ratio": 0.5,
        "tokens": 7,
    }
    loss = read_metrics(path)[0]["loss"]
    assert isinstance(loss, float) and math.isnan(loss)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "\x00\x00", "{"])
def test_a_torn_last_line_is_dropped(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, 1, 2)
    with path.open("a") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    write_steps(path, 3, 3)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_truncate_after_keeps_up_to_the_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_after(path, 5)
    assert not path.exists()
    write_steps(path, 1, 6)
    with path.open("a") as file:
        file.write('{"step": 7')
    truncate_after(path, 4)
    write_steps(path, 5, 5)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3, 4, 5]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_files_that_are_no_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no metrics at"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("step 1\n")
    with pytest.raises(UserError, match="line 1"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = MetricsLog(tmp_path / "metrics.jsonl", tensorboard=True)
    log.log(1, {"loss": 2.0, "source": "stdlib"})
    log.close()
    board = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 2.0)]


def test_sgemm_rate_is_measured_once_and_is_plausible() -> None:
    rate = sgemm_flops(0.05)
    assert 1e8 < rate < 1e15
    assert sgemm_flops(0.05) == rate


def test_threads_and_machine() -> None:
    before = torch.get_num_threads()
    set_threads(1)
    assert torch.get_num_threads() == 1
    set_threads(None)
    assert torch.get_num_threads() == 1
    set_threads(before)
    machine = describe_machine()
    assert machine.cpu and machine.cores >= 1 and machine.torch == torch.__version__
