"""AdamW or Muon over the groups that the model declares, and the warm-up-stable-decay learning rate.

It decides neither what a parameter is (`model.parameters.parameter_table` does), nor how Muon steps (`train.muon`), nor
when to step (`train.trainer`).

>>> config = OptimConfig(lr=1.0, warmup_steps=2, decay_fraction=0.5, final_lr_ratio=0.0)
>>> [learning_rate(step, config, total_steps=8) for step in range(8)]
[0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from turbos.common.errors import UserError
from turbos.model.lm import LanguageModel
from turbos.model.parameters import ParameterSpec, parameter_table
from turbos.train.muon import BatchedMuon, JointOptimizer, matrix_path

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")

NO_HIDDEN_MATRIX = ("embed_weight", "untied_head_weight", "router_weight")
"""Matrices that AdamW takes under Muon too: they read from or write to choices, not hidden states."""

ADAMW_MOMENTS, MUON_MOMENTS = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule.

    `kind` muon takes hidden matrices and experts with Muon (`momentum`, `matrix_lr_factor` times the rate) and all else
    with AdamW (`betas`, `eps`); weight decay is one for both.
    The rate rises linearly over `warmup_steps`, stays at `lr`, and falls to `final_lr_ratio * lr` over the last
    `decay_fraction` of all steps (0 = never): in a line, or along a `cosine`. Routed experts learn at
    `routed_lr_factor` times that, because each sees only its share of the tokens (Hunyuan-Large, arXiv 2411.02265).
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    warmup_steps: int = 0
    decay_fraction: float = 0.2
    decay: Literal["linear", "cosine"] = "linear"
    final_lr_ratio: float = 0.0
    routed_lr_factor: float = 0.31
    momentum: float = 0.95
    matrix_lr_factor: float = 1.0

    def __post_init__(self) -> None:
        for name, words in (("kind", ("adamw", "muon")), ("decay", ("linear", "cosine"))):
            if getattr(self, name) not in words:
                raise UserError(f"optim: {name} {getattr(self, name)!r} is none of {', '.join(words)}")
        for name in ("lr", "eps", "routed_lr_factor", "matrix_lr_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optim: {name} must be above 0 and finite, not {getattr(self, name)}")
        if not self.clip > 0:
            raise UserError(f"optim: clip must be above 0 (.inf for no clipping), not {self.clip}")
        if not 0 <= self.weight_decay < math.inf:
            raise UserError(f"optim: weight_decay must not be below 0, and finite; not {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optim: betas must be from 0 to below 1, not {list(self.betas)}")
        if not 0 <= self.momentum < 1:
            raise UserError(f"optim: momentum must be from 0 to below 1, not {self.momentum}")
        if not (0 <= self.decay_fraction <= 1 and 0 <= self.final_lr_ratio <= 1):
            raise UserError("optim: decay_fraction and final_lr_ratio lie between 0 and 1")
        if self.warmup_steps < 0:
            raise UserError("optim: warmup_steps must not be below 0")


def learning_rate(step: int, config: OptimConfig, total_steps: int) -> float:
    """Rate of optimizer step `step` (from 0) of a run of `total_steps`.

    Warm-up ends at exactly `lr`; where warm-up and decay overlap, the lower of the two counts.
    """
    rising = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    decay_steps = config.decay_fraction * total_steps
    remaining = (total_steps - step) / decay_steps if decay_steps else 1.0
    left = min(1.0, max(0.0, remaining))
    if config.decay == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2.0
    falling = config.final_lr_ratio + (1.0 - config.final_lr_ratio) * left
    return config.lr * min(rising, falling)


def build_optimizer(model: LanguageModel, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer with one group for each (by Muon, decay, routed) that occurs.

    Each group carries `lr_factor`, which `set_learning_rate` multiplies into the scheduled rate, and `moments`, the
    names of its parameters' states. ValueError unless the table covers the model.
    """
    table = parameter_table(model)
    parameters = dict(model.named_parameters())
    _assert_coverage(table, parameters)
    members: dict[tuple[bool, bool, bool], list[tuple[str, Tensor]]] = defaultdict(list)
    for spec in table:
        by_muon = config.kind == "muon" and is_hidden_matrix(spec)
        members[by_muon, spec.decay, spec.routed].append((spec.name, parameters[spec.name]))
    groups = {key: _group(named, key, config) for key, named in members.items()}
    adamw = _adamw([group for (by_muon, _, _), group in groups.items() if not by_muon], config)
    parts = [adamw, *_muon([group for (by_muon, _, _), group in groups.items() if by_muon], config)]
    optimizer = adamw if len(parts) == 1 else JointOptimizer(parts)
    set_learning_rate(optimizer, config.lr)
    return optimizer


def is_hidden_matrix(spec: ParameterSpec) -> bool:
    """Whether Muon may take a parameter: it maps hidden states to hidden states, so it decays and is no head."""
    return spec.decay and not spec.name.endswith(NO_HIDDEN_MATRIX)


def _group(named: list[tuple[str, Tensor]], key: tuple[bool, bool, bool], config: OptimConfig) -> dict[str, Any]:
    by_muon, decay, routed = key
    factor = (config.matrix_lr_factor if by_muon else 1.0) * (config.routed_lr_factor if routed else 1.0)
    moments = MUON_MOMENTS if by_muon else ADAMW_MOMENTS
    weight_decay = config.weight_decay if decay else 0.0
    return {"params": named, "weight_decay": weight_decay, "lr_factor": factor, "moments": moments}


def _adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    # Fused AdamW reads and writes each state once; on the CPU it is about 7 times the speed of the plain loop.
    fused = all(tensor.device.type in FUSED_DEVICES for group in groups for _, tensor in group["params"])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _muon(groups: list[dict[str, Any]], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """torch's Muon for single matrices and the batched one for stacks, as many as there are groups for."""
    parts: list[torch.optim.Optimizer] = []
    for group in groups:
        kinds = {tensor.ndim for _, tensor in group["params"]}
        path = matrix_path(group["params"][0][1].device) if kinds == {2} else "batched"
        if path == "torch":
            parts.append(torch.optim.Muon([group], config.lr, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"))
        else:
            parts.append(BatchedMuon([group], config.lr, momentum=config.momentum))
    return parts


def moment_names(optimizer: torch.optim.Optimizer) -> dict[Tensor, tuple[str, ...]]:
    """Names of the states that each parameter has once it has been stepped."""
    return {parameter: group["moments"] for group in optimizer.param_groups for parameter in group["params"]}


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its factor of the scheduled rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def _assert_coverage(table: Sequence[ParameterSpec], parameters: dict[str, nn.Parameter]) -> None:
    declared = [spec.name for spec in table]
    if sorted(declared) != sorted(parameters):
        difference = sorted(set(declared) ^ parameters.keys()) or "names that occur twice"
        raise ValueError(f"the parameter table must cover the model's parameters exactly; it differs in {difference}")
