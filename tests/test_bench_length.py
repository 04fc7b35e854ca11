"""The length benchmark: fair shapes, honest sessions, rows as promised; speeds themselves are measured elsewhere."""

from __future__ import annotations

import doctest
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turbos.bench import length_budget, length_plan
from turbos.bench.length import LENGTHS, Plan, _require_agreement, bench_length
from turbos.bench.length_chart import draw_length, value_of
from turbos.bench.length_plan import (
    ATTENTION,
    HYBRID,
    MAMBA,
    SHAPES,
    Size,
    floor_ratio,
    held_bytes,
    held_ratio,
    require_equal_sizes,
    shape_config,
)
from turbos.bench.length_stack import Stack
from turbos.bench.rows import Row
from turbos.bench.sessions import Sessions
from turbos.cli import bench as cli_bench
from turbos.cli import main as cli
from turbos.common.errors import UserError
from turbos.engine.fused.weights import pack
from turbos.model.describe import describe
from turbos.model.generate import generate
from turbos.model.lm import LanguageModel

TINY = Size(vocab_size=64, hidden_size=64, num_heads=2, mamba_heads=4, mamba_state=16, ffn_size=128)
PROMPT = [5, 9, 2, 40, 11, 3] * 15


@pytest.fixture(scope="module")
def stack() -> Stack:
    """The tiny hybrid."""
    return Stack.of(HYBRID, TINY)


@pytest.mark.parametrize(
    "module", ["bench.length", "bench.length_plan", "bench.length_budget", "bench.length_chart", "cli.bench"]
)
def test_examples_run(module: str) -> None:
    found = doctest.testmod(importlib.import_module(f"turbos.{module}"))
    assert found.attempted > 0 and found.failed == 0


def test_shapes_differ_in_their_mixers_alone() -> None:
    require_equal_sizes()
    configs = [shape_config(shape) for shape in SHAPES]
    assert {replace(config, layers="A") for config in configs} == {replace(configs[0], layers="A")}
    assert [config.layers.count("A") for config in configs] == [1, 12, 0]
    assert [config.layers.count("M") for config in configs] == [8, 0, 9]
    active = [describe(config).active_params for config in configs]
    assert max(active) / min(active) < 1.03


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(UserError, match=r"attention has .* are wanted"):
        require_equal_sizes(replace(TINY, ffn_size=512))


def test_the_promised_ratios_lie_below_what_memory_traffic_allows() -> None:
    assert floor_ratio(HYBRID, ATTENTION, 32768) > 5.5 and floor_ratio(HYBRID, ATTENTION, 131072) > 8.5
    assert held_ratio(HYBRID, ATTENTION, 32768) > 10 and held_bytes(HYBRID, 262_144) < 2e9
    assert floor_ratio(HYBRID, ATTENTION, min(LENGTHS)) < 1


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_sessions_hold_what_the_plan_counts(shape: length_plan.Shape) -> None:
    stack = Stack.of(shape, TINY)
    pool = stack.sessions(3, 128, 64).pool
    held = sum(tensor.nbytes for tensor in (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values))
    assert held == 3 * held_bytes(shape, 192, TINY)


def test_sessions_go_on_like_generate(stack: Stack) -> None:
    sessions = Sessions(stack.config, stack.packed, 3, len(PROMPT) + 8, 1)
    other = Sessions(stack.config, stack.packed, 1, len(PROMPT), 1)
    other.read(stack.model, PROMPT[:-1], segment=32)
    sessions.take_over(other)
    found, tokens_B = [], torch.full((3,), PROMPT[-1])
    for offset in range(6):
        logits_BV = sessions.step(tokens_B, offset)
        assert torch.equal(logits_BV, logits_BV[:1].expand_as(logits_BV))
        tokens_B = logits_BV.argmax(-1)
        found.append(int(tokens_B[0]))
    assert tuple(found) == generate(stack.model, [PROMPT], 6)[0].ids


def test_timing_leaves_lengths_and_room_is_checked(stack: Stack) -> None:
    sessions = stack.sessions(2, 100, 4)
    assert sessions.seconds(4) > 0 and sessions.seconds(4, batch=1) > 0
    assert sessions.read_seconds(stack.model, 40) > 0
    assert [row.length for row in sessions.rows] == [100, 100]
    with pytest.raises(UserError, match="position 104 lies beyond"):
        sessions.seconds(5)
    with pytest.raises(UserError, match="a segment of 101 tokens"):
        sessions.read_seconds(stack.model, 101)


def test_what_disagrees_is_not_timed(stack: Stack) -> None:
    sessions = stack.sessions(1, 70, 8)
    _require_agreement(stack, sessions, 70)
    other = LanguageModel(stack.config).init_weights(seed=1)
    wrong = replace(stack, packed=pack(other, "int8"))
    with pytest.raises(RuntimeError, match=r"hybrid.* at 70 differ"):
        _require_agreement(wrong, wrong.sessions(1, 70, 8), 70)


def test_rows_are_named_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_length(
        Plan((8, 70), budget=40_000_000, rounds=1, decode_rounds=1, segment=32, size=TINY, long_session=None)
    )
    kinds = ("decode int8", "prefill", "bytes", "aggregate", "aggregate mamba")
    assert [row.name for row in rows] == [f"{kind} {length}" for length in (8, 70) for kind in kinds]
    for row in rows:
        assert set(row.ratios) == ({"attention"} if "mamba" in row.name else {"attention", "mamba"})
        assert row.value > 0 and min(row.ratios.values()) > 0
    assert rows[2].ratios["attention"] == held_ratio(HYBRID, ATTENTION, 8, TINY) < 1
    told = capsys.readouterr().err
    assert "bytes 8: not better than the attention twin (0.59)" in told and "(AD)*12, 0.7 M active" in told
    assert draw_length(rows, tmp_path / "new" / "length.png").read_bytes().startswith(b"\x89PNG")


def test_values_of_others_follow_from_ratios() -> None:
    row = Row("bytes 2048", 5.0, "MB", {"attention": 4.0, "mamba": 0.5})
    assert [value_of(shape, row, faster_up=False) for shape in (HYBRID, ATTENTION, MAMBA)] == [5.0, 20.0, 2.5]
    assert value_of(ATTENTION, row, faster_up=True) == 1.25


def test_a_budget_is_filled_and_not_exceeded(stack: Stack) -> None:
    budget = 60_000_000
    count = length_budget.sessions_that_fit(stack, 1000, budget)
    pool = Sessions(stack.config, stack.packed, 1, 1000 + length_budget.STEPS, 1).pool
    a_session = sum(tensor.nbytes for tensor in (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values))
    weights = 5 * describe(stack.config).total_params
    assert count > 10 and 0 < budget - weights - count * a_session < 1.2 * a_session
    assert length_budget.sessions_that_fit(stack, 1000, weights) == 0


def test_no_row_where_a_shape_does_not_fit(stack: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    stacks = [Stack.of(shape, TINY) for shape in SHAPES]
    assert length_budget.aggregate_rows(131_072, stacks, 20_000_000, rounds=1) == []
    assert "no session of 131072 tokens fits for hybrid, attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["length", "--lengths", "2k"], "'2k' is no list of lengths"),
        (["length", "--lengths", "0"], "lengths must be at least 2 tokens"),
        (["length", "--budget", "lots"], "'lots' is no size"),
        (["train", "--budget", "4GiB"], "--budget says nothing with train"),
        (["decode", "--lengths", "64"], "--lengths says nothing with decode"),
        (["scan", "--png", "a.png"], "--png says nothing with scan"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_lengths_are_read_in_any_order() -> None:
    assert cli_bench.parse_lengths("8192, 2048,8192") == (2048, 8192)


@pytest.mark.slow
def test_the_command_prints_rows_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "length.png"
    assert cli.main(["bench", "length", "--lengths", "64", "--budget", "200MB", "--json", "--png", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {"decode int8 64", "prefill 64", "bytes 64", "aggregate 64", "aggregate mamba 64"} < set(rows)
    assert out.exists() and 300 < rows["process 262144"]["value"] < 2000
