"""The certificate of healthy models, its forms, and its parts: comparison, router ties, hooks, truth, explanations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model_cases import VARIANTS, logits_of, random_tokens, tiny_config, tiny_model
from tiny import tiny_tokenizer
from turbos.cli.main import main
from turbos.common.errors import UserError
from turbos.common.records import Documents
from turbos.model.checkpoint import load_model, save_model
from turbos.model.config import ModelConfig
from turbos.model.families import family_of
from turbos.verify import peer as peer_module
from turbos.verify.certificate import run_check, subject_of, verify
from turbos.verify.checks import CHECKS
from turbos.verify.compare import Routers, amount, compare, first_difference, relative_error
from turbos.verify.implementation import OurModel, sublayers_of, tapped
from turbos.verify.readings import GATES, LOGITS, RESIDUAL, ROUTER, Names, Place, Reading
from turbos.verify.report import Check, Report, card_section, table_of
from turbos.verify.subject import judge, plan_of, separate, unsteady_rows
from turbos.verify.truth import Truth
from verify_cases import SHAPES, certificate, check_named, failed, saved

NATIVE_ROWS = ("checkpoint == native (transformers)", "export == native (transformers)")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_healthy_model_passes(shape: str, tmp_path: Path) -> None:
    report = certificate(saved(tmp_path / "model", shape))
    assert report.ok and not failed(report), failed(report)
    names = [check.name for check in report.checks]
    expected = ["packed == separate", *(name for name, _ in CHECKS)]
    if shape == "llama":
        expected.remove("chunk size unseen")
    assert names[: len(expected)] == expected
    assert names[len(expected)] == "engine == model (torch fp32)"
    if shape in ("turbos", "mamba1"):
        assert not any("native" in name for name in names)
        assert any("family turbos" in line for line in report.left_out)
    # A tolerance that healthy models come near is no tolerance.
    assert all(check.error <= check.tolerance / 3 for check in report.checks)
    assert all(check.why and check.seconds > 0 for check in report.checks)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_passes_in_full_length(variant: str, tmp_path: Path) -> None:
    save_model(tiny_model(**VARIANTS[variant]), tmp_path)
    report = verify(tmp_path)
    assert report.ok, failed(report)


@pytest.mark.parametrize("shape", ["granite", "granite dense", "nemotron", "llama"])
def test_transformers_agrees_natively(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    report = certificate(saved(tmp_path / "model", shape))
    assert all(check_named(report, name).ok for name in NATIVE_ROWS)
    assert ("native as shipped (transformers)" in [check.name for check in report.checks]) == (shape == "nemotron")


def test_a_model_that_is_only_loaded_here_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbos.verify.native.transformers_version", lambda: None)
    report = certificate(saved(tmp_path / "model", "granite"))
    assert report.ok and any("transformers" in line and "not installed" in line for line in report.left_out)
    assert not any("transformers" in check.name for check in report.checks)


def test_positions_that_end_early_are_respected(tmp_path: Path) -> None:
    for quick in (True, False):
        for most in (1, 2, 5, 40):
            plan = plan_of(tiny_config(max_positions=most), quick)
            longest = max(*plan.packed, *plan.truth, sum(plan.segments), max(plan.prompts) + plan.steps)
            assert longest <= max(most, 8), (most, plan)
    save_model(tiny_model(max_positions=6), tmp_path)
    assert certificate(tmp_path).ok


# The command


def test_the_command_prints_json_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path / "model", "turbos")
    assert main(["verify", str(directory), "--quick", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is True and printed["family"] == "turbos"
    assert {"name", "ok", "error", "tolerance", "where"} <= set(printed["checks"][0])
    assert all(check["where"] == "" for check in printed["checks"])


def test_the_command_says_failed_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(tmp_path / "model", "turbos")
    monkeypatch.setattr("turbos.model.mixers.rms_norm", lambda x, weight, eps: x * weight)
    assert main(["verify", str(directory), "--quick", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["ok"] is False and any("queries" in check["where"] for check in printed["checks"])
    assert main(["verify", str(directory), "--quick"]) == 1
    shown = capsys.readouterr().out
    assert "FAILED" in shown and "left out: native (transformers): family turbos" in " ".join(shown.split())


def test_the_card_is_written_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = saved(tmp_path / "model", "turbos")
    assert main(["verify", str(directory), "--quick"]) == 0
    assert not (directory / "README.md").exists()
    for _ in range(2):
        assert main(["verify", str(directory), "--quick", "--card"]) == 0
    card = (directory / "README.md").read_text()
    assert card.count("## Parity certificate") == 1 and "| packed == separate | ok |" in card
    capsys.readouterr()


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_anything_runs(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", "granite")
    tiny_tokenizer().save(directory)
    with pytest.raises(UserError, match=r"tokenizer\.json: \d+ tokens, but tensor model\.embed_tokens\.weight has 61"):
        verify(directory, quick=True)


@pytest.mark.parametrize("words", [[], ["--implementation", "transformers"]], ids=str)
def test_what_is_no_checkpoint_is_one_line(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tmp_path), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    directory = saved(tmp_path / "model", "turbos")
    if words:
        with pytest.raises(UserError, match="family turbos has no code in transformers"):
            certificate(directory, "transformers")


# Rows where rounding decides


def test_a_row_that_plain_fp32_misses_too_is_set_aside_and_no_other(tmp_path: Path) -> None:
    directory, scratch = saved(tmp_path / "model", "granite", embedding_multiplier=1.0), tmp_path / "scratch"
    scratch.mkdir()
    ours = OurModel(load_model(directory), family_of(tiny_config(**SHAPES["granite"])))
    subject = subject_of(directory, scratch, ours, True, "turbos")
    texts = subject.texts([40], seed=0)
    want = separate(ours, texts)
    true_TV, fp32_TV = (truth.whole(texts)[LOGITS].double() for truth in (subject.truth, subject.truth.rounded()))
    errors_T = (fp32_TV - true_TV).abs().amax(1) / true_TV.abs().max()
    # A tolerance so small that rounding exceeds a quarter of it in some rows and not in others.
    tolerance = 4 * float(errors_T.sort().values[30])
    assert unsteady_rows(subject, want(True), tolerance).tolist() == (errors_T > tolerance / 4).tolist()
    for row, excused in ((int(errors_T.argmax()), True), (int(errors_T.argmin()), False)):

        def moved(everything: bool, row: int = row) -> Reading:
            reading, rows = Reading(1), ours.read(texts, None, everything)
            rows[LOGITS][row] += 3 * tolerance * rows[LOGITS].abs().max()
            reading.add([0], [40], rows)
            return reading

        check = judge(subject, moved, want, tolerance, "")
        assert check.ok == excused and ("9 of 40 rows set aside" in check.note), check
        assert excused or f"document 0, token {row}" in check.where


def test_bits_are_never_set_aside(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", "granite")
    ours = OurModel(load_model(directory), family_of(tiny_config(**SHAPES["granite"])))
    subject = subject_of(directory, tmp_path, ours, True, "turbos")
    texts = subject.texts([20], seed=0)

    def moved(everything: bool) -> Reading:
        reading, rows = Reading(1), ours.read(texts, None, everything)
        rows[LOGITS] += 1e-7
        reading.add([0], [20], rows)
        return reading

    check = judge(subject, moved, separate(ours, texts), 0.0, "")
    assert not check.ok and check.note == ""


# The report


CHECK = Check(True, 2e-7, 1e-5, "", "rounding", name="first")
FAILED = Check(False, 0.5, 1e-5, "sublayers.1 | here", "rounding", note="2 rows set aside", name="second")


def report_of(*checks: Check) -> Report:
    return Report("somewhere", "turbos", "llama", checks, ("vLLM: not installed",), 2.0)


def test_only_deciding_checks_decide() -> None:
    assert report_of(CHECK).ok and not report_of(CHECK, FAILED).ok
    warning = replace(FAILED, decides=False)
    assert report_of(CHECK, warning).ok and warning.verdict == "warning" and FAILED.verdict == "FAILED"


def test_json_holds_no_nan() -> None:
    text = report_of(replace(FAILED, error=float("nan"))).to_json()
    assert json.loads(text, parse_constant=pytest.fail)["checks"][0]["error"] is None


def test_the_card_is_a_markdown_table() -> None:
    card = card_section(report_of(CHECK, FAILED))
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(line.replace("\\|", "").count("|") == 6 for line in rows)
    assert not card.startswith("#") and "**FAILED**, 1 of 2" in card and "Left out: vLLM" in card
    assert "`turbos verify`" in card and table_of(report_of(CHECK, FAILED)).row_count == 2


def test_a_model_that_breaks_down_has_failed() -> None:
    def broken() -> Check:
        raise IndexError("list index\nout of range")

    check = run_check("third", broken)
    assert check is not None and not check.ok and check.name == "third"
    assert check.where.startswith("IndexError in test_verify.py:") and "\n" not in check.where

    def mistaken() -> Check:
        raise UserError("yours")

    with pytest.raises(UserError):
        run_check("fourth", mistaken)


# Comparison and router ties


def reading_of(lengths: list[int], rows: dict[Place, Tensor]) -> Reading:
    reading = Reading(len(lengths))
    reading.add(range(len(lengths)), lengths, rows)
    return reading


def tie_case(flipped: Tensor, margin: float) -> tuple[Reading, Reading, Routers]:
    """Two documents of three tokens; the second token goes to expert 0 or 1, `margin` apart, in one reading each."""
    scores = torch.tensor([[4.0, 0.0, -1.0]]).repeat(6, 1)
    other = scores.clone()
    scores[1], other[1] = torch.tensor([2.0, 2.0 - margin, 0.0]), torch.tensor([2.0 - margin, 2.0, 0.0])
    logits = torch.ones(6, 2)
    routers = Routers(tiny_config(num_experts=3, top_k=1), {})
    want = reading_of([3, 3], {Place(1, ROUTER): scores, LOGITS: logits})
    got = reading_of([3, 3], {Place(1, ROUTER): other, LOGITS: logits + flipped[:, None]})
    return got, want, routers


def test_a_tie_is_set_aside_and_reported() -> None:
    moved = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    outcome = compare(*tie_case(moved, 1e-7), 1e-5)
    assert outcome.ok and outcome.error == 0 and outcome.kept_T.tolist() == [True, False, False, True, True, True]
    assert "2 of 6 rows set aside" in outcome.note and "1 router ties in sublayers.1 (margin at most 1" in outcome.note


def test_a_flip_between_unequal_experts_is_not_excused() -> None:
    moved = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    outcome = compare(*tie_case(moved, 0.1), 1e-5)
    assert not outcome.ok and outcome.error == 1.0 and outcome.note == "" and outcome.kept_T.all()


def test_a_tie_excuses_no_other_row() -> None:
    for row in (0, 3, 5):
        moved = torch.zeros(6)
        moved[row] = 1.0
        assert not compare(*tie_case(moved, 1e-7), 1e-5).ok


def test_too_many_ties_prove_nothing() -> None:
    _, _, routers = tie_case(torch.zeros(6), 0.0)
    even = torch.tensor([[2.0, 2.0 - 2e-7, 0.0]]).repeat(6, 1)
    sides = (even, even[:, [1, 0, 2]])
    got, want = (reading_of([3, 3], {Place(1, ROUTER): scores, LOGITS: torch.ones(6, 2)}) for scores in sides)
    outcome = compare(got, want, routers, 1e-5)
    assert not outcome.ok and "too few rows are left" in outcome.where


def test_a_model_full_of_ties_is_never_called_wrong(tmp_path: Path) -> None:
    model = tiny_model("MFAFMF")
    with torch.no_grad():
        for sublayer in sublayers_of(model):
            if sublayer.kind == "F":
                sublayer.mixer.router_weight[1] = sublayer.mixer.router_weight[0] * (1 + 1e-7)
    save_model(model, tmp_path)
    report = certificate(tmp_path)
    assert all("router ties" in where for where in failed(report).values()), failed(report)
    assert any("router ties" in check.note + check.where for check in report.checks)
    assert check_named(report, "float64 truth, each sublayer").ok


def test_sigmoid_scores_with_their_bias_decide_the_margin() -> None:
    config = tiny_config(router="sigmoid", bias_update="freeze", num_experts=3, top_k=1)
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    bias = torch.sigmoid(torch.tensor(1.0)) - 0.5
    routers = Routers(config, {4: torch.tensor([float(bias), 0.0, 0.0])})
    margins, largest = routers.margin(4, logits)
    assert float(margins[0]) < 1e-6 and largest == pytest.approx(0.7310586)
    ignored, _ = Routers(replace(config, bias_update="off"), {}).margin(4, logits)
    assert float(ignored[0]) == pytest.approx(0.2310586)
    everyone, _ = Routers(replace(config, top_k=3), {4: torch.zeros(3)}).margin(4, logits)
    assert everyone.isinf().all()


def test_the_first_difference_is_named_by_layer_tensor_document_and_token() -> None:
    config = tiny_config("MFAF")
    names = Names.of(config, family_of(config))
    rows = {Place(0, RESIDUAL): torch.ones(5, 2), Place(2, "attention"): torch.ones(5, 2, 3), LOGITS: torch.ones(5, 4)}
    want = reading_of([2, 3], rows)
    wrong = {place: tensor.clone() for place, tensor in rows.items()}
    wrong[Place(2, "attention")][3, 1, 2] = 1.25
    wrong[LOGITS][3:] = 9.0
    words = first_difference(reading_of([2, 3], wrong), want, torch.ones(5, dtype=torch.bool), 1e-5, names)
    assert words == (
        "sublayers.2 (attention, model.layers.1): attention differs by 2.5e-01 of its largest value, "
        "first in document 1, token 1"
    )
    wrong[Place(0, RESIDUAL)][0, 0] = float("nan")
    assert "sublayers.0" in first_difference(reading_of([2, 3], wrong), want, torch.ones(5).bool(), 1e-5, names)
    assert amount(float("nan")) == "is not finite" and "shape" in amount(float("inf"))


def test_errors_are_relative_and_nan_is_an_error() -> None:
    assert relative_error(torch.tensor([[1.0, 4.0]]), torch.tensor([[2.0, 4.0]])) == 0.25
    assert not relative_error(torch.tensor([float("nan")]), torch.tensor([1.0])) <= 1e9
    assert not relative_error(torch.tensor([1.0]), torch.tensor([float("nan")])) <= 1e9


# Hooks and truth


def test_hooks_see_every_sublayer_and_are_gone_afterwards() -> None:
    model = tiny_model()
    tokens = random_tokens(9)
    before = {id(module): set(vars(module)) for module in model.modules()}
    with torch.no_grad(), tapped(model, True) as rows:
        model(tokens, Documents.from_lengths([9]))
    for index, letter in enumerate(model.config.layers):
        seen = {place.tensor for place in rows if place.sublayer == index}
        wanted = {"M": {"conv", "dt", "B", "C", "scan", "gated norm"}, "A": {"queries", "keys", "attention"}}
        wanted |= {"F": {ROUTER, GATES, "shared expert", "routed experts"}, "D": {"w_in"}}
        wanted |= {"S": {"in_proj", "conv", "x_proj", "x", "dt", "B", "C", "scan", "gated"}}
        assert wanted[letter] | {"norm", "output", RESIDUAL} <= seen
    assert all(len(tensor) == 9 for tensor in rows.values())
    assert {id(module): set(vars(module)) for module in model.modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_are_gone_after_a_failure_too() -> None:
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), tapped(model, True):
        raise ZeroDivisionError
    assert all("_scan" not in vars(sublayer.mixer) for sublayer in sublayers_of(model))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_routed_experts_that_the_shared_one_dwarfs_are_judged_by_their_own_size(tmp_path: Path) -> None:
    # Recorded as they are, not as a difference of two large numbers.
    model = tiny_model("MFAF")
    with torch.no_grad():
        for number in (1, 3):
            model.sublayers[number].mixer.w_out *= 1e-4
    save_model(model, tmp_path)
    report = certificate(tmp_path)
    assert report.ok, failed(report)


def test_chunk_sizes_are_put_back() -> None:
    model = tiny_model()
    implementation = OurModel(model, family_of(model.config))
    tokens = random_tokens(40)
    plain = implementation.read([tokens], None)[LOGITS]
    with implementation.chunk_sized(3):
        assert all(model.sublayers[number].mixer.config.chunk_size == 3 for number in (0, 6))
        assert not torch.equal(implementation.read([tokens], None)[LOGITS], plain)
    assert all(model.sublayers[number].mixer.config == model.config for number in (0, 6))
    assert torch.equal(implementation.read([tokens], None)[LOGITS], plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_truth_is_the_model_in_float64(variant: str) -> None:
    model = tiny_model(dtype=torch.float64, **VARIANTS[variant])
    pieces = [random_tokens(length, seed=length) for length in (19, 1, 6)]
    truth = Truth(model.config, model.state_dict()).whole(pieces)
    want = logits_of(model, torch.cat(pieces), [19, 1, 6])
    # Rotary angles are fp32 by design; all else is float64.
    assert relative_error(truth[LOGITS], want) <= (1e-6 if model.config.rope_theta else 1e-11)


def test_names_follow_the_family() -> None:
    config = tiny_config("MFAF")
    assert Names.of(config, family_of(config)).of_place(Place(3, GATES)) == (
        "sublayers.3 (mixture of experts, model.layers.1): gates"
    )
    only_here: ModelConfig = tiny_config("MFA")
    assert Names.of(only_here, family_of(only_here)).of_place(Place(2, "keys")) == "sublayers.2 (attention): keys"


def test_one_expert_a_token_leaves_a_router_without_gradient_and_says_so(tmp_path: Path) -> None:
    save_model(tiny_model("MFAF", top_k=1, aux_loss=0.0, z_loss=0.0), tmp_path)
    check = check_named(certificate(tmp_path), "parameters present, used, trained")
    assert check.ok and "2 routers: one expert a token" in check.note


# transformers' own model


def test_transformers_ignores_document_borders_without_kernels(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    report = certificate(saved(tmp_path / "model", "granite"), "transformers")
    red = failed(report)
    leak = red.pop("packed == separate (position_ids)")
    assert "sublayers.0 (Mamba2, model.layers.0): scan + D" in leak and "first in document 1, token 0" in leak
    assert "packed == separate (position_ids and seq_idx)" in red and "gradients: packed == separate" in red
    assert set(red) == {"packed == separate (position_ids and seq_idx)", "gradients: packed == separate"}
    assert not report.ok and report.implementation == "transformers"


@pytest.mark.parametrize("shape", ["granite dense", "nemotron", "llama"])
def test_transformers_is_right_where_nothing_is_packed(shape: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    report = certificate(saved(tmp_path / "model", shape), "transformers")
    red = {name for name in failed(report) if "packed" not in name}
    assert not red, failed(report)
    assert check_named(report, "float64 truth, whole").error < 1e-5
    packed = check_named(report, "packed == separate (position_ids)")
    assert packed.ok == (shape == "llama")


def test_a_shipped_clamp_is_a_warning_that_does_not_decide(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    model = tiny_model(**SHAPES["nemotron"])
    with torch.no_grad():
        for sublayer in sublayers_of(model):
            if sublayer.kind == "M":
                sublayer.mixer.dt_bias -= 12.0
    save_model(model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "time_step_min": 0.001}))
    report = certificate(tmp_path)
    shipped = check_named(report, "native as shipped (transformers)")
    assert report.ok and not shipped.ok and shipped.verdict == "warning" and not shipped.decides
    assert "sublayers.0 (Mamba2, backbone.layers.0): gated norm" in shipped.where and "time_step_min" in shipped.note
    assert check_named(report, "checkpoint == native (transformers)").ok


def test_the_unclamped_copy_links_and_changes_one_entry(tmp_path: Path) -> None:
    directory = saved(tmp_path / "model", "nemotron")
    copied = tmp_path / "copied"
    copied.mkdir()
    assert peer_module.unclamped_copy(directory, copied) == copied
    assert (copied / "model.safetensors").resolve() == (directory / "model.safetensors").resolve()
    assert json.loads((copied / "config.json").read_text())["time_step_min"] < 1e-20
    granite = saved(tmp_path / "other", "granite")
    assert peer_module.unclamped_copy(granite, copied) == granite


def test_files_of_transformers_are_verified(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    report = certificate(tmp_path)
    assert report.ok and report.family == "llama", failed(report)
    assert check_named(report, "files written back == files").ok
