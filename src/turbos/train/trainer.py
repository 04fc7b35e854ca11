"""The two verbs of training, `forward_backward` and `optim_step`, over packed batches and any token loss.

It knows nothing of data, files or progress: `train.loop` feeds and saves it, and RL calls the same two verbs with its
own loss. A worked example:

    trainer = Trainer(model, OptimConfig(lr=1e-3), total_steps=100)
    stats = trainer.forward_backward(batches)      # gradients of the mean loss over all the batches' loss weight
    grad_norm = trainer.optim_step()               # clip, AdamW, selection bias; gradients are empty again
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from turbos.common.errors import UserError
from turbos.common.records import Batch
from turbos.model.lm import LanguageModel, Output
from turbos.ops.loss import chunked_cross_entropy
from turbos.train.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate


class NonFiniteError(UserError):
    """The loss or the gradient is not a finite number; the weights are still those of the step before."""


@dataclass(frozen=True)
class LossTerms:
    """What a loss function says of one batch.

    `loss_sum` is the differentiable scalar SUM over tokens of loss weight x loss: the trainer divides it by the loss
    weight of all micro-batches. `sums` are further figures to log, summed over tokens in the same way.
    """

    loss_sum: Tensor
    output: Output
    sums: Mapping[str, float] = field(default_factory=dict)


LossFunction = Callable[[LanguageModel, Batch], LossTerms]


@dataclass(frozen=True)
class BatchStats:
    """Figures of one `forward_backward`: `loss` and `means` per unit of loss weight, `load_LE` counts token choices."""

    loss: float
    balance_loss: float
    z_loss: float
    tokens: int
    loss_weight: float
    load_LE: Tensor
    means: Mapping[str, float]

    @property
    def load_max_over_mean(self) -> float:
        """Load of the busiest expert over the mean, worst layer (1 = even; 1 where there are no experts)."""
        if self.load_LE.numel() == 0:
            return 1.0
        return float((self.load_LE.amax(-1) / self.load_LE.mean(-1)).max())


def next_token_loss(model: LanguageModel, batch: Batch) -> LossTerms:
    """Cross-entropy of the next token (nats), weighted by `batch.loss_weights_T`.

    With a capacity it also tells the share of the routers' choices that were recycled.
    """
    output = model(batch.tokens_T, batch.documents, recycling_seed=batch.recycling_seed)
    loss_sum = chunked_cross_entropy(
        output.hidden_TD, model.head_weight, batch.targets_T, batch.loss_weights_T, model.logit_scale
    )
    if batch.recycling_seed is None or model.config.capacity_factor is None:
        return LossTerms(loss_sum, output)
    return LossTerms(loss_sum, output, {"recycled": float(output.recycled_share) * float(batch.loss_weights_T.sum())})


def recycling_seed(seed: int, step: int, number: int) -> int:
    """Seed of a batch's recycling; 32 bits, because torch's generator on the CPU reads no more."""
    return int.from_bytes(blake2b(f"{seed} {step} {number}".encode(), digest_size=4).digest(), "big")


class Trainer:
    """A model, its optimizer, and the number of optimizer steps done.

    `seed` decides, with the step and the batch's number, where tokens beyond an expert's capacity go (only where the
    model has a `capacity_factor`, and only for losses that read `batch.recycling_seed`: `next_token_loss` does, RL's
    does not, because its samples were made without a capacity).
    """

    def __init__(self, model: LanguageModel, config: OptimConfig, total_steps: int, seed: int = 0) -> None:
        self.model = model
        self.seed = seed
        self.config = config
        self.total_steps = total_steps
        self.optimizer = build_optimizer(model, config)
        self.step = 0
        self._load_LE: Tensor | None = None
        self._grad_norm = torch.zeros(())

    @property
    def lr(self) -> float:
        """Scheduled rate of the next `optim_step` (routed experts take their factor of it)."""
        return learning_rate(self.step, self.config, self.total_steps)

    @property
    def largest_selection_bias(self) -> float:
        """Largest absolute selection bias of all routers (0 where there are none)."""
        biases = [bias for name, bias in self.model.named_buffers() if name.endswith("selection_bias")]
        return max((bias.abs().max().item() for bias in biases), default=0.0)

    def forward_backward(self, batches: Sequence[Batch], loss_fn: LossFunction = next_token_loss) -> BatchStats:
        """Add to the gradients those of `sum(loss) / sum(loss weight)` over all the batches, one after another.

        The model's balance and z losses (coefficients inside) join weighted by each batch's share of the tokens. Raises
        NonFiniteError, naming step and batch, at the first loss or gradient that is not finite.
        """
        loss_weight = sum(float(batch.loss_weights_T.sum(dtype=torch.float64)) for batch in batches)
        tokens = sum(batch.documents.total for batch in batches)
        if loss_weight <= 0:
            raise ValueError(f"step {self.step + 1}: no token of the {len(batches)} batches carries loss weight")
        loss = balance_loss = z_loss = 0.0
        means: dict[str, float] = defaultdict(float)
        for number, batch in enumerate(batches, start=1):
            where = f"step {self.step + 1}, batch {number} of {len(batches)}"
            share = batch.documents.total / tokens
            terms = loss_fn(self.model, replace(batch, recycling_seed=recycling_seed(self.seed, self.step, number)))
            output = terms.output
            objective = terms.loss_sum / loss_weight + share * (output.balance_loss + output.z_loss)
            if not math.isfinite(objective.item()):
                raise NonFiniteError(f"loss is {objective.item()} at {where}: lower optim.lr or look at that batch")
            objective.backward()
            self._check_gradient(where)
            self._add_load(output.load_LE.detach())
            loss += terms.loss_sum.item() / loss_weight
            balance_loss += share * output.balance_loss.item()
            z_loss += share * output.z_loss.item()
            for name, value in terms.sums.items():
                means[name] += value / loss_weight
        return BatchStats(loss, balance_loss, z_loss, tokens, loss_weight, self._accumulated_load(), means)

    def optim_step(self) -> float:
        """Clip, step, move the selection biases, clear the gradients; returns the gradient's norm before clipping."""
        load_LE = self._accumulated_load()
        set_learning_rate(self.optimizer, self.lr)
        clip_grads_with_norm_(self.model.parameters(), self.config.clip, self._grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_selection_bias(load_LE)
        self._load_LE = None
        self.step += 1
        return float(self._grad_norm)

    def _check_gradient(self, where: str) -> None:
        # One pass over the gradients for each micro-batch, cheap beside its matmuls, tells which batch is at fault.
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self._grad_norm = get_total_norm(gradients)
        if not math.isfinite(self._grad_norm.item()):
            names = (
                name for name, x in self.model.named_parameters() if x.grad is not None and not x.grad.isfinite().all()
            )
            raise NonFiniteError(f"gradient of {next(names, 'all parameters together')} is not finite at {where}")

    def _add_load(self, load_LE: Tensor) -> None:
        self._load_LE = load_LE if self._load_LE is None else self._load_LE + load_LE

    def _accumulated_load(self) -> Tensor:
        if self._load_LE is None:
            raise ValueError("there is no gradient: forward_backward comes before optim_step")
        return self._load_LE
