"""Capacity factor with recycling as an option of training: where it acts, where it must not, and that it repeats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model_cases import random_tokens, tiny_model
from op_cases import assert_close, bit_equal, relative_error
from turbos.common.records import IGNORED, Batch, Documents
from turbos.model.generate import generate
from turbos.model.lm import LanguageModel
from turbos.model.mixers import Pass
from turbos.model.state import HybridState
from turbos.ops import moe
from turbos.ops.recycle import capacity_of, recycle_truth
from turbos.train.optim import OptimConfig
from turbos.train.trainer import Trainer, next_token_loss, recycling_seed

LENGTHS = (21, 40, 1, 18)
TOKENS = sum(LENGTHS)


def skewed_model(layers: str = "MFSFAF", dtype: torch.dtype = torch.float32, **changes: object) -> LanguageModel:
    """A model whose routers send most tokens to few experts."""
    options: dict[str, object] = {"capacity_factor": 1.0, "num_experts": 6, **changes}
    model = tiny_model(layers, dtype=dtype, **options)
    with torch.no_grad():
        for sublayer in model.sublayers:
            if sublayer.kind == "F":
                sublayer.mixer.router_weight *= torch.linspace(0.2, 3.0, 6)[:, None]
    return model


def make_batch(seed: int) -> Batch:
    """A batch of four documents with a weight for each target."""
    tokens, documents = random_tokens(TOKENS, seed), Documents.from_lengths(LENGTHS)
    targets = tokens.roll(-1)
    targets[documents.cu_seqlens[1:] - 1] = IGNORED
    return Batch(tokens, documents, targets, (targets != IGNORED).float())


def hidden_of(model: LanguageModel, seed: int | None, tokens_seed: int = 0) -> Tensor:
    """Hidden states of four documents, with recycling or without."""
    batch = make_batch(tokens_seed)
    with torch.no_grad():
        return model(batch.tokens_T, batch.documents, recycling_seed=seed).hidden_TD


@pytest.mark.parametrize("options", [{}, {"router": "sigmoid", "bias_update": "update", "router_scale": 1.5}], ids=str)
def test_a_sublayer_with_capacity_is_its_slow_truth_forward_and_gradient(options: dict[str, object]) -> None:
    model = skewed_model("F", torch.float64, **options)
    mixer, documents = model.sublayers[0].mixer, Documents.from_lengths(LENGTHS)
    x = torch.randn(TOKENS, 24, generator=torch.Generator().manual_seed(1)).double()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    parameters = [mixer.router_weight, mixer.w_in, mixer.w_out]

    def slow(rows: Tensor) -> Tensor:
        scores = rows @ mixer.router_weight.T
        if options:
            scores = 1 / (1 + torch.exp(-scores))
        chosen = (scores + (mixer.selection_bias if options else 0)).detach().topk(2).indices
        experts = recycle_truth(chosen, 6, capacity_of(TOKENS, 2, 6, 1.0), torch.Generator().manual_seed(9))
        assert (experts != chosen).any()
        picked = torch.stack([row[experts[t]] for t, row in enumerate(scores)])
        gates = torch.stack([1.5 * row / row.sum() if options else row.softmax(0) for row in picked])
        routed = moe.mix_experts_truth(rows, moe.Routing(experts, gates), mixer.w_in, mixer.w_out, "swiglu")
        return routed + mixer.shared(rows, None, None)

    def fast(rows: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(9)
        return mixer(rows, Pass(documents, documents.positions_T, False, (), recycling=generator), None)

    results = []
    for form in (fast, slow):
        rows = x.clone().requires_grad_()
        output = form(rows)
        results.append([output.detach(), *torch.autograd.grad((output * weight).sum(), [rows, *parameters])])
    assert_close(results[0], results[1], 1e-10, ("y", "x", "router", "w_in", "w_out"), floor=1.0)


def test_no_expert_of_a_training_call_is_above_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loads = skewed_model(), []
    plain = moe.mix_experts

    def recorded(x: Tensor, routing: moe.Routing, load_E: Tensor, *rest: object) -> Tensor:
        assert torch.equal(load_E, moe.expert_load(routing.experts_TK, 6))
        loads.append(int(load_E.max()))
        return plain(x, routing, load_E, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(moe, "mix_experts", recorded)
    hidden_of(model, 0)
    hidden_of(model, None)
    capacity = capacity_of(TOKENS, 2, 6, 1.0)
    assert len(loads) == 6 and max(loads[:3]) <= capacity < min(loads[3:])


def test_a_seed_repeats_bit_for_bit_and_another_gives_another() -> None:
    model = skewed_model()
    first, again, other = hidden_of(model, 3), hidden_of(model, 3), hidden_of(model, 4)
    assert bit_equal(first, again) and relative_error(other, first) > 1e-3


def test_without_a_seed_or_a_factor_there_is_no_capacity() -> None:
    limited, free = skewed_model(), skewed_model(capacity_factor=None)
    assert bit_equal(hidden_of(limited, None), hidden_of(free, None))
    assert bit_equal(hidden_of(free, 3), hidden_of(free, None))
    assert relative_error(hidden_of(limited, 3), hidden_of(limited, None)) > 1e-3
    # Enough room for all: the seed changes nothing.
    assert bit_equal(hidden_of(skewed_model(capacity_factor=6.0), 3), hidden_of(free, None))


def test_generation_scoring_and_running_states_know_no_capacity() -> None:
    limited, free = skewed_model(), skewed_model(capacity_factor=None)
    prompts = [random_tokens(length, seed=length).tolist() for length in (30, 7)]
    assert generate(limited, prompts, 12) == generate(free, prompts, 12)
    batch = make_batch(0)
    losses = [float(next_token_loss(model, batch).loss_sum.detach()) for model in (limited, free)]
    assert losses[0] == losses[1]
    state = HybridState.alloc(limited.config, 4, 64)
    with pytest.raises(ValueError, match="training"):
        limited(batch.tokens_T, batch.documents, state, recycling_seed=0)


def test_routers_report_what_they_chose_themselves_and_how_much_was_recycled() -> None:
    model, batch = skewed_model(), make_batch(0)
    free, limited = (model(batch.tokens_T, batch.documents, recycling_seed=seed) for seed in (None, 5))
    # The first router reads the same rows; later ones what recycling made of them.
    assert torch.equal(free.load_LE[0], limited.load_LE[0])
    assert free.recycled_share == 0 and 0.1 < float(limited.recycled_share) < 0.9
    above = (limited.load_LE - capacity_of(TOKENS, 2, 6, 1.0)).clamp(min=0).sum() / limited.load_LE.sum()
    assert float(limited.recycled_share) == pytest.approx(float(above), abs=0.02)


def test_the_trainer_seeds_recycling_by_seed_step_and_batch() -> None:
    batches = [make_batch(1), make_batch(2)]

    def losses(seed: int, start: int) -> list[float]:
        trainer = Trainer(skewed_model(), OptimConfig(lr=1e-9), 10, seed)
        trainer.step = start
        stats = trainer.forward_backward(batches)
        assert 0.1 < stats.means["recycled"] < 0.9
        return [stats.loss]

    assert losses(0, 3) == losses(0, 3)
    assert len({*losses(0, 3), *losses(0, 4), *losses(1, 3)}) == 3
    assert (
        len({recycling_seed(seed, step, number) for seed in (0, 1) for step in range(50) for number in (1, 2)}) == 200
    )
    plain = Trainer(skewed_model(capacity_factor=None), OptimConfig(), 10).forward_backward(batches)
    assert "recycled" not in plain.means


def test_resumed_training_goes_on_bit_for_bit() -> None:
    def run(steps: range, trainer: Trainer) -> None:
        for step in steps:
            trainer.forward_backward([make_batch(step)])
            trainer.optim_step()

    whole = Trainer(skewed_model(), OptimConfig(lr=1e-2), 6, seed=4)
    run(range(6), whole)
    first = Trainer(skewed_model(), OptimConfig(lr=1e-2), 6, seed=4)
    run(range(3), first)
    second = Trainer(skewed_model(), OptimConfig(lr=1e-2), 6, seed=4)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.step = first.step
    run(range(3, 6), second)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_every_expert_of_a_collapsed_router_is_trained_with_capacity_and_starves_without() -> None:
    def trained_experts(factor: float | None) -> int:
        model = skewed_model("F", capacity_factor=factor, aux_loss=0.0, z_loss=0.0, shared_expert_size=0)
        with torch.no_grad():
            # All tokens share a direction, and two rows of the router point there.
            model.embed_weight += 1.0
            model.sublayers[0].mixer.router_weight[:2] += 0.5
            model.sublayers[0].mixer.router_weight[2:] -= 0.5
        Trainer(model, OptimConfig(), 10).forward_backward([make_batch(0)])
        return int(model.sublayers[0].mixer.w_out.grad.flatten(1).any(1).sum())

    assert trained_experts(None) == 2 and trained_experts(1.0) == 6
