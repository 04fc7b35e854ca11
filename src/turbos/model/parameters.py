"""The one table that declares each parameter's init, precision, weight decay and learning-rate group.

A parameter is found by the end of its name. `LAW_4` lists the numbers that are computed in fp32 (or wider) whatever the
model's dtype is, and where.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from turbos.model.config import ModelConfig

LAW_4 = (
    ("router logits, scores, gates, balance losses", "model.mixers.Experts"),
    ("dt after softplus, A, decay sums", "model.mixers.Mamba2, model.mixers.Mamba1"),
    ("scan state", "model.state.MambaState, model.state.SelectiveState, ops.ssd, ops.selective_scan"),
    ("mean squares of norms", "ops.norm"),
    ("logits", "model.lm.LanguageModel.logits"),
    ("log-probabilities, entropies, losses", "ops.loss"),
)

Fill = Callable[[Tensor, ModelConfig, Generator], None]


@dataclass(frozen=True)
class ParameterSpec:
    """How one parameter is filled, kept and trained."""

    name: str
    fill: Fill
    precision: Literal["fp32", "model"]
    decay: bool
    routed: bool


def _normal(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    weight.normal_(0.0, config.init_std, generator=generator)


def _branch_output(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    # Each sublayer adds to the residual stream: scaled so that the sum keeps its size at any depth (GPT-2's rule).
    weight.normal_(0.0, config.init_std / math.sqrt(len(config.layers)), generator=generator)


def _ones(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    weight.fill_(1.0)


def _zeros(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    weight.zero_()


def _conv(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    bound = config.conv_kernel**-0.5
    weight.uniform_(-bound, bound, generator=generator)


def _dt_bias(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    # dt starts log-uniform in [0.001, 0.1]; the bias is its inverse softplus (Mamba's reference init).
    dt = torch.exp(torch.empty_like(weight).uniform_(math.log(1e-3), math.log(1e-1), generator=generator))
    weight.copy_(dt + torch.log(-torch.expm1(-dt)))


def _A_log(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    if weight.dim() == 1:
        weight.uniform_(1.0, 16.0, generator=generator).log_()
    else:
        # Mamba-1 has a rate for every state of a channel, from slow to fast: 1 ... N (S4D-real, arXiv 2206.11893).
        weight.copy_(torch.arange(1, weight.shape[1] + 1).log().expand(weight.shape))


def _dt_proj(weight: Tensor, config: ModelConfig, generator: Generator) -> None:
    # The size at which the step keeps the variance of its low-rank input (Mamba's reference init).
    bound = config.dt_rank**-0.5
    weight.uniform_(-bound, bound, generator=generator)


# end of the name, init, precision, weight decay, routed expert
TABLE: tuple[tuple[str, Fill, Literal["fp32", "model"], bool, bool], ...] = (
    ("embed_weight", _normal, "model", False, False),
    ("untied_head_weight", _normal, "model", True, False),
    ("norm_weight", _ones, "model", False, False),
    ("in_proj.weight", _normal, "model", True, False),
    ("conv_weight", _conv, "model", False, False),
    ("conv_bias", _zeros, "model", False, False),
    ("dt_bias", _dt_bias, "fp32", False, False),
    ("A_log", _A_log, "fp32", False, False),
    ("mixer.D", _ones, "fp32", False, False),
    ("x_proj.weight", _normal, "model", True, False),
    ("dt_proj.weight", _dt_proj, "model", True, False),
    ("out_proj.weight", _branch_output, "model", True, False),
    ("q_proj.weight", _normal, "model", True, False),
    ("k_proj.weight", _normal, "model", True, False),
    ("v_proj.weight", _normal, "model", True, False),
    ("o_proj.weight", _branch_output, "model", True, False),
    ("router_weight", _normal, "fp32", True, False),
    ("shared.w_in.weight", _normal, "model", True, False),
    ("shared.w_out.weight", _branch_output, "model", True, False),
    ("mixer.w_in.weight", _normal, "model", True, False),
    ("mixer.w_out.weight", _branch_output, "model", True, False),
    ("mixer.w_in", _normal, "model", True, True),
    ("mixer.w_out", _branch_output, "model", True, True),
)


def parameter_spec(name: str) -> ParameterSpec:
    """The table's row for a parameter; `KeyError` if the table does not know it."""
    for end, fill, precision, decay, routed in TABLE:
        if name.endswith(end):
            return ParameterSpec(name, fill, precision, decay, routed)
    raise KeyError(f"parameter {name} is not in the table of model/parameters.py: declare its init and decay there")


def parameter_table(model: nn.Module) -> list[ParameterSpec]:
    """The row of every parameter of a model, in its order."""
    return [parameter_spec(name) for name, _ in model.named_parameters()]


@torch.no_grad()
def init_parameters(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter from one seed; the order of parameters decides the draws. Buffers are zeroed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        parameter_spec(name).fill(parameter, config, generator)
    for buffer in model.buffers():
        buffer.zero_()
