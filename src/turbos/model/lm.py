"""The language model: embedding, pre-norm residual sublayers, final norm, head. One module for every use.

Training passes packed documents; prefill and decode also pass a state (`HybridState`, or the engine's pool): document b
continues its sequence b.
It is not a loss or a loop: those live in `ops.loss`, `train` and `generate`.

>>> config = ModelConfig(vocab_size=64, hidden_size=16, layers="MFAF", mamba_heads=2, mamba_head_dim=8)
>>> model = LanguageModel(config).init_weights(seed=0)
>>> tokens = torch.arange(5)
>>> model(tokens, Documents.from_lengths([3, 2])).hidden_TD.shape
torch.Size([5, 16])
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.model.mixers import Experts, Pass, build_mixer
from turbos.model.parameters import init_parameters
from turbos.model.state import RunningState
from turbos.ops.linear import wide_linear
from turbos.ops.norm import rms_norm


@dataclass(frozen=True)
class Output:
    """Hidden states after the final norm, and what the routers report (L mixture-of-experts sublayers).

    `load_LE` counts the routers' own choices, `recycled_share` tells which part of them a capacity sent elsewhere.
    `routes` has what each router chose, `[T, K]`, one tensor for each mixture of experts.
    """

    hidden_TD: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    load_LE: Tensor
    recycled_share: Tensor
    routes: tuple[Tensor, ...] = ()


class Sublayer(nn.Module):
    """`x + multiplier * mixer(norm(x))`."""

    def __init__(self, kind: str, config: ModelConfig):
        super().__init__()
        self.kind, self.eps, self.multiplier = kind, config.norm_eps, config.residual_multiplier
        self.norm_weight = nn.Parameter(torch.empty(config.hidden_size))
        self.mixer = build_mixer(kind, config)

    def forward(self, x_TD: Tensor, call: Pass, state: object) -> Tensor:
        """`[T, D] -> [T, D]`."""
        branch_TD = self.mixer(rms_norm(x_TD, self.norm_weight, self.eps), call, state)
        return x_TD + branch_TD if self.multiplier == 1.0 else torch.add(x_TD, branch_TD, alpha=self.multiplier)


class LanguageModel(nn.Module):
    """A hybrid stack as `config.layers` says. Weights are uninitialised until `init_weights` or a checkpoint load."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.sublayers = nn.ModuleList(Sublayer(kind, config) for kind in config.layers)
        self.norm_weight = nn.Parameter(torch.empty(config.hidden_size))
        if not config.tied:
            self.untied_head_weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))

    def init_weights(self, seed: int) -> LanguageModel:
        """Fill every parameter as the parameter table says, from one seed; returns the model."""
        init_parameters(self, self.config, seed)
        return self

    @property
    def head_weight(self) -> Tensor:
        """Matrix of the head, `[V, D]` (the embedding's where tied)."""
        return self.embed_weight if self.config.tied else self.untied_head_weight

    @property
    def logit_scale(self) -> float:
        """Factor on `hidden @ head^T`."""
        return 1.0 / self.config.logits_scaling

    def forward(
        self,
        tokens_T: Tensor,
        documents: Documents,
        state: RunningState | None = None,
        recycling_seed: int | None = None,
    ) -> Output:
        """Read packed tokens; with a state, continue its sequences and advance it in place.

        A `recycling_seed` is for training: experts keep to `capacity_factor`, and the seed decides where tokens beyond
        it go. Without one there is no capacity.
        """
        if tokens_T.shape[0] != documents.total:
            raise ValueError(f"{tokens_T.shape[0]} tokens, but the documents cover {documents.total}")
        call = self._begin(documents, state, recycling_seed)
        x_TD = F.embedding(tokens_T, self.embed_weight)
        if self.config.embedding_multiplier != 1.0:
            x_TD = x_TD * self.config.embedding_multiplier
        for index, sublayer in enumerate(self.sublayers):
            x_TD = sublayer(x_TD, call, None if state is None else state.layers[index])
        if state is not None:
            state.lengths_B.add_(documents.lengths_N)
        hidden_TD = rms_norm(x_TD, self.norm_weight, self.config.norm_eps)
        return _output(hidden_TD, call)

    def _begin(self, documents: Documents, state: RunningState | None, recycling_seed: int | None) -> Pass:
        if state is None:
            generator = None if recycling_seed is None else torch.Generator().manual_seed(recycling_seed)
            return Pass(documents, documents.positions_T, False, (), recycling=generator)
        if recycling_seed is not None:
            raise ValueError("a running state knows no expert capacity: recycling is for training on whole documents")
        if state.batch != documents.count:
            raise ValueError(f"{documents.count} documents for a state of {state.batch} sequences")
        state.check_room(documents.lengths)
        positions_T = documents.positions_T + state.lengths_B[documents.index_T]
        step = documents.total == documents.count
        return Pass(documents, positions_T, step, tuple(state.lengths), fixed=state.fixed)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits `[T, V]` in fp32 (float64 where the model is)."""
        logits_TV = wide_linear(hidden_TD, self.head_weight)
        return logits_TV if self.logit_scale == 1.0 else logits_TV * self.logit_scale

    def update_selection_bias(self, load_LE: Tensor) -> None:
        """After an optimizer step: move the routers' selection biases (nothing unless `bias_update` is `update`)."""
        if self.config.bias_update != "update":
            return
        experts = [sublayer.mixer for sublayer in self.sublayers if cast(Sublayer, sublayer).kind == "F"]
        for mixer, load_E in zip(experts, load_LE, strict=True):
            cast(Experts, mixer).update_selection_bias(load_E)


def _output(hidden_TD: Tensor, call: Pass) -> Output:
    if not call.routers:
        zero = hidden_TD.new_zeros(())
        return Output(hidden_TD, zero, zero, hidden_TD.new_zeros(0, 0), zero)
    balance = torch.stack([report.balance_loss for report in call.routers]).sum()
    z_loss = torch.stack([report.z_loss for report in call.routers]).sum()
    load_LE = torch.stack([report.load_E for report in call.routers]).float()
    recycled = torch.stack([report.recycled for report in call.routers]).sum()
    routes = tuple(report.experts_TK for report in call.routers)
    return Output(hidden_TD, balance, z_loss, load_LE, recycled / load_LE.sum(), routes)
