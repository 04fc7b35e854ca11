"""The engine on static steps: texts of the plain loop, failures that are said, memory; on CUDA, graphs themselves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from model_cases import tiny_config, tiny_model
from static_cases import record
from turbos.common.errors import UserError
from turbos.common.records import Completion
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.graphs import StaticSteps
from turbos.engine.layout import Layout
from turbos.engine.memory import plan
from turbos.engine.pages import PAGE
from turbos.engine.sampling_params import SamplingParams
from turbos.model.generate import generate
from turbos.model.lm import LanguageModel

FAMILIES: dict[str, dict[str, object]] = {
    "granite": {
        "layers": "MFAFMF",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "mamba_groups": 1,
    },
    "nemotron": {
        "layers": "MFMADF",
        "activation": "relu2",
        "router": "sigmoid",
        "bias_update": "freeze",
        "router_scale": 2.5,
        "tied": False,
    },
    "llama": {"layers": "ADADAD", "rope_theta": 10000.0},
    "turbos": {"layers": "SFAFMD", "qk_norm": True, "rope_theta": 10000.0},
}
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs cannot be captured here")


def family_model(name: str, seed: int) -> LanguageModel:
    """A model of a family with sizes drawn by a seed."""
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2, 3))
    sizes = {
        "hidden_size": draw.choice((16, 24, 40)),
        "num_kv_heads": kv_heads,
        "num_heads": kv_heads * draw.choice((1, 2, 4)),
        "head_dim": draw.choice((4, 6, 8)),
        "mamba_state": draw.choice((3, 8)),
        "num_experts": draw.choice((3, 24)),
        "top_k": draw.choice((1, 3)),
        "shared_expert_size": draw.choice((0, 8)),
    }
    fixed = {name: value for name, value in FAMILIES[name].items() if name != "layers"}
    return tiny_model(str(FAMILIES[name]["layers"]), seed=seed, **{**sizes, **fixed})


def engine_of(model: LanguageModel, **options: object) -> Engine:
    config = {"memory": 1 << 26, "max_running": 5, "context": 512, "precision": "own", "path": "static", **options}
    return Engine.of_copy(model, config=EngineConfig(**config))  # type: ignore[arg-type]


def recorded(engine: Engine, capture: Callable[..., Callable[[], None]] = record) -> Engine:
    """The engine with its steps through a capture that has a graph's rules."""
    static = StaticSteps(engine.model, engine.pool, capture)
    engine._runner = replace(engine._runner, static=static)
    return engine


def prompts_of(model: LanguageModel, lengths: tuple[int, ...] = (1, 5, 62, 130, 33, 200, 17)) -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(model.config.vocab_size) for _ in range(length)] for length in lengths]


def greedy(engine: Engine, prompts: list[list[int]], count: int = 12, **options: object) -> list[Completion]:
    return engine.generate(prompts, SamplingParams(max_new_tokens=count, stop_ids=frozenset(), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_the_plain_loop(family: str, seed: int) -> None:
    model = family_model(family, seed)
    prompts = prompts_of(model)
    engine = recorded(engine_of(model))
    got = greedy(engine, prompts)
    assert engine._runner.static is not None and not engine._runner.static.refusal
    want = generate(model, prompts, 12)
    assert [one.ids for one in got] == [one.ids for one in want]
    for mine, theirs in zip(got, want, strict=True):
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=5e-5)


def test_routes_are_the_plain_steps() -> None:
    model = family_model("granite", 2)
    prompts = prompts_of(model)
    want = greedy(engine_of(model, path="torch"), prompts, routes=True)
    got = greedy(recorded(engine_of(model)), prompts, routes=True)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.routes is not None and theirs.routes is not None and torch.equal(mine.routes, theirs.routes)


def test_preempted_answers_and_forks_go_on_with_the_same_text() -> None:
    model = tiny_model("MADA")
    layout = Layout.of(model.config)
    roomy = engine_of(model, max_running=6)
    steps = roomy.plan.working_bytes + roomy.weights.nbytes
    tight = engine_of(
        model, max_running=6, memory=steps + (6 * layout.state_bytes + 9 * layout.page_bytes) * 4 // 3 + 3
    )
    prompts = prompts_of(model, (60, 50, 100, 20, 61, 30))
    params = SamplingParams(max_new_tokens=90, n=2, temperature=1.0, stop_ids=frozenset())
    want, got = roomy.generate(prompts, params), tight.generate(prompts, params)
    assert tight.metrics().preemptions > 0
    assert sum(mine.ids != theirs.ids for mine, theirs in zip(got, want, strict=True)) <= 1
    tight.cache.clear()
    assert tight.pool.free_slots == tight.pool.num_slots
    assert tight.pool.allocator.free == tight.pool.allocator.num_pages


def test_new_weights_are_known_to_what_was_captured() -> None:
    model, other = tiny_model("MFAD"), tiny_model("MFAD", seed=5)
    engine = recorded(engine_of(model))
    prompts = prompts_of(model)
    greedy(engine, prompts)
    steps = engine._runner.static
    assert steps is not None and len(steps._steps) > 2
    made = dict(steps._steps)
    engine.load_weights(other.state_dict().items(), 1)
    assert [one.ids for one in greedy(engine, prompts)] == [one.ids for one in generate(other, prompts, 12)]
    assert engine._runner.static is steps and made.items() <= steps._steps.items(), "nothing is captured again"


def test_an_engine_says_what_runs() -> None:
    model = tiny_model("MFAD")
    assert engine_of(model).describe()[0].startswith("engine: static step, not captured, weights fp32; ")
    assert engine_of(model, path="torch").describe()[0].startswith("engine: plain torch step (path is 'torch'), ")
    assert engine_of(model.double()).describe()[0].startswith("engine: static step, not captured, weights float64; ")
    assert (
        engine_of(tiny_model().bfloat16()).describe()[0].startswith("engine: static step, not captured, weights bf16")
    )


def test_a_capture_that_fails_at_once_leaves_the_plain_step_and_says_so() -> None:
    def failing(step: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    model = tiny_model("MFAD")
    engine = recorded(engine_of(model), failing)
    reason = "operation not permitted when stream is capturing"
    assert engine.describe()[0].startswith(f"engine: plain torch step (no static step, not captured: {reason}), ")
    prompts = prompts_of(model)
    assert [one.ids for one in greedy(engine, prompts)] == [one.ids for one in generate(model, prompts, 12)]


def test_a_capture_that_fails_later_is_said_once_and_nothing_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    def small(step: Callable[[], None]) -> Callable[[], None]:
        if step.batch > 2:  # type: ignore[attr-defined]
            raise torch.OutOfMemoryError("CUDA out of memory")
        return record(step)

    model = tiny_model("MFAD")
    engine = recorded(engine_of(model), small)
    prompts = prompts_of(model)
    assert [one.ids for one in greedy(engine, prompts)] == [one.ids for one in generate(model, prompts, 12)]
    said = "engine: CUDA graphs are given up, the plain step goes on: CUDA out of memory\n"
    assert capsys.readouterr().err == said and "CUDA out of memory" in engine.describe()[0]


def test_graphs_that_cannot_be_are_one_line() -> None:
    with pytest.raises(
        UserError, match="CUDA graphs need a model on a CUDA device, this one is on cpu; set device 'cuda'"
    ):
        engine_of(tiny_model("MD"), path="graphs")


def test_scratch_places_are_in_the_plan() -> None:
    config = tiny_config("MDADA")
    layout = Layout.of(config)
    plain, static = (plan(config, 0, 1 << 24, 512, 4, static=static) for static in (False, True))
    rows = 4 * (2 * layout.state_bytes + 2 * 8 * layout.page_bytes // 2)
    assert static.working_bytes - plain.working_bytes == layout.state_bytes + layout.page_bytes + rows
    engine = engine_of(tiny_model("MDADA"), memory=1 << 22)
    pool = engine.pool
    assert pool.conv_SX.shape[0] == pool.num_slots + 1 and pool.keys[0].shape[0] == pool.allocator.num_pages + 1
    held = sum(x.nbytes for x in (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values))
    assert held + engine.cache.limit + engine.weights.nbytes + engine.plan.working_bytes <= (
        (1 << 22) + layout.state_bytes + layout.page_bytes
    ), "working memory counts the scratch places too"
    assert engine.plan.pages * PAGE == engine.longest


# With a CUDA device


@NEEDS_CUDA
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_captured_is_plain(family: str, precision: str) -> None:
    model = family_model(family, 0)
    prompts = prompts_of(model)
    graphs, plain = (engine_of(model, device="cuda", path=path, precision=precision) for path in ("graphs", "torch"))
    assert graphs.describe()[0].startswith(f"engine: CUDA graphs, weights {precision}; ")
    for _ in range(2):  # The second time, captured buckets are used again by other requests.
        got, want = greedy(graphs, prompts), greedy(plain, prompts)
        wrong = sum(mine.ids != theirs.ids for mine, theirs in zip(got, want, strict=True))
        assert wrong <= (0 if precision == "fp32" else 2)
        if precision == "fp32":
            for mine, theirs in zip(got, want, strict=True):
                assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
    steps = graphs._runner.static
    assert steps is not None and not steps.refusal


@NEEDS_CUDA
def test_captured_steps_know_new_weights() -> None:
    model, other = tiny_model("MFAD"), tiny_model("MFAD", seed=5)
    engine = engine_of(model, device="cuda", path="auto", precision="fp32")
    prompts = prompts_of(model)
    greedy(engine, prompts)
    engine.load_weights(other.state_dict().items(), 1)
    assert [one.ids for one in greedy(engine, prompts)] == [one.ids for one in generate(other, prompts, 12)]


@NEEDS_CUDA
def test_captured_steps_do_not_grow() -> None:
    engine = engine_of(tiny_model(), device="cuda", path="graphs", precision="bf16")
    prompts = prompts_of(engine.model)
    greedy(engine, prompts)
    held = torch.cuda.memory_allocated()
    for _ in range(3):
        greedy(engine, prompts)
    assert torch.cuda.memory_allocated() <= held + (1 << 20)
