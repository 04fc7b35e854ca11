"""The static step against the plain one, through a capture with a CUDA graph's rules: numbers, scratch, law 4."""

from __future__ import annotations

import doctest
import random
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from engine_cases import LAYERS, keys_of, read, started
from model_cases import TOLERANCE, VARIANTS, random_tokens, tiny_config, tiny_model
from op_cases import bit_equal, relative_error
from static_cases import NUMBERLESS, NotCapturable, Watch, record
from turbos.common.records import Documents
from turbos.engine import graphs
from turbos.engine.graphs import Capture, StaticSteps, uncaptured
from turbos.engine.pages import PAGE
from turbos.engine.pool import PoolRow, StatePool
from turbos.engine.precision import WIDE, to_bf16
from turbos.engine.runner import Runner
from turbos.engine.static_step import StaticStep
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState

KINDS = ("M", "S", "A", "D", "F")
PROMPTS = (62, 1, 130, 255)
MEMBERS = ((0, 1, 2, 3), (3, 1), (2,), (1, 0, 3), (2, 3, 0, 1), (1,))
"""Batches of changing rows, so that buckets are filled by halves and used again by others."""


def pool_of(model: LanguageModel, *, scratch: bool, poison: bool = True) -> StatePool:
    """Memory is NaN wherever nothing was written, scratch places included."""
    pool = StatePool(model.config, 6, 16, dtype=model.embed_weight.dtype, scratch=scratch)
    for tensor in (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values):
        tensor.fill_(torch.nan)
    return pool


def begun(model: LanguageModel, pool: StatePool, texts: Sequence[Tensor]) -> list[PoolRow]:
    """Rows in mixed places that have read the prompts."""
    rows = [started(pool) for _ in texts]
    for row, text, length in reversed(list(zip(rows, texts, PROMPTS, strict=True))):
        read(model, pool, [row], [text[:length]])
    return rows


def runner_of(model: LanguageModel, pool: StatePool, capture: Capture | None) -> Runner:
    static = None if capture is None else StaticSteps(model, pool, capture)
    assert static is None or not static.refusal
    return Runner(model, pool, static=static)


@torch.inference_mode()
def walk(
    runner: Runner, rows: Sequence[PoolRow], texts: Sequence[Tensor], rounds: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of all steps, and routes."""
    logits, routes = [], []
    for members in MEMBERS * rounds:
        for place in members:
            assert runner.pool.ensure(rows[place], rows[place].length + 1)
        ids = [int(texts[place][rows[place].length]) for place in members]
        step = runner.step([rows[place] for place in members], ids, want_routes=True)
        logits.append(step.logits_BV)
        if step.routes_BLK is not None:
            routes.append(step.routes_BLK)
    return logits, routes


def states_of(pool: StatePool, rows: Sequence[PoolRow]) -> list[Tensor]:
    """Everything that rows hold."""
    slots = [row.slot for row in rows]
    return [pool.conv_SX[slots], pool.scan_SX[slots], *(x for row in rows for x in keys_of(pool, row))]


def compare(model: LanguageModel, capture: Capture, rounds: int) -> None:
    """Logits, routes and states of the static step are the plain step's."""
    texts = [random_tokens(length + 4 * len(MEMBERS) * rounds, seed=length) for length in PROMPTS]
    seen = []
    for how in (None, capture):
        pool = pool_of(model, scratch=how is not None)
        rows = begun(model, pool, texts)
        seen.append((*walk(runner_of(model, pool, how), rows, texts, rounds), states_of(pool, rows)))
    (logits, routes, states), (own_logits, own_routes, own_states) = seen
    tolerance = TOLERANCE[model.embed_weight.dtype]
    assert max(relative_error(a, b) for a, b in zip(own_logits, logits, strict=True)) <= tolerance
    assert all(torch.equal(a, b) for a, b in zip(own_routes, routes, strict=True))
    assert max(relative_error(a, b) for a, b in zip(own_states, states, strict=True)) <= tolerance


def test_examples() -> None:
    result = doctest.testmod(graphs)
    assert result.attempted >= 1 and result.failed == 0


@pytest.mark.parametrize("layers", [*KINDS, *LAYERS])
def test_every_kind_is_the_plain_step(layers: str) -> None:
    compare(tiny_model(layers, rope_theta=10000.0), record, rounds=2)


def test_many_steps_with_and_without_a_capture() -> None:
    for capture, rounds in ((record, 5), (uncaptured, 10)):
        compare(tiny_model(), capture, rounds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_is_the_plain_step(variant: str, dtype: torch.dtype) -> None:
    compare(tiny_model(dtype=dtype, **VARIANTS[variant]), record, rounds=1)


@pytest.mark.parametrize("experts", [2, 40])
def test_few_and_many_experts(experts: int) -> None:
    """Chosen matrices are gathered where choices are fewer than experts, else every expert works."""
    compare(tiny_model("FMF", num_experts=experts), record, rounds=2)


def test_the_truth_in_float64() -> None:
    model = tiny_model(rope_theta=10000.0)
    wide = tiny_model(rope_theta=10000.0, dtype=torch.float64)
    texts = [random_tokens(length + 40, seed=length) for length in PROMPTS]
    pool = pool_of(model, scratch=True)
    rows = begun(model, pool, texts)
    logits, _ = walk(runner_of(model, pool, record), rows, texts, rounds=3)
    lengths = list(PROMPTS)
    with torch.no_grad():
        truth = [wide.logits(wide(text, Documents.from_lengths([len(text)])).hidden_TD) for text in texts]
    for members, logits_BV in zip(MEMBERS * 3, logits, strict=True):
        want = torch.stack([truth[place][lengths[place]] for place in members])
        assert relative_error(logits_BV, want) <= TOLERANCE[torch.float32]
        for place in members:
            lengths[place] += 1


@pytest.mark.parametrize("layers", ["MFASD", "ADAD", "MFMF"])
def test_rows_that_nobody_needs_touch_only_scratch_places(layers: str) -> None:
    model = tiny_model(layers)
    pool = pool_of(model, scratch=True)
    texts = [random_tokens(length + 9, seed=length) for length in PROMPTS]
    rows = begun(model, pool, texts)
    runner = runner_of(model, pool, record)
    walk(runner, rows, texts, rounds=1)
    tensors = (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values)
    before = [tensor.clone() for tensor in tensors]
    three = [rows[0], rows[2], rows[3]]
    lengths = [row.length for row in three]
    with torch.inference_mode():
        runner.step(three, [1, 2, 3], want_routes=False)
    slots = {*(row.slot for row in three), pool.num_slots}
    for old, new in zip(before[:2], tensors[:2], strict=True):
        same = [bit_equal(old[slot], new[slot]) for slot in range(pool.num_slots)]
        assert all(same[slot] for slot in range(pool.num_slots) if slot not in slots)
    places = {
        (row.table[length // PAGE], length % PAGE) for row, length in zip(three, lengths, strict=True) if row.table
    }
    for old, new in zip(before[2:], tensors[2:], strict=True):
        changed = ~((old == new) | (old.isnan() & new.isnan())).flatten(2).all(-1)
        found = {(page, place) for page, place in changed.nonzero().tolist() if page < pool.allocator.num_pages}
        assert found == places


def test_what_no_row_has_is_never_read() -> None:
    """Scratch places and what lies on pages beyond a length may hold anything."""
    model = tiny_model("MAFAD")
    texts = [random_tokens(length + 9, seed=length) for length in PROMPTS]
    seen = []
    for poison in (torch.nan, torch.inf, 0.0):
        pool = pool_of(model, scratch=True)
        rows = begun(model, pool, texts)
        for tensor, last in ((pool.conv_SX, pool.num_slots), (pool.scan_SX, pool.num_slots)):
            tensor[last] = poison
        for tensor in (*pool.keys, *pool.values):
            tensor[pool.allocator.num_pages] = poison
            for row in rows:
                tensor[row.table[-1], row.length % PAGE :] = poison
        seen.append(torch.cat(walk(runner_of(model, pool, record), rows, texts, rounds=1)[0]))
    assert seen[0].isfinite().all() and bit_equal(seen[0], seen[1]) and bit_equal(seen[0], seen[2])


def plain_step(model: LanguageModel) -> Callable[[], object]:
    state = HybridState.alloc(model.config, 2, 8, dtype=model.embed_weight.dtype)
    documents = Documents.from_lengths([1, 1])
    return lambda: model(torch.tensor([3, 4]), documents, state)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda x_TD: x_TD.sum().item(), "_local_scalar_dense asks the device"),
        (lambda x_TD: bool((x_TD > 0).any()), "_local_scalar_dense asks the device"),
        (lambda x_TD: x_TD[x_TD > 0], "by a mask|nonzero"),
        (lambda x_TD: (x_TD > 0).nonzero(), "nonzero asks"),
        (lambda x_TD: torch.bincount(x_TD[0].long(), minlength=3), "bincount asks"),
    ],
)
def test_a_planted_question_to_the_device_is_found(
    plant: Callable[[Tensor], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rules themselves: a step with such a line is refused, with numbers and without."""
    logits = LanguageModel.logits

    def asking(model: LanguageModel, hidden_TD: Tensor) -> Tensor:
        plant(hidden_TD)
        return logits(model, hidden_TD)

    monkeypatch.setattr(LanguageModel, "logits", asking)
    model = tiny_model("MFAD")
    steps = StaticSteps(model, pool_of(model, scratch=True), record)
    assert re.search(message, steps.refusal)
    for way in NUMBERLESS:
        with pytest.raises((RuntimeError, NotImplementedError)):
            numberless_step(way, "MFAD", 2)


def numberless_step(way: str, layers: str | None, rows: int, **changes: object) -> tuple[StaticStep, Watch]:
    """A bf16 step that ran without any numbers, and its operations."""
    device, context = NUMBERLESS[way]
    with context(), torch.inference_mode():
        with torch.device(device):
            model = to_bf16(LanguageModel(tiny_config(layers, **changes)).eval().requires_grad_(False))
        step = StaticStep(model, StatePool(model.config, 6, 16, device, torch.bfloat16, scratch=True), rows, 4)
        with Watch() as watch:
            step()
    return step, watch


@pytest.mark.parametrize(("way", "rows"), [("meta", 1), ("meta", 8), ("fake", 8)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_step_needs_no_number_from_its_device(variant: str, rows: int, way: str) -> None:
    step, watch = numberless_step(way, None, rows, **VARIANTS[variant])
    assert {x.device.type for x in (step.logits_BV, step.routes_BLK, step.inputs_BX)} == {NUMBERLESS[way][0]}
    assert len(watch.calls) > 100


@pytest.mark.parametrize("layers", ["FD", "MD"])
def test_the_plain_step_could_not_be_captured(layers: str) -> None:
    """So the rules do refuse what the static step was made to avoid."""
    with torch.no_grad(), pytest.raises(NotCapturable):
        record(plain_step(tiny_model(layers)))


def test_law_4_in_bf16() -> None:
    """Router, softmax, decays, states, norms' sums and logits are fp32 though the weights are bf16."""
    step, watch = numberless_step("meta", None, 4, rope_theta=10000.0, qk_norm=True, router="sigmoid")
    wide = {name for name, x in step.model.named_parameters() if x.dtype == torch.float32}
    assert wide == {name for name, _ in step.model.named_parameters() if name.rsplit(".", 1)[-1] in WIDE}
    assert step.pool.scan_SX.dtype == step.logits_BV.dtype == torch.float32
    assert step.pool.conv_SX.dtype == step.pool.keys[0].dtype == torch.bfloat16
    inputs: dict[str, set[torch.dtype]] = {}
    for func, args, _, _ in watch.calls:
        inputs.setdefault(func._schema.name.split("::")[1], set()).add(getattr(args[0], "dtype", None))
    for name in ("_softmax", "sigmoid", "topk", "softplus", "exp", "exp2", "rsqrt"):
        assert inputs[name] == {torch.float32}, name


def test_bf16_answers_are_near_the_truth_of_the_same_weights() -> None:
    rounded = to_bf16(tiny_model(rope_theta=10000.0))
    wide = LanguageModel(rounded.config).double()
    wide.load_state_dict({name: tensor.double() for name, tensor in rounded.state_dict().items()})
    texts = [random_tokens(length + 9, seed=length) for length in PROMPTS]
    pool = pool_of(rounded, scratch=True)
    rows = begun(rounded, pool, texts)
    logits, _ = walk(runner_of(rounded, pool, record), rows, texts, rounds=1)
    with torch.no_grad():
        truth = [wide.logits(wide(text, Documents.from_lengths([len(text)])).hidden_TD) for text in texts]
    want = torch.stack([truth[place][PROMPTS[place]] for place in MEMBERS[0]])
    # A router may choose another expert where two lie within bf16's rounding of the stream.
    error = (logits[0].double() - want).abs().amax(-1) / want.abs().amax()
    assert error.median() <= 0.05 and logits[0].dtype == torch.float32
    assert len(set(logits[0].flatten().tolist())) > 0.9 * logits[0].numel(), "logits were rounded to bf16"


def test_a_row_without_a_page_of_its_own_is_refused() -> None:
    model = tiny_model("MAD")
    pool = pool_of(model, scratch=True)
    row, other = started(pool), started(pool)
    step = StaticStep(model, pool, 2, 4)
    with pytest.raises(RuntimeError, match="1 tokens do not fit on 0 pages: call ensure first"):
        step.fill([row], [0])
    read(model, pool, [row], [random_tokens(10)])
    pool.allocator.retain(row.table[0])
    other.table, other.length = list(row.table), row.length
    with pytest.raises(RuntimeError, match="about to be written at 10 is shared"):
        step.fill([row], [0])
    with pytest.raises(ValueError, match="2 rows, each only once"):
        step.fill([row, row], [0, 0])
    row.length = 4 * PAGE
    with pytest.raises(ValueError, match="257 tokens do not fit on the 4 pages of this step"):
        step.fill([row], [0])
    with pytest.raises(ValueError, match="a scratch slot"):
        StaticStep(model, pool_of(model, scratch=False), 2, 4)


def test_buckets_are_few_and_hold_every_batch() -> None:
    model = tiny_model("AD")
    steps = StaticSteps(model, pool_of(model, scratch=True), uncaptured)
    draw = random.Random(0)
    for _ in range(200):
        rows, pages = draw.randint(1, 6), draw.randint(1, 16)
        height, width = steps._key(rows, pages)
        assert rows <= height <= min(6, 2 * rows) and pages <= width <= max(4, 2 * pages)
