"""Recycle routing: an expert takes no more tokens than its capacity, the rest go at random to experts with room.

Hunyuan-Large's answer to dropped tokens (arXiv 2411.02265), for training only: where a token goes depends on the whole
batch. Who is beyond capacity is decided by choice, then by place: all tokens' first choices come before any second one.
Whoever is beyond it draws an order of experts at random and takes, in the same turn, the first that has room and that
the token does not use yet; with none left it stays where it was. So every token keeps `top_k` distinct experts, none is
dropped, and an expert is above capacity only where, in that turn, no other could take the token. The gates of the new
experts are the router's own (`moe.softmax_gates`, `moe.sigmoid_gates`); the paper says nothing of them.

Shapes: T tokens, E experts, K experts of a token, S = T * K choices, X choices beyond capacity.

>>> chosen_TK = torch.tensor([[0], [0], [0], [1]])
>>> recycle(chosen_TK, 2, capacity_of(4, 1, 2, 1.0), torch.Generator().manual_seed(0)).flatten().tolist()
[0, 0, 1, 1]
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def capacity_of(tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Most tokens that an expert takes: `factor` times its even share, rounded up."""
    return math.ceil(factor * tokens * top_k / num_experts)


@torch.no_grad()
def recycle(experts_TK: Tensor, num_experts: int, capacity: int, generator: Generator) -> Tensor:
    """The experts that tokens really go to, `[T, K]`; the generator (on the CPU) alone decides what is random."""
    tokens, top_k = experts_TK.shape
    experts_KT = experts_TK.T.clone(memory_format=torch.contiguous_format)
    over_KT = (_queue_places(experts_KT.flatten(), num_experts) >= capacity).view(top_k, tokens)
    if not over_KT.any():
        return experts_TK
    room_E = (capacity - torch.bincount(experts_KT.flatten(), minlength=num_experts)).clamp_(min=0)
    used_TE = torch.zeros(tokens, num_experts, dtype=torch.bool, device=experts_TK.device).scatter_(1, experts_TK, True)
    wishes_XE = _draw(int(over_KT.sum()), num_experts, generator).to(experts_TK.device)
    for chosen_T, over_T in zip(experts_KT, over_KT, strict=True):
        rows_X = over_T.nonzero()[:, 0]
        mine_XE, wishes_XE = wishes_XE[: len(rows_X)], wishes_XE[len(rows_X) :]
        found_X = _first_with_room(mine_XE.masked_fill(used_TE[rows_X], -1.0), room_E)
        rows_X, found_X = rows_X[found_X < num_experts], found_X[found_X < num_experts]
        chosen_T[rows_X] = found_X
        used_TE[rows_X, found_X] = True
        room_E = room_E - torch.bincount(found_X, minlength=num_experts)
    return experts_KT.T.contiguous()


def recycle_truth(experts_TK: Tensor, num_experts: int, capacity: int, generator: Generator) -> Tensor:
    """The same, one choice at a time: the truth."""
    result, load = experts_TK.tolist(), [0] * num_experts
    beyond = []
    for choice in range(experts_TK.shape[1]):
        for row in result:
            if load[row[choice]] < capacity:
                load[row[choice]] += 1
            else:
                beyond.append((row, choice))
    for (row, choice), wishes_E in zip(beyond, _draw(len(beyond), num_experts, generator), strict=True):
        for expert in wishes_E.argsort(descending=True).tolist():
            if load[expert] < capacity and expert not in row:
                row[choice] = expert
                load[expert] += 1
                break
    return torch.tensor(result, dtype=experts_TK.dtype)


def _draw(rows: int, num_experts: int, generator: Generator) -> Tensor:
    """Wishes `[X, E]`: the largest is the first. float64, so that no two are equal."""
    return torch.rand(rows, num_experts, dtype=torch.float64, generator=generator)


def _queue_places(experts_S: Tensor, num_experts: int) -> Tensor:
    """Place of each choice among those of the same expert, from 0, in the given order."""
    order_S = experts_S.argsort(stable=True)
    counts_E = torch.bincount(experts_S, minlength=num_experts)
    starts_E = counts_E.cumsum(0) - counts_E
    numbers_S = torch.arange(len(experts_S), device=experts_S.device)
    return torch.empty_like(experts_S).scatter_(0, order_S, numbers_S - starts_E[experts_S[order_S]])


def _first_with_room(wishes_XE: Tensor, room_E: Tensor) -> Tensor:
    """What each row gets if rows choose one after another, `[X]`; E where nothing is left. Wishes below 0 are none.

    All ask for their best at once, those that come too late for its room ask for their next, and so on: with one order
    of rows at every expert that ends as choosing in turn does (deferred acceptance has a single outcome then).
    """
    num_experts = len(room_E)
    open_XE = wishes_XE.masked_fill(room_E == 0, -1.0)
    # One more place for rows that no expert can take.
    room = torch.cat([room_E, room_E.new_tensor([len(wishes_XE)])])
    while True:
        best_X, asked_X = open_XE.max(1)
        asked_X = asked_X.masked_fill(best_X < 0, num_experts)
        late_X = _queue_places(asked_X, num_experts + 1) >= room[asked_X]
        if not late_X.any():
            return asked_X
        rows_X = late_X.nonzero()[:, 0]
        open_XE[rows_X, asked_X[rows_X]] = -1.0
