"""forward_backward and optim_step: normalisation, micro-batches, refusal of non-finite numbers, balancing, overfit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from turbos.common.records import IGNORED, Batch, Documents
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.train.optim import OptimConfig
from turbos.train.trainer import LossTerms, NonFiniteError, Trainer, next_token_loss

BASE = ModelConfig(
    vocab_size=64, hidden_size=32, layers="MFAD", num_heads=2, num_kv_heads=1, head_dim=16, mamba_heads=4,
    mamba_head_dim=16, mamba_state=16, chunk_size=16, ffn_size=64, num_experts=4, expert_size=32, shared_expert_size=32,
    aux_loss=0.0, z_loss=0.0,
)  # fmt: skip


def tiny_model(**changes: object) -> LanguageModel:
    return LanguageModel(replace(BASE, **changes)).init_weights(seed=0)  # type: ignore[arg-type]


def make_batch(lengths: list[int], seed: int, vocab_size: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    documents = Documents.from_lengths(lengths)
    tokens_T = torch.randint(vocab_size, (documents.total,), generator=generator)
    targets_T = tokens_T.roll(-1)
    targets_T[documents.cu_seqlens[1:] - 1] = IGNORED
    weights_T = torch.rand(documents.total, generator=generator) * (targets_T != IGNORED)
    return Batch(tokens_T, documents, targets_T, weights_T)


def join(batches: list[Batch]) -> Batch:
    lengths = [length for batch in batches for length in batch.documents.lengths]
    return Batch(
        torch.cat([batch.tokens_T for batch in batches]),
        Documents.from_lengths(lengths),
        torch.cat([batch.targets_T for batch in batches]),
        torch.cat([batch.loss_weights_T for batch in batches]),
    )


def gradients(model: LanguageModel) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_loss_is_the_mean_over_the_loss_weight_of_all_batches() -> None:
    model = tiny_model()
    batches = [make_batch([5, 9], 1), make_batch([30], 2)]
    stats = Trainer(model, OptimConfig(), 10).forward_backward(batches)
    total = weight = 0.0
    for batch in batches:
        logits_TV = model.logits(model(batch.tokens_T, batch.documents).hidden_TD)
        nll_T = F.cross_entropy(logits_TV, batch.targets_T, ignore_index=IGNORED, reduction="none")
        total += (nll_T * batch.loss_weights_T).sum().item()
        weight += batch.loss_weights_T.sum().item()
    assert stats.loss == pytest.approx(total / weight, rel=1e-5)
    assert (stats.tokens, stats.loss_weight) == (44, pytest.approx(weight))
    assert stats.load_LE.sum().item() == 44 * BASE.top_k


def test_micro_batches_give_the_gradient_of_one_batch() -> None:
    parts = [make_batch([5, 9], 1), make_batch([30], 2), make_batch([1, 7], 3)]
    split, whole = tiny_model(), tiny_model()
    split_stats = Trainer(split, OptimConfig(), 10).forward_backward(parts)
    whole_stats = Trainer(whole, OptimConfig(), 10).forward_backward([join(parts)])
    assert split_stats.loss == pytest.approx(whole_stats.loss, rel=1e-5)
    for left, right in zip(gradients(split), gradients(whole), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_balance_and_z_losses_join_the_gradient_weighted_by_tokens() -> None:
    parts = [make_batch([12], 1), make_batch([36], 2)]
    model = tiny_model(layers="F", aux_loss=0.5, z_loss=0.25)
    stats = Trainer(model, OptimConfig(), 10).forward_backward(parts)
    outputs = [model(part.tokens_T, part.documents) for part in parts]
    extra = 0.25 * (outputs[0].balance_loss + outputs[0].z_loss) + 0.75 * (outputs[1].balance_loss + outputs[1].z_loss)
    assert stats.balance_loss + stats.z_loss == pytest.approx(extra.item(), rel=1e-5)
    plain = tiny_model(layers="F", aux_loss=0.0, z_loss=0.0)
    Trainer(plain, OptimConfig(), 10).forward_backward(parts)
    (expected,) = torch.autograd.grad(extra, [model.sublayers[0].mixer.router_weight])
    difference = model.sublayers[0].mixer.router_weight.grad - plain.sublayers[0].mixer.router_weight.grad
    torch.testing.assert_close(difference, expected, rtol=1e-3, atol=1e-6)


def test_figures_of_a_loss_function_are_averaged_by_loss_weight() -> None:
    def loss_fn(model: LanguageModel, batch: Batch) -> LossTerms:
        terms = next_token_loss(model, batch)
        return LossTerms(2.0 * terms.loss_sum, terms.output, {"double": 2.0 * float(batch.loss_weights_T.sum())})

    batches = [make_batch([5, 9], 1), make_batch([30], 2)]
    plain = Trainer(tiny_model(), OptimConfig(), 10).forward_backward(batches)
    stats = Trainer(tiny_model(), OptimConfig(), 10).forward_backward(batches, loss_fn)
    assert stats.means == {"double": pytest.approx(2.0)}
    assert stats.loss == pytest.approx(2.0 * plain.loss, rel=1e-6)


def test_a_non_finite_loss_stops_and_names_step_and_batch() -> None:
    def loss_fn(model: LanguageModel, batch: Batch) -> LossTerms:
        terms = next_token_loss(model, batch)
        return LossTerms(terms.loss_sum * (float("nan") if batch.documents.count == 2 else 1.0), terms.output)

    model = tiny_model()
    trainer = Trainer(model, OptimConfig(), 10)
    trainer.forward_backward([make_batch([8], 0)])
    trainer.optim_step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(NonFiniteError, match="loss is nan at step 2, batch 3 of 4"):
        trainer.forward_backward([make_batch(lengths, 1) for lengths in ([8], [8], [4, 4], [8])], loss_fn)
    assert trainer.step == 1
    assert all(torch.equal(left, right) for left, right in zip(before, model.parameters(), strict=True))


def test_a_non_finite_gradient_stops_and_names_parameter_step_and_batch() -> None:
    def loss_fn(model: LanguageModel, batch: Batch) -> LossTerms:
        terms = next_token_loss(model, batch)
        # sqrt at 0 has an infinite slope: the loss stays finite, its gradient does not.
        return LossTerms(terms.loss_sum + (model.sublayers[0].norm_weight - 1.0).abs().sum().sqrt(), terms.output)

    trainer = Trainer(tiny_model(), OptimConfig(), 10)
    with pytest.raises(NonFiniteError, match=r"gradient of sublayers\.0\.norm_weight .* step 1, batch 1 of 2"):
        trainer.forward_backward([make_batch([8], 1), make_batch([8], 2)], loss_fn)


def test_no_loss_weight_and_no_gradient_are_errors() -> None:
    trainer = Trainer(tiny_model(), OptimConfig(), 10)
    batch = make_batch([8], 1)
    with pytest.raises(ValueError, match="step 1: no token"):
        trainer.forward_backward([replace(batch, loss_weights_T=torch.zeros(8))])
    with pytest.raises(ValueError, match="forward_backward comes before"):
        trainer.optim_step()


def test_optim_step_clips_and_clears_the_gradient() -> None:
    model = tiny_model()
    trainer = Trainer(model, OptimConfig(lr=1e-3, clip=0.01, weight_decay=0.0), 10)
    trainer.forward_backward([make_batch([40], 1)])
    expected = torch.cat([gradient.flatten() for gradient in gradients(model)]).norm().item()
    assert trainer.optim_step() == pytest.approx(expected, rel=1e-5)
    # After one step the first moment is (1 - beta1) times the clipped gradient.
    moments = torch.cat([state["exp_avg"].flatten() for state in trainer.optimizer.state.values()])
    assert moments.norm().item() == pytest.approx(0.1 * min(0.01, expected), rel=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters()) and trainer.step == 1


def skewed_router(**changes: object) -> LanguageModel:
    """Inputs share a direction, and expert 0's row of the router points there: it takes part in every choice."""
    model = tiny_model(layers="F", num_experts=8, vocab_size=512, **changes)
    with torch.no_grad():
        model.embed_weight += 0.02
        model.sublayers[0].mixer.router_weight[0] += 0.05
    return model


def load_after_training(steps: int, **changes: object) -> float:
    trainer = Trainer(skewed_router(**changes), OptimConfig(lr=3e-3), steps)
    loads = []
    for step in range(steps):
        loads.append(trainer.forward_backward([make_batch([512], step, vocab_size=512)]).load_max_over_mean)
        trainer.optim_step()
    assert loads[0] > 3.9
    return sum(loads[-5:]) / 5


@pytest.mark.parametrize(
    "changes",
    [{"router": "sigmoid", "bias_update": "update", "bias_rate": 0.01}, {"router": "softmax", "aux_loss": 0.1}],
    ids=["selection bias", "auxiliary loss"],
)
def test_balancing_evens_the_load_of_a_skewed_router(changes: dict[str, object]) -> None:
    assert load_after_training(60, **changes) < 1.6


def test_without_balancing_the_router_stays_skewed() -> None:
    assert load_after_training(60, router="softmax") > 3.0


@pytest.mark.parametrize("state", ["freeze", "off"])
def test_a_frozen_selection_bias_stays(state: str) -> None:
    trainer = Trainer(skewed_router(router="sigmoid", bias_update=state), OptimConfig(), 10)
    trainer.forward_backward([make_batch([64], 0)])
    trainer.optim_step()
    assert trainer.model.sublayers[0].mixer.selection_bias.abs().max() == 0


@pytest.mark.parametrize("layers", ["M", "A", "AF", "AD"])
def test_two_documents_are_overfit_to_near_zero_loss(layers: str) -> None:
    # F and D see one token at a time: they cannot tell contexts apart, so an A stands before them.
    batch = make_batch([20, 33], 5)
    batch = replace(batch, loss_weights_T=(batch.targets_T != IGNORED).float())
    trainer = Trainer(tiny_model(layers=layers, rope_theta=10000.0), OptimConfig(lr=1e-2, weight_decay=0.0), 150)
    first = trainer.forward_backward([batch]).loss
    trainer.optim_step()
    for _ in range(149):
        trainer.forward_backward([batch])
        trainer.optim_step()
    last = trainer.forward_backward([batch]).loss
    assert first > 4.0 and last < 0.02
