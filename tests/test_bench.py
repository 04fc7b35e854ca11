"""The benchmarks' machinery: interleaving, agreement before speed, result files; figures are measured elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from turbos.bench import collect, prefill, scan, train
from turbos.bench.peers import Times, interleave, require_agreement
from turbos.bench.tables import read_result


def test_rounds_run_every_contestant_and_turn_the_order() -> None:
    calls: list[str] = []
    times = interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warm_up=1)
    assert [len(times.seconds[name]) for name in "abc"] == [3, 3, 3]
    rounds = ["".join(calls[start : start + 3]) for start in range(0, 12, 3)]
    assert rounds[1:] == ["abc", "bca", "cab"]
    assert sorted(rounds[0]) == ["a", "b", "c"]


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    times = Times({"ours": [1.0, 2.0, 10.0], "theirs": [2.0, 6.0, 20.0]})
    assert times.ratio("ours", "theirs") == 2.0
    assert times.median("ours") == 2.0


def test_speeds_of_different_results_are_not_compared() -> None:
    require_agreement("same", torch.ones(3), torch.ones(3) * (1 + 1e-5))
    with pytest.raises(RuntimeError, match="losses differ"):
        require_agreement("losses", torch.ones(3), torch.tensor([1.0, 1.0, 1.01]))


@pytest.mark.slow
def test_benchmarks_agree_with_transformers_and_name_their_rows() -> None:
    pytest.importorskip("transformers")
    (row,) = train.bench_train(length=64, rounds=1)
    assert row.name == "train 64" and set(row.ratios) == {"transformers", "sgemm floor"}
    assert row.value > 0 and min(row.ratios.values()) > 0
    speed, memory = prefill.bench_prefill((512,))
    assert (speed.name, memory.name) == ("prefill 512", "prefill 512 memory")
    assert memory.value > 1 and memory.ratios["transformers"] > 0


def test_scans_agree_with_transformers_before_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    rows = scan.bench_scan((16, 24), rounds=1)
    assert [row.name for row in rows] == [
        f"scan {length} forward{rest}" for length in (16, 24) for rest in ("", " and backward")
    ]
    assert [set(row.ratios) == {"plain loop", "transformers"} for row in rows] == [True, True, True, False]
    assert all(row.value > 0 and min(row.ratios.values()) > 0 for row in rows)
    monkeypatch.setattr(scan, "plain_scan", lambda case: scan.our_scan(case) * 1.01)
    with pytest.raises(RuntimeError, match="scan 16 forward, plain loop: results differ"):
        scan.bench_scan((16,), rounds=1)


def test_bench_rows_become_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "train 2048", "value": 700.0, "unit": "tok/s", "ratios": {"transformers": 1.5}}]
    result = collect.bench_result("train", json.dumps({"rows": rows}))
    budgeted = collect.bench_result("length", json.dumps({"rows": rows}), "--budget 4GiB")
    assert (budgeted.name, budgeted.command) == ("bench-length", "turbos bench length --budget 4GiB")
    monkeypatch.chdir(tmp_path)
    path = collect.write_result(result, tmp_path)
    again = read_result(path)
    assert again == result
    assert again.columns == ("measurement", "value", "unit", "times transformers")
    assert again.rows == (("train 2048", 700.0, "tok/s", 1.5),)
    assert again.command == "turbos bench train"


def test_demo_runs_become_means_over_seeds(tmp_path: Path) -> None:
    def score(accuracy: float) -> list[dict[str, object]]:
        return [{"family": "gcd", "level": 0, "mode": "on", "accuracy": accuracy, "thinking_tokens": 30.0}]

    for seed, after_rl in enumerate((0.8, 0.9)):
        scores = {"pretrain": score(0.0), "sft": score(0.6), "rl": score(after_rl)}
        (tmp_path / str(seed)).mkdir()
        outcome = {"seed": seed, "total_seconds": 600.0, "scores": scores}
        (tmp_path / str(seed) / "demo.json").write_text(json.dumps(outcome))
    result = collect.demo_result([tmp_path / "0", tmp_path / "1"])
    assert result.seeds == (0, 1)
    assert result.rows == (("gcd/0", "on", 0.0, 60.0, 85.0, 25.0, 80.0, 30.0, 30.0),)


def test_what_is_no_measurement_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main(["demo", "nowhere"]) == 2
    assert "not a measurement" in capsys.readouterr().err
