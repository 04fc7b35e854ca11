"""`turbos bench scan`: Mamba-1's selective scan beside a plain loop over tokens and transformers' own, fp32.

A scan alone, without the projections around it. The plain loop keeps every token's state for autograd, as one would
write it first; transformers' is its path without compiled kernels. Its backward fills a tensor of the whole sequence
for every token, so it is timed on the shortest length only. Results are compared before any speed is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from turbos.bench.peers import interleave, require_agreement
from turbos.bench.rows import Row
from turbos.common.records import Documents
from turbos.ops.selective_scan import selective_scan_chunked

CHANNELS, STATES = 512, 16
LENGTHS, ROUNDS = (512, 2048), 5


@dataclass(frozen=True)
class Case:
    """Inputs of one scan, all of them leaves, and the weight of its output in the loss."""

    x_TI: Tensor
    dt_TI: Tensor
    A_NI: Tensor
    B_TN: Tensor
    C_TN: Tensor
    weight_TI: Tensor

    @classmethod
    def of(cls, tokens: int) -> Case:
        """The same random case everywhere: rates 1 ... N and steps up to 0.1, as a fresh model has them."""
        generator = torch.Generator().manual_seed(0)
        x_TI, weight_TI = torch.randn(2, tokens, CHANNELS, generator=generator)
        dt_TI = 0.1 * torch.rand(tokens, CHANNELS, generator=generator)
        A_NI = -torch.arange(1.0, STATES + 1)[:, None].repeat(1, CHANNELS)
        B_TN, C_TN = torch.randn(2, tokens, STATES, generator=generator)
        x_TI, dt_TI, A_NI, B_TN, C_TN = (x.clone().requires_grad_() for x in (x_TI, dt_TI, A_NI, B_TN, C_TN))
        return cls(x_TI, dt_TI, A_NI, B_TN, C_TN, weight_TI)

    @property
    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.x_TI, self.dt_TI, self.A_NI, self.B_TN, self.C_TN]


Scan = Callable[[Case], Tensor]
Work = Callable[[Scan, Case], list[Tensor]]


def our_scan(case: Case) -> Tensor:
    """`y_TI` of the chunked form."""
    documents = Documents.from_lengths([len(case.x_TI)])
    return selective_scan_chunked(case.x_TI, case.dt_TI, case.A_NI, case.B_TN, case.C_TN, documents)[0]


def plain_scan(case: Case) -> Tensor:
    """`y_TI` of a loop over tokens that autograd follows."""
    decays_TNI = torch.exp(case.dt_TI[:, None] * case.A_NI)
    writes_TNI = case.B_TN[:, :, None] * (case.dt_TI * case.x_TI)[:, None]
    state_NI, states = torch.zeros_like(case.A_NI), []
    for decay_NI, write_NI in zip(decays_TNI.unbind(0), writes_TNI.unbind(0), strict=True):
        state_NI = decay_NI * state_NI + write_NI
        states.append(state_NI)
    return torch.bmm(case.C_TN[:, None], torch.stack(states))[:, 0]


def their_scan(case: Case) -> Tensor:
    """`y_TI` of transformers' fallback."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    x_BIT, dt_BIT, B_BNT, C_BNT = (rows.T[None] for rows in (case.x_TI, case.dt_TI, case.B_TN, case.C_TN))
    y_BIT: Tensor = mamba_selective_scan(x_BIT, dt_BIT, case.A_NI.T, B_BNT, C_BNT)
    return y_BIT[0].T


def gradients(scan: Scan, case: Case) -> list[Tensor]:
    """Forward and backward: the gradients of the leaves."""
    return list(torch.autograd.grad((scan(case) * case.weight_TI).sum(), case.leaves))


@torch.no_grad()
def forward(scan: Scan, case: Case) -> list[Tensor]:
    """The output alone."""
    return [scan(case)]


def bench_scan(lengths: Sequence[int] = LENGTHS, rounds: int = ROUNDS) -> Sequence[Row]:
    """Rows `scan <length> forward` and `scan <length> forward and backward`, tok/s of one sublayer's scan."""
    scans: dict[str, Scan] = {"turbos": our_scan, "plain loop": plain_scan, "transformers": their_scan}
    rows = []
    for length in lengths:
        case = Case.of(length)
        rows.append(_row(f"scan {length} forward", forward, scans, case, rounds))
        trained = scans if length == min(lengths) else {name: scans[name] for name in ("turbos", "plain loop")}
        rows.append(_row(f"scan {length} forward and backward", gradients, trained, case, rounds))
    return rows


def _row(name: str, work: Work, scans: dict[str, Scan], case: Case, rounds: int) -> Row:
    print(f"bench {name}: {rounds} rounds, {torch.get_num_threads()} threads", file=sys.stderr)
    for peer, scan in scans.items():
        for ours, theirs in zip(work(our_scan, case), work(scan, case), strict=True):
            require_agreement(f"{name}, {peer}: results", ours, theirs)
    times = interleave({peer: partial(work, scan, case) for peer, scan in scans.items()}, rounds)
    ratios = {peer: times.ratio("turbos", peer) for peer in scans if peer != "turbos"}
    return Row(name, len(case.x_TI) / times.median("turbos"), "tok/s", ratios)
