"""The certificate's rows of the engine: healthy ones, what they say, and faults planted in the engine's real code.

Each fault changes one line of the engine: of its memory, its packing, its program, its sampler. `where` is what the
named row must say; rows in `quiet` must stay green.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model_cases import tiny_model
from turbos.common.records import Completion
from turbos.engine import cache, engine, pool, runner, sampler, view, writer
from turbos.engine.fused import build, weights
from turbos.engine.scheduler import Scheduler
from turbos.model.checkpoint import save_model
from turbos.verify.answers import EnginePath
from turbos.verify.certificate import verify
from turbos.verify.engine_rows import shortened, wrongly_rounded
from turbos.verify.same import Pair, difference, first_unlike
from verify_cases import SHAPES, Fault, check_named, engine_certificate, failed, plant, saved

TORCH, FUSED, INT8 = (f"engine == model ({path})" for path in ("torch fp32", "fused fp32", "fused int8"))
ALONE, KEPT = "alone == crowd (fused int8)", "kept state == fresh (fused int8)"
ROWS = (TORCH, FUSED, INT8, ALONE, KEPT)
KEPT_TORCH = "kept state == fresh (torch fp32)"
ONLY_IN_FULL = (
    KEPT_TORCH,
    *(f"{row} (fused fp32)" for row in ("alone == crowd", "kept state == fresh")),
    *(f"{row} (fused bf16)" for row in ("engine == model", "alone == crowd", "kept state == fresh")),
)
MAMBA, EXPERTS, ATTENTION = "sublayers.0 (Mamba2", "sublayers.1 (mixture of experts", "sublayers.2 (attention"

FAULTS = {
    "a scan state is not zeroed": Fault(
        *(pool.StatePool, "alloc_slot", "self.scan_SX[slot].zero_()", "pass"),
        *(TORCH, f"a stack that ends with {MAMBA}"),
    ),
    "a conv state is not zeroed": Fault(
        *(pool.StatePool, "alloc_slot", "self.conv_SX[slot].zero_()", "pass"),
        *(TORCH, f"a stack that ends with {MAMBA}"),
    ),
    "scan states of a batch are not written back": Fault(
        *(pool.StatePool, "view", "self.scan_SX[index_B] = scan_BX", "pass"),
        *(TORCH, f"token 2 first|a stack that ends with {MAMBA}"),
        quiet=(FUSED, INT8, ALONE, KEPT),
    ),
    "copy on write is forgotten": Fault(
        *(pool.StatePool, "_shared", "> 1]", "> 99]"),
        *(FUSED, f"answer 0 (prompt of 62 tokens, seed 30)|a stack that ends with {ATTENTION}"),
    ),
    "copy on write copies the keys of another page": Fault(
        *(pool.StatePool, "_own_copy", "self.copy_page(page, copy)", "self.copy_page(0, copy)"),
        *(KEPT, "branched off in the middle, token 0 first: "),
    ),
    "pages are gathered in another order": Fault(
        *(
            view.PagedKeyValues,
            "_first",
            "self.tables.pages_BP[:, :pages]]",
            "self.tables.pages_BP[:, :pages].flip(1)]",
        ),
        *(TORCH, f"a stack that ends with {ATTENTION}"),
    ),
    "the fused step gets pages in another order": Fault(
        *(runner.Runner, "_fused", "[[*row.table, ", "[[*row.table[::-1], "),
        *(FUSED, f"a stack that ends with {ATTENTION}"),
        quiet=(TORCH,),
    ),
    "one entry of a page table is another row's": Fault(
        *(runner.Runner, "_fused", "[[*row.table, ", "[[*rows[0].table[:1], *row.table[1:], "),
        *(ALONE, "answer 0 (prompt of 62 tokens, seed 30), token 1 first: "),
        quiet=(TORCH,),
    ),
    "positions in the fused step are one behind": Fault(
        *(runner.Runner, "_fused", "[row.length for row in rows]", "[max(row.length - 1, 0) for row in rows]"),
        *(FUSED, f"token 1 first: |a stack that ends with {ATTENTION}"),
        quiet=(TORCH,),
    ),
    "the first token's hidden state for the last": Fault(
        *(runner.Runner, "read", "hidden_TD[-1]", "hidden_TD[0]"),
        *(TORCH, "token 0 first: |a stack without sublayers differs too"),
    ),
    "queries without their norm": Fault(
        *(build._Writer, "attention", "self._address(sublayer.q_norm_E)", "0"),
        *(FUSED, f"token 1 first: |a stack that ends with {ATTENTION}"),
        shape="turbos",
        quiet=(TORCH,),
    ),
    "rotary positions that are not stretched": Fault(
        *(build, "rotary_frequencies", "config.rope_alpha ** (width / (width - 2))", "1.0"),
        *(FUSED, f"token 1 first: |a stack that ends with {ATTENTION}"),
        shape="turbos",
        changes={"rope_alpha": 50.0},
        quiet=(TORCH,),
    ),
    "the selection bias is ignored": Fault(
        *(weights, "_pack_sublayer", "_copy(mixer.selection_bias) if steered else None", "None"),
        *(FUSED, f"a stack that ends with {EXPERTS}"),
        shape="nemotron",
        quiet=(TORCH,),
    ),
    "gates are not scaled": Fault(
        *(build, "_shape_fields", '"router_scale": config.router_scale', '"router_scale": 1.0'),
        *(FUSED, f"token 1 first: |a stack that ends with {EXPERTS}"),
        shape="nemotron",
        quiet=(TORCH,),
    ),
    "gates do not sum to 1": Fault(
        *(build, "_shape_fields", "int(config.router_normalise)", "0"),
        *(FUSED, f"token 1 first: |a stack that ends with {EXPERTS}"),
        shape="nemotron",
        quiet=(TORCH,),
    ),
    "a residual multiplier is forgotten": Fault(
        *(build, "_shape_fields", '"residual_multiplier": config.residual_multiplier', '"residual_multiplier": 1.0'),
        *(FUSED, f"token 1 first: |a stack that ends with {MAMBA}"),
        quiet=(TORCH,),
    ),
    "two sublayers share their conv inputs": Fault(
        *(build._Writer, "mamba", "conv_start=place.conv.start", "conv_start=0"),
        *(FUSED, "a stack that ends with sublayers.4 (Mamba2"),
        quiet=(TORCH,),
    ),
    "embeddings are not multiplied": Fault(
        *(build, "_shape_fields", '"embedding_multiplier": config.embedding_multiplier', '"embedding_multiplier": 1.0'),
        *(FUSED, "token 1 first: |a stack without sublayers differs too"),
        quiet=(TORCH,),
    ),
    "one scale for all rows": Fault(
        *(weights, "pack_matrix", "flat.abs().amax(1) / 127", "flat.abs().amax().expand(len(flat)).clone() / 127"),
        *(INT8, " was changed by |int8 allows 3.9e-03"),
        quiet=(TORCH, FUSED, ALONE),
    ),
    "scales are dropped in the model": Fault(
        *(weights.Matrix, "dequantised", "wide * self.scales[:, None]", "wide * self.scales.mean()"),
        *(INT8, "embed_weight was changed by "),
        quiet=(TORCH, FUSED, ALONE),
    ),
    "the model keeps a head that was not rounded": Fault(
        *(weights.PackedModel, "round_to_packed", "[(model.head_weight, self.head)]", "[]"),
        *(INT8, "a stack without sublayers differs too: embedding, head"),
        quiet=(TORCH, FUSED, ALONE),
    ),
    "noise by the place in the batch": Fault(
        *(
            sampler.Sampler,
            "_drawn",
            "[writer.seed for writer in writers]",
            "[row for row, writer in enumerate(writers)]",
        ),
        *(ALONE, "answer 1 (prompt of 62 tokens, seed 31), token "),
    ),
    "noise by the number of written tokens": Fault(
        *(
            sampler.Sampler,
            "_drawn",
            "[writer.position for writer in writers]",
            "[len(writer.ids) for writer in writers]",
        ),
        *(TORCH, "token 0 first: token |, the model chooses |a stack without sublayers differs too"),
        quiet=(KEPT, ALONE),
    ),
    "an answer that stepped back skips a token": Fault(
        *(
            engine.Engine,
            "_write_batch",
            "if row.length == batch[place].total]",
            "if row.length >= batch[place].total - 1]",
        ),
        *(ALONE, "answer 2 (prompt of 62 tokens, seed 32), token "),
        quiet=(KEPT,),
    ),
    "an answer that stepped back reads on with what it wrote last": Fault(
        *(
            engine.Engine,
            "_write_batch",
            "sequence.ids(row.length, row.length + 1)[0]",
            "sequence.ids(0, sequence.total)[-1]",
        ),
        *(FUSED, "answer 2 (prompt of 62 tokens, seed 32), token "),
        quiet=(KEPT,),
    ),
    "a kept state goes on with its row": Fault(
        *(cache.StateCache, "take", "self.pool.scan_SX[row.slot].clone()", "self.pool.scan_SX[row.slot]"),
        *(KEPT, "token 0 first: "),
    ),
    "a kept state is one token short": Fault(
        *(cache.StateCache, "restore", "row.length = snapshot.length", "row.length = snapshot.length - 1"),
        *(KEPT, "branched off in the middle: 67 of 68 tokens came from a kept state"),
    ),
    "nothing is ever found": Fault(
        *(Scheduler, "_known", "return self.cache.look(sequence.prompt_ids)", "return None"),
        *(KEPT, "branched off in the middle: 0 of 68 tokens came from a kept state"),
        quiet=(TORCH, FUSED, INT8, ALONE),
    ),
    "a file's keys go to other pages": Fault(
        *(engine, "place_session", "zip(snapshot.pages, tensors", "zip(snapshot.pages[::-1], tensors"),
        *(KEPT, "restored from a file, token 0 first: |(1 of 7 answers differ)"),
        quiet=(TORCH, FUSED, INT8, ALONE),
    ),
    "a stop is one token late": Fault(
        *(writer.Writer, "accept", "len(self.ids) == self.params.max_new_tokens", "len(self.ids) > 99"),
        *(TORCH, "answer 0 (prompt of 62 tokens, seed 30) ended after 100 tokens as 'length'"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    directory = saved(tmp_path / "model", fault.shape, **fault.changes)
    plant(monkeypatch, fault.owner, fault.function, fault.old, fault.new)
    report = engine_certificate(directory, tmp_path / "scratch", (fault.check, *fault.quiet))
    check = check_named(report, fault.check)
    assert not report.ok and not check.ok, failed(report)
    for words in fault.where.split("|"):
        assert words in check.where, check.where
    assert not set(fault.quiet) & set(failed(report)), failed(report)
    assert not check.error <= check.tolerance


@pytest.mark.parametrize("shape", SHAPES)
def test_a_healthy_engine_passes_and_says_what_it_did(shape: str, tmp_path: Path) -> None:
    report = engine_certificate(saved(tmp_path / "model", shape), tmp_path / "scratch")
    assert report.ok, failed(report)
    names = [check.name for check in report.checks]
    if shape == "mamba1":
        assert names == [TORCH, KEPT_TORCH]
        assert report.left_out == ("engine (fused), alone == crowd: the fused step has no Mamba-1 sublayers (S)",)
    else:
        assert names == list(ROWS) and report.left_out == (f"{', '.join(ONLY_IN_FULL)}: not in --quick",)
        assert "KL to the checkpoint's own weights" in check_named(report, INT8).note
    for check in report.checks:
        assert check.error <= check.tolerance / 3 and check.why
        # Without anybody stepping back a crowd proves little.
        assert "preemptions" in check.note or "tokens known at most" in check.note


def test_models_without_attention_and_short_positions_pass(tmp_path: Path) -> None:
    for number, options in enumerate(({"layers": "MFMD"}, {"layers": "MFAD", "max_positions": 6}, {"layers": "FD"})):
        directory = tmp_path / str(number)
        directory.mkdir()
        save_model(tiny_model(**options), directory)
        report = engine_certificate(directory, tmp_path / f"scratch-{number}")
        assert report.ok and len(report.checks) == len(ROWS), failed(report)


def test_in_full_length_every_path_is_asked_everything(tmp_path: Path) -> None:
    report = verify(saved(tmp_path / "model", "turbos"))
    names = [check.name for check in report.checks]
    assert report.ok and {*ROWS, *ONLY_IN_FULL} <= set(names)
    assert not any("--quick" in line for line in report.left_out)


def test_another_implementation_has_no_rows_of_the_engine(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    report = verify(saved(tmp_path / "model", "llama"), quick=True, implementation="transformers")
    assert not any("engine" in check.name or "kept" in check.name for check in report.checks)
    assert report.left_out == ("engine: it runs this project's own model only",)


def test_the_model_that_is_verified_stays_as_it_is(tmp_path: Path) -> None:
    # Engines round weights and switch gradients off: they work on copies.
    report = verify(saved(tmp_path / "model", "granite"), quick=True)
    assert check_named(report, "save -> load == original").ok
    assert check_named(report, "parameters present, used, trained").ok


def test_what_an_engine_refuses_is_a_row_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbos.engine.memory.available_memory", lambda device: 1000)
    report = engine_certificate(saved(tmp_path / "model", "llama"), tmp_path / "scratch", (TORCH, KEPT))
    assert len(report.checks) == 2 and not any(check.ok for check in report.checks)
    assert all(where.startswith("memory: one session") for where in failed(report).values()), failed(report)


def test_an_engine_that_never_ends_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbos.verify.answers.PATIENCE", 1)
    report = engine_certificate(saved(tmp_path / "model", "llama"), tmp_path / "scratch", (TORCH,))
    assert "of 9 answers never ended" in check_named(report, TORCH).where


# Parts


def answer_of(ids: tuple[int, ...], logprobs: tuple[float, ...]) -> Completion:
    return Completion(prompt_ids=(1,), ids=ids, logprobs=logprobs, finish="length")


def test_the_first_unlike_token_is_named() -> None:
    one = answer_of((5, 6, 7), (-0.5, -1.0, -2.0))
    same, other, shifted = one, answer_of((5, 9, 7), (-0.5, -1.0, -2.0)), answer_of((5, 6, 7), (-0.5, -1.0, -2.25))
    assert difference(Pair("a", one, same), "here", "there") == (0.0, "")
    assert difference(Pair("a", one, other), "here", "there") == (1.0, "a, token 1 first: 6 here, 9 there")
    assert difference(Pair("a", one, shifted), "here", "there")[0] == 0.25
    assert difference(Pair("a", one, answer_of((5,), (-0.5,))), "here", "there") == (1.0, "a: 3 tokens here, 1 there")
    broken = answer_of((5, 6, 7), (-0.5, float("nan"), -2.0))
    check = first_unlike([Pair("a", one, same), Pair("b", one, broken)], "here", "there", "why", "note")
    assert not check.ok and not check.error <= 0 and "b, token 1 first" in check.where
    assert first_unlike([Pair("a", one, same)], "here", "there", "why", "note").ok


def test_rounding_is_judged_by_each_rows_largest_number() -> None:
    model, other = tiny_model("MFAD"), tiny_model("MFAD")
    assert wrongly_rounded(model, other, EnginePath("fused", "fp32")) == ""
    weight = other.sublayers[0].mixer.in_proj.weight
    with torch.no_grad():
        weight[3, 2] += 0.3 / 127 * weight[3].abs().max()
    assert "in_proj.weight was changed by 2.4e-03" in wrongly_rounded(model, other, EnginePath("fused", "fp32"))
    assert wrongly_rounded(model, other, EnginePath("fused", "int8")) == ""
    with torch.no_grad():
        other.sublayers[1].mixer.router_weight[0, 0] += 1e-6
    assert "router_weight was changed" in wrongly_rounded(model, other, EnginePath("fused", "int8"))


def test_a_shortened_model_is_the_beginning_of_the_whole_one() -> None:
    model = tiny_model("MFAD")
    seen = []
    model.sublayers[1].register_forward_hook(lambda module, args, result: seen.append(result))
    from turbos.common.records import Documents

    tokens, documents = torch.arange(9), Documents.from_lengths([9])
    with torch.no_grad():
        model(tokens, documents)
        short, none = shortened(model, 2), shortened(model, 0)
        assert short.config.layers == "MF"
        got = []
        short.sublayers[1].register_forward_hook(lambda module, args, result: got.append(result))
        short(tokens, documents)
        assert torch.equal(got[0], seen[0])
        embedded = torch.nn.functional.embedding(tokens, model.embed_weight) * model.config.embedding_multiplier
        none.sublayers[0].register_forward_hook(lambda module, args, result: got.append(result))
        none(tokens, documents)
        assert torch.equal(got[1], embedded)
