"""What a wrong tensor looks like: known mistakes that would give exactly the numbers seen.

What comes before a wrong tensor in its sublayer is known to be right, so each mistake can be computed and compared. An
explanation is a help for reading, it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.ops.selective_scan import selective_scan_recurrent
from turbos.ops.ssd import ssd_recurrent
from turbos.verify.compare import relative_error
from turbos.verify.readings import GATES, NORM, ROUTER
from turbos.verify.truth import rms_norm, silu

Weights = Callable[[str], Tensor]
Mistakes = Iterator[tuple[str, Tensor]]
SHIPPED_CLAMP = 1e-3
"""`time_step_min` as nemotron_h's config has it by default."""


def explanation(
    config: ModelConfig,
    weight: Weights,
    tensor: str,
    got: Mapping[str, Tensor],
    want: Mapping[str, Tensor],
    tolerance: float,
) -> str:
    """The first known mistake that gives what was seen, as words to add; empty without one.

    `got` and `want` are the tensors of one sublayer by name, of one document, and `input`, the residual stream it read.
    """
    wide = {name: rows.double() for name, rows in got.items()}
    for mistake, rows in _mistakes(config, weight, tensor, wide, want):
        if relative_error(wide[tensor].flatten(1), rows.flatten(1)) <= 10 * tolerance:
            return f" (as if {mistake})"
    return ""


def _mistakes(
    config: ModelConfig, weight: Weights, tensor: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor]
) -> Mistakes:
    if tensor == NORM:
        yield "the norm were left out", got["input"]
        yield "the norm had no weight", rms_norm(got["input"], torch.ones(1, dtype=torch.float64), config.norm_eps)
    elif tensor == "conv":
        yield "the bias were left out", want["conv"] - weight("conv_bias").double()
    elif tensor == "dt" and "x_proj" in got:
        raw_TI = got["x_proj"][:, : config.dt_rank] @ weight("dt_proj.weight").double().T
        yield "the bias were left out", torch.nn.functional.softplus(raw_TI)
    elif tensor == "dt":
        yield f"dt were at least {got['dt'].min():.0e}", want["dt"].clamp(min=got["dt"].min())
    elif tensor in ("B", "C"):
        yield "B and C were swapped", want["C" if tensor == "B" else "B"]
    elif tensor == "scan" and "x_proj" in got:
        yield from _selective_scans(weight, got)
    elif tensor == "scan":
        yield from _scans(weight, got)
    elif tensor == "gated":
        gate_TI = silu(got["in_proj"][:, config.mamba1_inner :])
        skip_TI = got["scan"] + weight("D").double() * got["x"]
        yield "D were left out", got["scan"] * gate_TI
        yield "the gate were left out", skip_TI
        yield "the gate had no silu", skip_TI * got["in_proj"][:, config.mamba1_inner :]
    elif tensor == "gated norm":
        yield from _gated_norms(config, weight, got)
    elif tensor in ("queries", "keys"):
        yield "positions were left out", want["q_proj" if tensor == "queries" else "k_proj"]
    elif tensor == ROUTER:
        rows = got[NORM].bfloat16() @ weight("router_weight").bfloat16().T
        yield "the router were computed in bfloat16", rows.double()
    elif tensor == GATES and config.router == "sigmoid":
        yield "the gates had another scale", want[GATES] * (got[GATES].sum() / want[GATES].sum())


def _scans(weight: Weights, got: Mapping[str, Tensor]) -> Mistakes:
    """Scans of the right inputs with one thing wrong."""
    documents = Documents.from_lengths([len(got["dt"])])
    A_H = -torch.exp(weight("A_log").double())
    x, dt, B, C = (got[name] for name in ("x", "dt", "B", "C"))
    yield "B and C were swapped", ssd_recurrent(x, dt, A_H, C, B, documents)[0]
    clamped = dt.clamp(min=SHIPPED_CLAMP)
    yield f"dt were at least {SHIPPED_CLAMP:.0e}", ssd_recurrent(x, clamped, A_H, B, C, documents)[0]
    yield "nothing decayed", ssd_recurrent(x, dt, torch.zeros_like(A_H), B, C, documents)[0]


def _selective_scans(weight: Weights, got: Mapping[str, Tensor]) -> Mistakes:
    """Mamba-1's scans of the right inputs with one thing wrong."""
    documents = Documents.from_lengths([len(got["dt"])])
    A_NI = -torch.exp(weight("A_log").double().T)
    x, dt, B, C = (got[name] for name in ("x", "dt", "B", "C"))
    slowest_NI = A_NI.amax(0).expand_as(A_NI)
    yield "B and C were swapped", selective_scan_recurrent(x, dt, A_NI, C, B, documents)[0]
    yield "nothing decayed", selective_scan_recurrent(x, dt, torch.zeros_like(A_NI), B, C, documents)[0]
    yield "all states of a channel decayed alike", selective_scan_recurrent(x, dt, slowest_NI, B, C, documents)[0]
    yield "B were not scaled by dt", selective_scan_recurrent(x / dt, dt, A_NI, B, C, documents)[0]


def _gated_norms(config: ModelConfig, weight: Weights, got: Mapping[str, Tensor]) -> Mistakes:
    """Gated norms of the right scan with one thing wrong."""
    gate_TI = silu(got["in_proj"][:, : config.mamba_inner])
    norm_weight = weight("norm_weight").double()
    skip_TI = (got["scan"] + weight("D").double()[:, None] * got["x"]).flatten(1)

    def normed(rows_TI: Tensor, groups: int) -> Tensor:
        ones = torch.ones(1, dtype=torch.float64)
        return rms_norm(rows_TI.unflatten(-1, (groups, -1)), ones, config.norm_eps).flatten(1) * norm_weight

    yield "D were left out", normed(got["scan"].flatten(1) * gate_TI, config.mamba_groups)
    yield "the gate were left out", normed(skip_TI, config.mamba_groups)
    yield "the norm were left out", skip_TI * gate_TI
    yield "the norm took all groups together", normed(skip_TI * gate_TI, 1)
