"""Law 1 and its kin: documents are independent, the future does not matter, chunks and packing are not seen in results.

Bits are compared where nothing but the documents' own rows takes part (mixers M, S and A); where rows of several
documents share a matrix product whose shape depends on the routing (F), rounding is allowed.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model_cases import TOLERANCE, VARIANTS, VOCABULARY, logits_of, random_tokens, tiny_config, tiny_model
from op_cases import assert_close, bit_equal, relative_error
from turbos.common.records import Documents
from turbos.model.generate import generate
from turbos.model.lm import LanguageModel
from turbos.model.mixers import Pass
from turbos.ops import moe

LENGTHS = (21, 40, 1, 18)
SECOND = slice(21, 61)
OTHERS = slice(21, None)
DTYPES = [torch.float32, torch.float64]


def run_mixer(model: LanguageModel, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the first sublayer's mixer on given rows, and the gradient in the rows under a fixed weight."""
    documents = Documents.from_lengths(LENGTHS)
    rows = x_TD.detach().clone().requires_grad_()
    output = model.sublayers[0].mixer(rows, Pass(documents, documents.positions_T, False, ()), None)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(8)).to(output.dtype)
    (gradient,) = torch.autograd.grad((output * weight).sum(), rows)
    return output.detach(), gradient


def rows_with(change: float | None, dtype: torch.dtype) -> Tensor:
    """Input rows of a mixer; a token of the first document replaced by `change`."""
    x = torch.randn(sum(LENGTHS), 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    if change is not None:
        x[13] = change
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["M", "S", "A", "D"])
def test_a_changed_token_leaves_other_documents_bits(kind: str, variant: str, dtype: torch.dtype) -> None:
    model = tiny_model(kind, dtype=dtype, **(VARIANTS[variant] if kind in "MSA" else {}))
    before, gradient_before = run_mixer(model, rows_with(None, dtype))
    after, gradient_after = run_mixer(model, rows_with(1.7, dtype))
    assert not torch.equal(before[13], after[13])
    assert bit_equal(before[OTHERS], after[OTHERS])
    assert bit_equal(gradient_before[OTHERS], gradient_after[OTHERS])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["plain", "sigmoid, relu2", "one group, no shared expert"])
def test_a_changed_token_moves_other_documents_experts_by_rounding_only(variant: str, dtype: torch.dtype) -> None:
    model = tiny_model("F", dtype=dtype, **VARIANTS[variant])
    before, gradient_before = run_mixer(model, rows_with(None, dtype))
    after, gradient_after = run_mixer(model, rows_with(1.7, dtype))
    tolerance = TOLERANCE[dtype]
    assert_close([after[OTHERS]], [before[OTHERS]], tolerance, ("output",))
    assert_close([gradient_after[OTHERS]], [gradient_before[OTHERS]], tolerance, ("gradient",))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["M", "S", "A"])
def test_nan_in_one_document_stays_there(kind: str, poison: float) -> None:
    for variant in VARIANTS.values():
        model = tiny_model(kind, **variant)
        before, gradient_before = run_mixer(model, rows_with(None, torch.float32))
        after, gradient_after = run_mixer(model, rows_with(poison, torch.float32))
        assert after[13].isnan().any() and after[OTHERS].isfinite().all()
        assert bit_equal(before[OTHERS], after[OTHERS])
        assert bit_equal(gradient_before[OTHERS], gradient_after[OTHERS])


def chosen_experts(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that every routing of the model appends its chosen experts to."""
    seen: list[Tensor] = []
    for name in ("route_softmax", "route_sigmoid"):
        plain = getattr(moe, name)

        def recorded(*args: object, plain=plain, **options: object) -> moe.Routing:  # type: ignore[no-untyped-def]
            routing = plain(*args, **options)
            seen.append(routing.experts_TK)
            return routing

        monkeypatch.setattr(moe, name, recorded)
    return seen


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_model_keeps_documents_apart(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(dtype=dtype, **VARIANTS[variant])
    chosen = chosen_experts(monkeypatch)
    tokens = random_tokens(sum(LENGTHS))
    before = logits_of(model, tokens, LENGTHS)
    tokens[4] = (tokens[4] + 1) % VOCABULARY
    after = logits_of(model, tokens, LENGTHS)
    routers = len(chosen) // 2
    flips = [(a[OTHERS] != b[OTHERS]).any() for a, b in zip(chosen[:routers], chosen[routers:], strict=True)]
    assert routers == 2 and not any(flips), "a top-k choice flipped: take other weights, this one proves nothing"
    assert float((before - after)[OTHERS].abs().max()) <= TOLERANCE[dtype] * float(before.abs().max())
    assert relative_error(after[4:21], before[4:21]) > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_one_document_do_not_see_the_other(variant: str) -> None:
    model = tiny_model(dtype=torch.float64, aux_loss=0.0, z_loss=0.0, **VARIANTS[variant])
    tokens, documents = random_tokens(sum(LENGTHS)), Documents.from_lengths(LENGTHS)
    gradients = []
    for change in (0, 1):
        tokens[4] = (tokens[4] + change) % VOCABULARY
        hidden = model(tokens, documents).hidden_TD[SECOND]
        gradients.append(torch.autograd.grad(model.logits(hidden).square().sum(), [*model.parameters()]))
    names = [name for name, _ in model.named_parameters()]
    assert_close(gradients[1], gradients[0], 1e-11, names, floor=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_is_separate(variant: str) -> None:
    for dtype in DTYPES:
        model = tiny_model(dtype=dtype, **VARIANTS[variant])
        tokens = random_tokens(sum(LENGTHS))
        together = logits_of(model, tokens, LENGTHS)
        apart = torch.cat([logits_of(model, piece, [len(piece)]) for piece in tokens.split(LENGTHS)])
        assert relative_error(together, apart) <= TOLERANCE[dtype]
        order = [2, 0, 3, 1]
        pieces = [tokens.split(LENGTHS)[i] for i in order]
        shuffled = logits_of(model, torch.cat(pieces), [len(piece) for piece in pieces])
        expected = torch.cat([together.split(LENGTHS)[i] for i in order])
        assert relative_error(shuffled, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("chunk_size", [1, 5, 64, 128])
def test_chunk_size_is_not_seen(chunk_size: int) -> None:
    tokens = random_tokens(sum(LENGTHS))
    for dtype in DTYPES:
        want = logits_of(tiny_model(dtype=dtype), tokens, LENGTHS)
        got = logits_of(tiny_model(dtype=dtype, chunk_size=chunk_size), tokens, LENGTHS)
        assert relative_error(got, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_does_not_matter(variant: str) -> None:
    model = tiny_model(dtype=torch.float64, **VARIANTS[variant])
    tokens = random_tokens(50)
    before = logits_of(model, tokens, [50])
    for cut in (1, 16, 33):
        changed = tokens.clone()
        changed[cut:] = (changed[cut:] + 7) % VOCABULARY
        after = logits_of(model, changed, [50])
        assert relative_error(after[:cut], before[:cut]) <= 1e-12
        assert relative_error(logits_of(model, tokens[:cut], [cut]), before[:cut]) <= 1e-12
        assert relative_error(after[cut:], before[cut:]) > 1e-3


def test_fp32_is_float64_to_rounding() -> None:
    tokens = random_tokens(sum(LENGTHS))
    for variant in VARIANTS.values():
        narrow, wide = (logits_of(tiny_model(dtype=dtype, **variant), tokens, LENGTHS) for dtype in DTYPES)
        assert relative_error(narrow, wide) <= 1e-4


def test_routers_report_loads_and_losses() -> None:
    model = tiny_model("MFAF", aux_loss=0.5, z_loss=0.25)
    tokens, documents = random_tokens(sum(LENGTHS)), Documents.from_lengths(LENGTHS)
    output = model(tokens, documents)
    assert output.load_LE.shape == (2, 5) and output.load_LE.sum(1).tolist() == [2.0 * len(tokens)] * 2
    assert float(output.balance_loss.detach()) > 0.5 * 2 * 0.9 and float(output.z_loss.detach()) > 0
    (output.balance_loss + output.z_loss).backward()
    assert all(model.sublayers[i].mixer.router_weight.grad.any() for i in (1, 3))
    silent = tiny_model("MFAF", aux_loss=0.0, z_loss=0.0)(tokens, documents)
    assert float(silent.balance_loss) == float(silent.z_loss) == 0.0
    assert tiny_model("MA")(tokens, documents).load_LE.shape == (0, 0)


def test_logit_scale_and_multipliers_do_what_they_say() -> None:
    tokens = random_tokens(9)
    plain = logits_of(tiny_model(), tokens, [9])
    assert relative_error(logits_of(tiny_model(logits_scaling=4.0), tokens, [9]), plain / 4) <= 1e-6
    # Without branches the final norm takes the embedding's factor out again, up to its epsilon.
    bare, enlarged = (tiny_model(residual_multiplier=0.0, embedding_multiplier=factor) for factor in (1.0, 8.0))
    assert relative_error(logits_of(enlarged, tokens, [9]), logits_of(bare, tokens, [9])) < 1e-3
    assert tiny_config().attention_scale == tiny_config().head_dim ** -0.5
    assert tiny_config(attention_multiplier=0.2).attention_scale == 0.2


@pytest.mark.parametrize(("mode", "moves"), [("update", True), ("freeze", False), ("off", False)])
def test_selection_bias_moves_only_when_told(mode: str, moves: bool) -> None:
    model = tiny_model("FMF", router="sigmoid", bias_update=mode, bias_rate=0.125)
    before = [model.sublayers[i].mixer.selection_bias.clone() for i in (0, 2)]
    model.update_selection_bias(torch.tensor([[10.0, 2.0, 0.0, 4.0, 4.0], [4.0, 4.0, 4.0, 4.0, 4.0]]))
    steps = [model.sublayers[i].mixer.selection_bias - old for i, old in zip((0, 2), before, strict=True)]
    want = torch.tensor([-0.125, 0.125, 0.125, 0.0, 0.0]) if moves else torch.zeros(5)
    assert torch.allclose(steps[0], want, atol=1e-7) and not steps[1].any()


def test_selection_bias_off_is_ignored_and_freeze_is_used() -> None:
    tokens = random_tokens(30)
    off, freeze = (
        logits_of(tiny_model("F", router="sigmoid", bias_update=mode), tokens, [30]) for mode in ("off", "freeze")
    )
    assert not torch.equal(off, freeze)
    model = tiny_model("F", router="sigmoid", bias_update="off")
    model.sublayers[0].mixer.selection_bias.zero_()
    assert torch.equal(logits_of(model, tokens, [30]), off)


@pytest.mark.parametrize("layers", ["M", "S", "A", "F", "D"])
@pytest.mark.parametrize("lengths", [(8,), (5, 7), (4, 4)], ids=str)
def test_documents_that_do_not_cover_the_tokens_are_refused(layers: str, lengths: tuple[int, ...]) -> None:
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        tiny_model(layers)(random_tokens(10), Documents.from_lengths(lengths))


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_after_generating_with_the_same_borders(variant: str) -> None:
    # Index tensors that an op keeps between calls must not be born in inference mode.
    model = tiny_model(**VARIANTS[variant])
    tokens = random_tokens(37)
    generate(model, [piece.tolist() for piece in tokens.split([30, 7])], 3)
    output = model(tokens, Documents.from_lengths([30, 7]))
    (model.logits(output.hidden_TD).square().sum() + output.balance_loss + output.z_loss).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_runs_and_decides_in_fp32(variant: str) -> None:
    model = tiny_model(dtype=torch.bfloat16, **VARIANTS[variant])
    logits = logits_of(model, random_tokens(40), [30, 10])
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    output = model(random_tokens(40), Documents.from_lengths([30, 10]))
    assert output.z_loss.dtype == output.balance_loss.dtype == torch.float32
    model.logits(output.hidden_TD).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
