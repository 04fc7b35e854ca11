"""The fused step against the plain model in float64: every option, odd sizes, long contexts, rounded weights, bits."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fused_cases import Fused, random_config, truth
from model_cases import VARIANTS, VOCABULARY, random_tokens, tiny_config, tiny_model
from turbos.common.errors import UserError
from turbos.common.records import Documents
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.fused import run as fused_run
from turbos.engine.fused.step import FusedStep, warm_up
from turbos.engine.fused.support import refusal
from turbos.engine.fused.weights import PRECISIONS, Precision, pack
from turbos.engine.pool import PAGE, PoolRow, StatePool
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel

STACK = "MFAFMDDAD"
CLOSE = 1e-5
"""Largest difference from float64, relative to the largest logit."""


def shaken_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model whose every weight matters: norms, biases and decays away from their plain initial values."""
    model = LanguageModel(config).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if weight.dim() == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
            if name.endswith("dt_bias"):
                weight += 2.0
    return model


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def decode(fused: Fused, tokens_BT: Tensor) -> Tensor:
    """Logits `[T, B, V]` of the fused step."""
    rows = fused.rows(len(tokens_BT))
    return torch.stack([fused.advance(rows, tokens_B.tolist()).logits_BV for tokens_B in tokens_BT.T])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_against_the_model_in_float64(name: str) -> None:
    model = tiny_model(STACK, **VARIANTS[name])
    tokens_BT = random_tokens(3 * 70).view(3, 70)
    assert relative(decode(Fused.of(model), tokens_BT), truth(model, tokens_BT)) < CLOSE
    assert relative(decode(Fused.of(model), tokens_BT), truth(model, tokens_BT, torch.float32)) < CLOSE


@pytest.mark.parametrize("seed", range(24))
def test_random_configurations_of_odd_sizes(seed: int) -> None:
    model = shaken_model(random_config(seed), seed)
    tokens_BT = random_tokens(5 * 11, seed).view(5, 11)
    assert relative(decode(Fused.of(model, slots=5), tokens_BT), truth(model, tokens_BT)) < CLOSE


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(precision: Precision, threads: int) -> None:
    model = tiny_model(STACK, hidden_size=41, shared_expert_size=23, num_heads=6)
    alone = Fused.of(model, slots=1, precision=precision)
    crowd = Fused.of(model, slots=9, pages=40, threads=threads, precision=precision)
    rows, lone, tokens_BT = crowd.rows(9), alone.rows(1), random_tokens(9 * 150).view(9, 150)
    for place in range(150):
        # Row 0 is always there; the others come and go, so that batches and lengths differ.
        count = 9 if place < 60 else 3 if place < 100 else 1 if place < 120 else 6
        kept = crowd.advance(rows[:count], tokens_BT[:count, place].tolist())
        expected = alone.advance(lone, tokens_BT[:1, place].tolist())
    assert torch.equal(kept.logits_BV[0], expected.logits_BV[0])
    assert torch.equal(kept.hidden_BD[0], expected.hidden_BD[0])
    assert torch.equal(crowd.pool.scan_SX[rows[0].slot], alone.pool.scan_SX[lone[0].slot])


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8, 33, 64])
def test_batches_of_every_size(batch: int) -> None:
    model = tiny_model(STACK)
    tokens_BT = random_tokens(batch * 3).view(batch, 3)
    one = Fused.of(model, slots=batch, pages=batch, threads=1)
    two = Fused.of(model, slots=batch, pages=batch, threads=2)
    ours = decode(one, tokens_BT)
    assert torch.equal(ours, decode(two, tokens_BT))
    assert relative(ours, truth(model, tokens_BT)) < CLOSE


@pytest.mark.parametrize("precision", ["bf16", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_rounded_weights_are_the_models_own_afterwards(precision: Precision, tied: bool) -> None:
    model = tiny_model(STACK, tied=tied, router="sigmoid", bias_update="freeze")
    before = truth(model, tokens := random_tokens(2 * 20).view(2, 20))
    ours = decode(Fused.of(model, precision=precision), tokens)
    assert relative(ours, truth(model, tokens)) < CLOSE
    assert relative(ours, before) > 1e-4


def test_int8_rounds_to_within_half_a_step_of_each_row() -> None:
    model = tiny_model("MA")
    packed = pack(model, "int8")
    weight, matrix = model.sublayers[0].mixer.in_proj.weight.detach(), packed.sublayers[0].matrices[0]
    assert matrix.scales is not None
    error = (matrix.dequantised() - weight).abs().amax(1)
    assert bool((error <= matrix.scales * 0.5001).all()) and float(error.max()) > 0
    assert torch.equal(matrix.weights.abs().amax(1), torch.full((len(weight),), 127, dtype=torch.int8))


@pytest.mark.parametrize("length", [1, 15, 16, 63, 64, 65, 127, 128, 129, 192, 1000, 5000])
def test_long_contexts_on_scattered_pages(length: int) -> None:
    """The cache is filled with random keys; what lies on the rest of the last page is NaN."""
    model = shaken_model(tiny_config("AMA", rope_theta=10000.0, qk_norm=True, max_positions=8192))
    fused = Fused.of(model, slots=2, pages=2 * (length // PAGE + 2), threads=2)
    rows = fused.rows(2)
    generator = torch.Generator().manual_seed(length)
    pages = torch.randperm(fused.pool.allocator.num_pages, generator=generator).tolist()
    lengths = [length, max(1, length // 3)]
    for row, read in zip(rows, lengths, strict=True):
        row.table, row.length = [pages.pop() for _ in range(read // PAGE + 1)], read
        fill(fused.pool, row, generator)
    tokens = random_tokens(2).tolist()
    # Twice the same states: the model's view writes them too.
    twin = copy.deepcopy(fused.pool)
    stepped = fused.step(
        torch.tensor(tokens),
        torch.tensor([row.slot for row in rows]),
        torch.tensor(lengths),
        torch.tensor([row.table + [0] * (len(rows[0].table) - len(row.table)) for row in rows]),
    )
    with torch.no_grad(), pool_without_owners(twin).view(rows) as state:
        output = model(torch.tensor(tokens), Documents.from_lengths([1, 1]), state)
        expected_BV = model.logits(output.hidden_TD)
    assert relative(stepped.logits_BV, expected_BV) < CLOSE
    for row, read in zip(rows, lengths, strict=True):
        for ours, theirs in zip((*fused.pool.keys, *fused.pool.values), (*twin.keys, *twin.values), strict=True):
            at = row.table[read // PAGE], read % PAGE
            assert torch.allclose(ours[at], theirs[at], atol=1e-5)


def fill(pool: StatePool, row: PoolRow, generator: torch.Generator) -> None:
    """Random keys, values and states for a row's tokens."""
    pool.conv_SX[row.slot].normal_(generator=generator)
    pool.scan_SX[row.slot].normal_(generator=generator)
    for tensor in (*pool.keys, *pool.values):
        for start in range(0, row.length, PAGE):
            page = tensor[row.table[start // PAGE], : row.length - start]
            page.copy_(torch.randn(page.shape, generator=generator))


def pool_without_owners(pool: StatePool) -> StatePool:
    """The pool, its pages held once each: a view refuses pages that nobody took."""
    while pool.allocator.alloc() is not None:
        pass
    return pool


def test_routes_are_the_models_choices() -> None:
    model = tiny_model("FMF")
    fused = Fused.of(model)
    rows, tokens = fused.rows(2), random_tokens(2)
    stepped = fused.advance(rows, tokens.tolist(), want_routes=True)
    assert stepped.routes_BLK is not None and stepped.routes_BLK.dtype == torch.int16
    with torch.no_grad():
        output = model(tokens, Documents.from_lengths([1, 1]))
    for layer, load_E in enumerate(output.load_LE):
        chosen = stepped.routes_BLK[:, layer].flatten().long()
        assert torch.equal(torch.bincount(chosen, minlength=5).float(), load_E)
    assert fused.advance(rows, tokens.tolist()).routes_BLK is None


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tiny_config("MAFD"), "cpu") is None
    assert "Mamba-1" in str(refusal(tiny_config("MS"), "cpu"))
    assert "on cuda" in str(refusal(tiny_config("M"), "cuda"))
    assert "float64" in str(refusal(tiny_config("M"), "cpu", torch.float64))
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert "NUMBA_DISABLE_JIT" in str(refusal(tiny_config("M"), "cpu"))
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    model = tiny_model("MA")
    with pytest.raises(UserError, match="threads must lie between 1 and"):
        FusedStep(pack(model, "fp32"), StatePool(model.config, 1, 1), 0)
    with pytest.raises(UserError, match="precision 'int3' is none of"):
        pack(model, "int3")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fp32 models on the CPU"):
        pack(model.double(), "fp32")


@pytest.mark.parametrize(
    ("tokens", "slots", "positions", "tables", "complaint"),
    [
        ([VOCABULARY], [0], [0], [[0]], "outside vocab_size"),
        ([1], [2], [0], [[0]], "slots"),
        ([1, 2], [0, 0], [0, 0], [[0], [1]], "different"),
        ([1], [0], [-1], [[0]], "negative"),
        ([1], [0], [64], [[0]], "needs 2 pages"),
        ([1], [0], [0], [[3]], "outside 0 .. 2"),
        ([1, 2], [0], [0], [[0]], "2 tokens, 1 slots"),
    ],
)
def test_wrong_addresses_never_reach_the_compiled_code(
    tokens: list[int], slots: list[int], positions: list[int], tables: list[list[int]], complaint: str
) -> None:
    fused = Fused.of(tiny_model("MA"), slots=2, pages=3)
    arrays = [torch.tensor(x) for x in (tokens, slots, positions, tables)]
    with pytest.raises(ValueError, match=complaint):
        fused.step(*arrays)


def test_torch_keeps_its_number_of_threads() -> None:
    fused = Fused.of(tiny_model("MA"), threads=2)
    torch.set_num_threads(2)
    fused.advance(fused.rows(1), [1])
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_a_second_warm_up_loads_what_was_compiled() -> None:
    warm_up(1)
    assert warm_up(1) < 1.0


def test_the_key_of_the_cache_covers_every_compiled_file() -> None:
    sources = {path.stem: path.read_text() for path in Path(fused_run.__file__).parent.glob("*.py")}
    compiled = {name for name, text in sources.items() if "@kernel" in text or "@inlined" in text}
    assert compiled | {"program", "tiles"} == set(fused_run.COMPILED)


@pytest.mark.parametrize("path", ["auto", "torch"])
@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_precision_that_a_model_cannot_have_is_one_line(precision: str, path: str) -> None:
    """Rounding is the fused step's: it knows no Mamba-1."""
    config = EngineConfig(memory=1 << 26, precision=precision, path=path)  # type: ignore[arg-type]
    message = (
        f"engine: precision {precision} is for models that the fused step knows, and it has no Mamba-1 sublayers (S); "
        "choose precision 'fp32' or 'own'"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Engine(tiny_model("SDAD"), config=config)
    for allowed in ("auto", "own", "fp32"):
        Engine(tiny_model("SDAD"), config=replace(config, precision=allowed))
