"""Muon: Newton-Schulz against the float64 SVD, the batched step against torch's own, groups, resuming, learning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.common.records import IGNORED, Batch, Documents
from turbos.model.checkpoint import load_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.model.parameters import parameter_table
from turbos.text.tokenizer import Tokenizer
from turbos.train import muon
from turbos.train.checkpoint import TrainingState, restore_optimizer, save_checkpoint
from turbos.train.muon import COEFFICIENTS, BatchedMuon, JointOptimizer, matrix_path, orthogonalise
from turbos.train.optim import OptimConfig, build_optimizer, is_hidden_matrix
from turbos.train.trainer import Trainer

SHAPES = [(1, 1), (3, 5), (7, 7), (40, 8), (8, 40), (33, 32)]
CUBIC = (1.5, -0.5, 0.0)
"""The classic iteration, which converges to exactly 1 (Higham 2008, section 8.3)."""
CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, layers="MFASD", num_heads=2, num_kv_heads=1, head_dim=16, mamba_heads=4,
    mamba_head_dim=16, mamba_state=16, chunk_size=16, ffn_size=64, num_experts=4, expert_size=32, shared_expert_size=32,
    tied=False,
)  # fmt: skip
MUON = OptimConfig(kind="muon", lr=1e-2)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow_newton_schulz(matrix_FD: Tensor, steps: int) -> Tensor:
    """What the iteration does to each singular value of a matrix, one value at a time."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(matrix_FD, full_matrices=False)
    values = values / matrix_FD.norm()
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_moves_singular_values_as_its_polynomial_says(shape: tuple[int, int]) -> None:
    stack_EFD = randn(4, *shape)
    expected = torch.stack([slow_newton_schulz(matrix, 5) for matrix in stack_EFD])
    torch.testing.assert_close(orthogonalise(stack_EFD), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_converging_coefficients_end_at_the_orthogonal_factor_of_the_svd(shape: tuple[int, int]) -> None:
    stack_EFD = randn(3, *shape, seed=1)
    left, _, right = torch.linalg.svd(stack_EFD, full_matrices=False)
    found = orthogonalise(stack_EFD, steps=60, coefficients=CUBIC)
    torch.testing.assert_close(found, left @ right, rtol=1e-9, atol=1e-9)


def test_five_steps_bring_wide_spectra_near_one_and_keep_the_directions() -> None:
    left, right = (torch.linalg.qr(randn(32, 32, seed=seed)).Q for seed in (2, 3))
    matrix_FD = left @ torch.diag(torch.logspace(0, -1.5, 32, dtype=torch.float64)) @ right
    found = orthogonalise(matrix_FD[None])[0]
    spectrum = torch.diagonal(left.T @ found @ right.T)
    assert spectrum.min() > 0.3 and spectrum.max() < 1.3
    torch.testing.assert_close(left @ torch.diag(spectrum) @ right, found, rtol=1e-8, atol=1e-9)


def test_a_zero_gradient_is_no_nan_and_experts_do_not_mix() -> None:
    stack_EFD = randn(3, 6, 4)
    stack_EFD[1] = 0
    found = orthogonalise(stack_EFD)
    assert torch.equal(found[1], torch.zeros(6, 4, dtype=torch.float64))
    torch.testing.assert_close(found[2], orthogonalise(stack_EFD[2:])[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_the_batched_step_is_that_of_torch(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # torch's Muon multiplies in bfloat16, whose rounding (2^-8) bounds the agreement.
    ours, theirs = (torch.nn.Parameter(randn(*shape, dtype=torch.float32)) for _ in range(2))
    monkeypatch.setattr(muon, "product_dtype", lambda device: torch.float32)
    left = BatchedMuon([{"params": [ours]}], lr=0.02, weight_decay=0.1, momentum=0.9)
    right = torch.optim.Muon([theirs], 0.02, 0.1, 0.9, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for step in range(4):
        ours.grad = randn(*shape, seed=step, dtype=torch.float32)
        theirs.grad = ours.grad.clone()
        left.step()
        right.step()
    moved = (ours - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    assert torch.equal(left.state[ours]["momentum_buffer"], right.state[theirs]["momentum_buffer"])


def test_a_stack_steps_like_its_matrices_one_by_one() -> None:
    stack = torch.nn.Parameter(randn(3, 12, 8, dtype=torch.float32))
    single = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    together, apart = BatchedMuon([{"params": [stack]}], lr=0.02), BatchedMuon([{"params": single}], lr=0.02)
    for step in range(3):
        stack.grad = randn(3, 12, 8, seed=step, dtype=torch.float32)
        for parameter, gradient in zip(single, stack.grad, strict=True):
            parameter.grad = gradient.clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack.detach(), torch.stack([one.detach() for one in single]), rtol=0, atol=2e-3)


def test_a_step_has_the_size_of_adamw_whatever_the_shape() -> None:
    for shape in ((256, 64), (64, 256), (128, 128)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = randn(*shape, dtype=torch.float32)
        BatchedMuon([{"params": [weight]}], lr=1.0, weight_decay=0.0).step()
        # Moonlight, arXiv 2502.16982, section 2.2: AdamW's updates have a root mean square of 0.2 to 0.4.
        assert 0.12 < weight.detach().square().mean().sqrt() < 0.25


def test_what_is_a_hidden_matrix_goes_to_muon_and_all_else_to_adamw() -> None:
    model = LanguageModel(CONFIG).init_weights(0)
    optimizer = build_optimizer(model, MUON)
    assert isinstance(optimizer, JointOptimizer)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    moments = {id(parameter): group["moments"] for group in optimizer.param_groups for parameter in group["params"]}
    parameters = dict(model.named_parameters())
    by_muon = {spec.name for spec in parameter_table(model) if is_hidden_matrix(spec)}
    assert by_muon == {name for name, x in parameters.items() if moments[id(x)] == ("momentum_buffer",)}
    assert all(parameters[name].ndim in (2, 3) for name in by_muon)
    kept = {name.split(".", 2)[-1] for name in parameters.keys() - by_muon}
    assert {"embed_weight", "untied_head_weight", "mixer.router_weight", "mixer.conv_weight", "mixer.A_log"} <= kept
    assert {type(part) for part in optimizer.parts} == {
        torch.optim.AdamW,
        BatchedMuon,
        *({torch.optim.Muon} if matrix_path(torch.device("cpu")) == "torch" else set()),
    }


def test_rates_decay_and_factors_reach_every_part() -> None:
    model = LanguageModel(CONFIG).init_weights(0)
    trainer = Trainer(model, replace(MUON, matrix_lr_factor=0.5, weight_decay=0.2, momentum=0.8), 10)
    trainer.forward_backward([random_batch(0)])
    trainer.optim_step()
    assert isinstance(trainer.optimizer, JointOptimizer)
    for part in trainer.optimizer.parts:
        for group in part.param_groups:
            is_muon = group["moments"] == ("momentum_buffer",)
            routed = any(parameter.ndim == 3 for parameter in group["params"])
            assert group["lr"] == pytest.approx(1e-2 * (0.5 if is_muon else 1.0) * (0.31 if routed else 1.0))
            if is_muon:
                assert group["momentum"] == 0.8 and group["weight_decay"] == 0.2


def random_batch(seed: int) -> Batch:
    tokens_T = torch.randint(320, (48,), generator=torch.Generator().manual_seed(seed))
    targets_T = torch.cat([tokens_T[1:], torch.tensor([IGNORED])])
    return Batch(tokens_T, Documents.from_lengths([48]), targets_T, (targets_T != IGNORED).float())


def trained(steps: int) -> Trainer:
    trainer = Trainer(LanguageModel(CONFIG).init_weights(seed=0), MUON, total_steps=10)
    for step in range(steps):
        trainer.forward_backward([random_batch(step)])
        trainer.optim_step()
    return trainer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["to be or not to be"] * 3, vocab_size=320)


def test_a_saved_muon_run_goes_on_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trainer = trained(3)
    path = save_checkpoint(tmp_path, TrainingState(3, 100), trainer.model, tokenizer, trainer.optimizer)
    again = Trainer(load_model(path), MUON, total_steps=10)
    again.step = restore_optimizer(path, again.model, again.optimizer).step
    for seed in range(3, 6):
        assert len({one.forward_backward([random_batch(seed)]).loss for one in (trainer, again)}) == 1
        assert len({one.optim_step() for one in (trainer, again)}) == 1
    for left, right in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_the_state_of_another_optimizer_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trainer = trained(1)
    path = save_checkpoint(tmp_path, TrainingState(1, 100), trainer.model, tokenizer, trainer.optimizer)
    other = Trainer(load_model(path), OptimConfig(), total_steps=10)
    with pytest.raises(UserError, match="cannot resume") as error:
        restore_optimizer(path, other.model, other.optimizer)
    assert "\n" not in str(error.value)


def test_muon_overfits_three_batches() -> None:
    trainer = Trainer(LanguageModel(CONFIG).init_weights(0), replace(MUON, weight_decay=0.0), 90)
    losses = []
    for step in range(90):
        losses.append(trainer.forward_backward([random_batch(step % 3)]).loss)
        trainer.optim_step()
    assert losses[0] > 5.5 and max(losses[-3:]) < 0.1


@pytest.mark.parametrize("wrong", [{"kind": "sgd"}, {"momentum": 1.0}, {"matrix_lr_factor": 0.0}, {"decay": "step"}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)  # type: ignore[arg-type]
