"""Optimizer groups and the learning-rate schedule."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.model.parameters import parameter_table
from turbos.train.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate


def tiny_model(layers: str = "MFAD") -> LanguageModel:
    config = ModelConfig(
        vocab_size=64, hidden_size=16, layers=layers, num_heads=2, num_kv_heads=1, head_dim=8, mamba_heads=2,
        mamba_head_dim=8, mamba_state=8, chunk_size=16, ffn_size=32, num_experts=4, expert_size=16,
        shared_expert_size=16,
    )  # fmt: skip
    return LanguageModel(config).init_weights(seed=0)


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig())
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_an_undeclared_parameter_is_refused_by_name() -> None:
    model = tiny_model()
    model.surprise = nn.Parameter(torch.zeros(3))
    with pytest.raises((KeyError, ValueError), match="surprise"):
        build_optimizer(model, OptimConfig())


def test_decay_and_routed_rate_follow_the_table() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1, routed_lr_factor=0.31))
    set_learning_rate(optimizer, 2.0)
    parameters = dict(model.named_parameters())
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    for spec in parameter_table(model):
        group = group_of[id(parameters[spec.name])]
        assert group["weight_decay"] == (0.1 if spec.decay else 0.0), spec.name
        assert group["lr"] == pytest.approx(0.62 if spec.routed else 2.0), spec.name
    assert any(spec.routed for spec in parameter_table(model))


def test_a_routed_expert_moves_by_its_share_of_the_rate() -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.0, lr=1e-3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the rate itself, whatever the gradient's size.
    for spec in parameter_table(model):
        moved = (before[spec.name] - dict(model.named_parameters())[spec.name]).abs().max().item()
        assert moved == pytest.approx(0.31e-3 if spec.routed else 1e-3, rel=2e-3), spec.name


def test_fused_adamw_agrees_with_torch_plain_adamw() -> None:
    ours, plain = tiny_model(), tiny_model()
    config = OptimConfig(lr=1e-2, routed_lr_factor=1.0, weight_decay=0.0)
    optimizers = [
        build_optimizer(ours, config),
        torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=config.betas, weight_decay=0.0, fused=False),
    ]
    for step in range(5):
        for model, optimizer in zip((ours, plain), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
    for left, right in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-6)


def test_schedule_warms_up_stays_and_decays() -> None:
    config = OptimConfig(lr=1e-2, warmup_steps=10, decay_fraction=0.2, final_lr_ratio=0.1)
    rates = [learning_rate(step, config, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3) and rates[9] == 1e-2
    assert set(rates[9:81]) == {1e-2}
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[80:]))
    assert rates[90] == pytest.approx(1e-2 * 0.55)
    assert learning_rate(100, config, 100) == pytest.approx(1e-3)


def test_schedule_without_warm_up_and_decay_is_constant() -> None:
    config = OptimConfig(lr=1e-4, warmup_steps=0, decay_fraction=0.0)
    assert {learning_rate(step, config, 7) for step in range(9)} == {1e-4}


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"clip": 0.0}, {"decay_fraction": 1.5}, {"warmup_steps": -1}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)  # type: ignore[arg-type]


def test_a_cosine_falls_slowly_at_its_ends_and_reaches_the_floor() -> None:
    config = OptimConfig(lr=1e-2, warmup_steps=0, decay_fraction=1.0, decay="cosine", final_lr_ratio=0.1)
    rates = [learning_rate(step, config, 100) for step in range(101)]
    assert rates[0] == 1e-2 and rates[100] == pytest.approx(1e-3)
    assert rates[50] == pytest.approx(1e-2 * 0.55)
    # (1 + cos(pi / 4)) / 2 of the way between rate and floor.
    assert rates[25] == pytest.approx(1e-3 + 9e-3 * 0.8535533906)
    assert rates[0] - rates[1] < 1e-5 < rates[50] - rates[51]
