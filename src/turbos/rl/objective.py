"""The policy loss as the trainer's loss function: forward pass, log-probabilities of sampled tokens, loss, figures.

It holds no optimizer and no data. `losses.py` has the mathematics.

    objective = Objective(LossConfig(), temperature=1.0)
    stats = trainer.forward_backward(batches, objective)     # stats.means: entropy, clip_fraction, mismatch, ...
"""

from __future__ import annotations

import torch
from torch import Tensor

from turbos.common.records import Batch
from turbos.model.lm import LanguageModel, Output
from turbos.ops.loss import token_logprobs
from turbos.rl.losses import LossConfig, mismatch, policy_loss
from turbos.train.trainer import LossTerms


class Objective:
    """Callable for `forward_backward`; `largest_mismatch` grows over the batches it has seen (nats)."""

    def __init__(self, config: LossConfig, temperature: float = 1.0, reference: LanguageModel | None = None) -> None:
        self.config, self.temperature, self.reference = config, temperature, reference
        self.largest_mismatch = 0.0

    def __call__(self, model: LanguageModel, batch: Batch) -> LossTerms:
        """Loss sum over the sampled tokens of a batch with `logprobs_T` and `advantages_T`."""
        if batch.logprobs_T is None or batch.advantages_T is None:
            raise ValueError("a batch for reinforcement needs the sampler's log-probabilities and advantages")
        # Prompts need no logits.
        rows_R = torch.nonzero(batch.loss_weights_T)[:, 0]
        output, logprobs_R, entropies_R = self._score(model, batch, rows_R)
        sampled_R, weights_R = batch.logprobs_T[rows_R], batch.loss_weights_T[rows_R]
        loss = policy_loss(
            logprobs_R, sampled_R, batch.advantages_T[rows_R], weights_R, self.config, self._reference(batch, rows_R)
        )
        gap = mismatch(logprobs_R, sampled_R, weights_R)
        self.largest_mismatch = max(self.largest_mismatch, gap.largest)
        sums = {
            "entropy": float((entropies_R * weights_R).sum()),
            "clip_fraction": float(loss.clipped_sum),
            "kl_reference": float(loss.kl_sum),
            "mismatch": gap.absolute_sum,
            "mismatch_k3": gap.k3_sum,
        }
        return LossTerms(loss.loss_sum, output, sums)

    def _score(self, model: LanguageModel, batch: Batch, rows_R: Tensor) -> tuple[Output, Tensor, Tensor]:
        output = model(batch.tokens_T, batch.documents)
        logprobs_R, entropies_R = token_logprobs(
            output.hidden_TD[rows_R], model.head_weight, batch.targets_T[rows_R], model.logit_scale, self.temperature
        )
        return output, logprobs_R, entropies_R.detach()

    @torch.no_grad()
    def _reference(self, batch: Batch, rows_R: Tensor) -> Tensor | None:
        return None if self.reference is None else self._score(self.reference, batch, rows_R)[1]
