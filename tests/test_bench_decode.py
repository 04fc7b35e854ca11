"""The decode benchmark: everyone agrees before anyone is timed, and rows are named as promised; tiny sizes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from gguf_cases import gguf_model
from turbos.bench import decode_field
from turbos.bench.contestants import Worker
from turbos.bench.decode import SHAPE, Sizes, bench_decode, reading
from turbos.bench.decode_field import Field, Ours, compare_precisions
from turbos.bench.peers import load_transformers, save_for_peers
from turbos.bench.prefill import prompt
from turbos.bench.sessions import Sessions
from turbos.bench.their_sessions import TheirSessions
from turbos.common.config import load_recipe
from turbos.model.config import ModelConfig
from turbos.model.describe import describe

TOKENS = prompt(gguf_model("granite, wide").config.vocab_size, 70)


def test_the_shape_has_126_million_active_parameters() -> None:
    active = describe(load_recipe(ModelConfig, "model", SHAPE, [])).active_params
    assert 125e6 < active < 128e6


def test_rounding_shows_in_what_is_predicted() -> None:
    exact, rounded = (Ours.of(gguf_model("granite, wide"), precision, TOKENS) for precision in ("fp32", "int8"))
    assert compare_precisions(exact, exact) == (
        "fp32 against fp32, untrained weights: KL 0.0e+00 nats, the same best token 100.0%"
    )
    divergence = float(compare_precisions(exact, rounded).partition("KL ")[2].split()[0])
    assert 1e-8 < divergence < 0.1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_ours_is_timed_only_where_it_agrees_with_the_model(precision: str) -> None:
    ours = Ours.of(gguf_model("granite, wide"), precision, TOKENS)
    assert ours.sessions(3, len(TOKENS) + 4, 1, TOKENS[-1]).seconds(4) > 0
    ours.packed.norm_D[0] += 1.0
    with pytest.raises(RuntimeError, match=f"the model in {precision} differ"):
        ours.sessions(3, len(TOKENS) + 4, 1, TOKENS[-1])


def test_traffic_counts_what_a_step_moves() -> None:
    ours = Ours.of(gguf_model("granite, wide"), "int8", TOKENS)
    counted = describe(ours.config, 4)
    alone, eight = ours.traffic_bytes(1, 100), ours.traffic_bytes(8, 100)
    assert alone == counted.active_params + 100 * counted.kv_bytes_per_token + 2 * counted.state_bytes
    assert eight - 8 * (alone - counted.active_params) == counted.total_params
    assert reading()() > 0


def test_transformers_sessions_are_handed_over_whole(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = gguf_model("granite, wide")
    theirs = TheirSessions(load_transformers(save_for_peers(model, str(tmp_path))).eval(), TOKENS[:20], 2)
    theirs.lengthen(150)
    tokens_B = torch.tensor([7, 11])
    before_BV = theirs.logits(tokens_B)
    assert theirs.seconds(3) > 0 and theirs.length == 150
    assert torch.equal(theirs.logits(tokens_B), before_BV), "a timing must not change the sequences"
    ours = Ours.of(model, "fp32", TOKENS)
    sessions = Sessions(model.config, ours.packed, 2, 160, 1)
    theirs.hand_over(sessions)
    torch.testing.assert_close(sessions.step(tokens_B), before_BV, rtol=1e-4, atol=1e-4)
    # Every key counts: without the first page the next token is another.
    theirs.hand_over(sessions)
    sessions.pool.values[0][sessions.rows[0].table[0]] = 0
    assert float((sessions.step(tokens_B)[0] - before_BV[0]).abs().max()) > 1e-3


def test_rows_against_everyone_there(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("xllamacpp")
    sizes = Sizes(
        context=48, steps=2, rounds=1, deep=128, deep_batch=2, deep_steps=2, batches=(1, 2), threads=(1,),
        kinds=("f32", "q8_0", "q4_0"), kinds_together=("f32",),
    )  # fmt: skip
    rows = {row.name: row for row in bench_decode(sizes, gguf_model("granite, wide"))}
    rests = ("b1 t1", "b2 t1", "b2 0.125k")
    fused = [f"decode {precision} {rest}" for rest in rests for precision in ("fp32", "bf16", "int8")]
    engine = ["engine int8 b1 t1", "engine int8 b2 t1", "engine fork 8 of 48", "engine 64 requests"]
    assert list(rows) == fused + engine
    both = {"transformers", "read floor"}
    assert set(rows["decode fp32 b1 t1"].ratios) == {*both, "llama.cpp"}
    assert set(rows["decode int8 b1 t1"].ratios) == {*both, "llama.cpp", "llama.cpp q4_0"}
    assert set(rows["decode int8 b2 t1"].ratios) == both
    assert set(rows["decode fp32 b2 0.125k"].ratios) == both
    assert all(row.value > 0 and all(ratio > 0 for ratio in row.ratios.values()) for row in rows.values())
    assert 0.01 < rows["engine int8 b2 t1"].ratios["fused step"] < 1.5
    assert rows["engine fork 8 of 48"].ratios["prefills"] > 1.5 and 1 <= rows["engine 64 requests"].value < 3
    assert "int8 against fp32, untrained weights: KL" in capsys.readouterr().err


def test_absent_peers_are_left_out_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    hidden = ("transformers", "xllamacpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else found(name))
    everyone: Field = decode_field.assemble(gguf_model("granite, wide"), TOKENS, str(tmp_path))
    assert everyone.transformers is None and everyone.files == {}
    told = capsys.readouterr().err
    assert "transformers is left out" in told and "llama.cpp is left out" in told


def test_llama_decodes_requests_together(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    path = decode_field._write_file(gguf_model("granite, wide"), tmp_path, "f32")
    with Worker("llama.cpp", "llama.cpp", Path(sys.executable), path, 1, 96, requests=3) as worker:
        assert worker.decode(TOKENS, 4) > 0
