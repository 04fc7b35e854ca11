"""The experiments of pretraining at toy size: every run once, results with provenance, resumed where they stopped."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from turbos.bench.pretraining import (
    FRACTIONS,
    curve,
    main,
    optimizers,
    parabola_minimum,
    shares,
    tokens_to_reach,
)
from turbos.bench.tables import read_result, render_table, write_result
from turbos.common.errors import UserError

SMALL = (
    *("--model.vocab_size=320", "--model.hidden_size=16", "--model.layers=MFAF", "--model.mamba_heads=2"),
    *("--model.mamba_head_dim=16", "--model.mamba_state=8", "--model.num_heads=2", "--model.num_kv_heads=1"),
    *("--model.head_dim=8", "--model.expert_size=16", "--model.shared_expert_size=16"),
    *("--train.steps=8", "--train.tokens_per_step=256", "--train.micro_batch_tokens=256", "--train.eval_every=8"),
    *("--train.threads=1", "--data.longest_document=128", "--data.held_out_tokens=256"),
)


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that make a toy of any recipe: two local corpora, one in each language."""
    folder = tmp_path_factory.mktemp("corpora")
    draw = random.Random(0)
    for name, letters in (("en", "abdegilmnorstu"), ("zh", "天地人大小上下水火山")):
        texts = ["".join(draw.choices(letters + " ", k=draw.randint(20, 200))) for _ in range(200)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = json.dumps({str(folder / f"{name}.jsonl"): 1.0 for name in ("en", "zh")})
    languages = json.dumps({str(folder / f"{name}.jsonl"): name for name in ("en", "zh")})
    return (*SMALL, f"--data.sources={sources}", f"--data.languages={languages}", "--data.english_share=0.5")


def test_shares_are_run_at_equal_tokens_and_pull_the_languages_apart(tmp_path: Path, common: tuple[str, ...]) -> None:
    result = shares(tmp_path, [0], [*common, "--train.steps=30", "--train.eval_every=30"])
    assert [row[0] for row in result.rows] == [30, 50, 70]
    tokens = [int(row[1]) for row in result.rows]  # type: ignore[arg-type]
    assert max(tokens) / min(tokens) < 1.1
    english, chinese = ([float(row[place]) for row in result.rows] for place in (2, 3))  # type: ignore[arg-type]
    assert english[0] > english[2] and chinese[0] < chinese[2]
    for row in result.rows:
        assert row[4] == pytest.approx((float(row[2]) + float(row[3])) / 2, abs=1e-4)  # type: ignore[arg-type]
    assert "lowest of the parabola" in result.command and result.seeds == (0,)
    assert read_result(write_result(result, tmp_path)) == result and "| English % |" in render_table(result)


def test_muon_and_adamw_differ_in_nothing_else_and_no_run_is_done_twice(
    tmp_path: Path, common: tuple[str, ...]
) -> None:
    result = optimizers(tmp_path, [0, 1], common)
    assert [(row[0], row[1]) for row in result.rows] == [
        ("adamw", 100.0),
        *(("muon", 100 * fraction) for fraction in FRACTIONS),
    ]
    recipes = {path.parent.name: path.read_text().splitlines() for path in tmp_path.glob("*/recipe.yaml")}
    assert len(recipes) == 2 * (1 + len(FRACTIONS))
    pairs = zip(recipes["adamw-8-seed-0"], recipes["muon-8-seed-0"], strict=True)
    assert [pair for pair in pairs if pair[0] != pair[1]] == [("  kind: adamw", "  kind: muon")]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    shutil.rmtree(tmp_path / "muon-6-seed-1")
    again = optimizers(tmp_path, [0, 1], common)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    assert [path.parent.name for path in before if before[path] != after[path]] == ["muon-6-seed-1"]
    # Seconds of the run that was done again differ; what was learnt does not.
    assert [row[:4] for row in again.rows] == [row[:4] for row in result.rows]


def test_a_curve_goes_from_the_first_to_the_last_evaluation(tmp_path: Path, common: tuple[str, ...]) -> None:
    shares(tmp_path, [0], [*common, "--train.steps=30", "--train.eval_every=2"])
    result = curve(tmp_path / "english-50-seed-0", "shares")
    steps = [int(row[0]) for row in result.rows]  # type: ignore[arg-type]
    assert len(steps) == 12 and steps[0] == 2 and steps[-1] == 30 and steps == sorted(set(steps))
    bits = [float(row[4]) for row in result.rows]  # type: ignore[arg-type]
    assert bits[-1] < bits[0] and len(result.columns) == 6
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "tokens": 8, "seconds": 1.0}\n')
    with pytest.raises(UserError, match="no held-out figures"):
        curve(tmp_path / "empty", "shares")


def test_interpolations_are_right_and_honest() -> None:
    points = [(0.5, 3.0), (0.75, 2.25), (1.0, 2.0)]
    assert tokens_to_reach(2.25, points) == 0.75 and tokens_to_reach(3.5, points) == 0.5
    assert tokens_to_reach(2.125, points) == pytest.approx(0.875)
    assert tokens_to_reach(1.9, points) is None
    assert parabola_minimum([30, 50, 70], [3.0, 2.0, 3.0]) == pytest.approx(50)
    assert parabola_minimum([30, 50, 70], [3.0, 2.0, 1.5]) == 70
    assert parabola_minimum([30, 50, 70], [2.0, 3.0, 2.5]) == 30


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shares", "--seeds", "a"], "whole numbers"),
        (["optimizers", "--train.stepps=3"], "nearest known key is 'train.steps'"),
        (["curve", "nowhere", "--name", "x"], "no metrics at"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pretraining: error: ") and said in line
