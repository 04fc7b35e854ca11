"""The selective-state-space scan of Mamba2 (state space duality) in three forms that agree.

`ssd_recurrent` is the truth: one token at a time, meant for float64. `ssd_chunked` is the same sum as matrix products
over chunks, with its own backward that recomputes the decay matrix. `ssd_step` advances many sequences by one token.
The skip term `D * x` and the softplus of `dt` belong to the mixer, not here.

Per head, with `a = exp(dt * A)`:  `state = a * state + dt * x B^T`,  `y = state C`  (Dao & Gu 2024, arXiv 2405.21060,
eq. 16 and listing 1).

Shapes: T tokens, D documents, H heads, P head width, G groups (heads of a group share B and C), N state size,
C chunks, Q chunk size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from turbos.common.records import Documents


def ssd_recurrent(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    documents: Documents,
    initial_DHPN: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan, token by token: the truth that the other forms are tested against.

    Returns `y_THP` and the state after each document, `[D, H, P, N]`.
    """
    heads, width = x_THP.shape[1:]
    repeat = heads // B_TGN.shape[1]
    outputs, finals = [], []
    for document, (start, end) in enumerate(pairwise(documents.borders)):
        state_HPN = x_THP.new_zeros(heads, width, B_TGN.shape[2]) if initial_DHPN is None else initial_DHPN[document]
        for t in range(start, end):
            B_HN = B_TGN[t].repeat_interleave(repeat, 0)
            C_HN = C_TGN[t].repeat_interleave(repeat, 0)
            decay_H = torch.exp(dt_TH[t] * A_H)
            write_HPN = (dt_TH[t][:, None] * x_THP[t])[:, :, None] * B_HN[:, None, :]
            state_HPN = decay_H[:, None, None] * state_HPN + write_HPN
            outputs.append((state_HPN * C_HN[:, None, :]).sum(-1))
        finals.append(state_HPN)
    return torch.stack(outputs), torch.stack(finals)


def ssd_step(
    x_BHP: Tensor, dt_BH: Tensor, A_H: Tensor, B_BGN: Tensor, C_BGN: Tensor, state_BHPN: Tensor
) -> tuple[Tensor, Tensor]:
    """One token for each of B sequences: returns `y_BHP` and the next state; the given state is not changed."""
    batch, heads, width, size = state_BHPN.shape
    groups = B_BGN.shape[1]
    grouped = (batch, groups, heads // groups, width, size)
    write_BHP = dt_BH[..., None] * x_BHP
    write_BGRPN = write_BHP.view(grouped[:-1])[..., None] * B_BGN[:, :, None, None, :]
    decay_BH11 = torch.exp(dt_BH * A_H)[..., None, None]
    next_BHPN = torch.addcmul(write_BGRPN.view(state_BHPN.shape), decay_BH11, state_BHPN)
    y_BGR = torch.matmul(next_BHPN.view(batch, groups, -1, size), C_BGN[..., None])
    return y_BGR.view(x_BHP.shape), next_BHPN


@dataclass(frozen=True)
class Tiles:
    """How documents are cut into chunks of Q rows; a chunk never holds two documents.

    Chunks are ordered in rounds: the first chunk of every document (longest document first), then the second of every
    document that has one, and so on. So the documents of a round are a prefix of the round before, and the states of
    one round follow from the last by slices. Rows beyond a document's end are zero and change nothing.
    """

    slot_T: Tensor  # row of each token in the [C * Q] tile
    rounds: tuple[int, ...]  # chunks in each round, never growing
    order: tuple[int, ...]  # documents, longest first
    last: tuple[int, ...]  # the last chunk of each document
    whole: bool  # the tile is the packed row itself

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return sum(self.rounds)

    @property
    def strides(self) -> list[tuple[int, int]]:
        """Runs `(distance, count)` of chunks whose next chunk lies `distance` further on, in order.

        Rounds of equal size are one run; of a round with leavers only those that stay are counted, the caller skips
        the rest (it moves on by the larger of both numbers).
        """
        runs: list[tuple[int, int]] = []
        for here, after in zip(self.rounds, self.rounds[1:], strict=False):
            if runs and runs[-1][0] == here == after and runs[-1][1] % here == 0 and runs[-1][1] >= here:
                runs[-1] = (here, runs[-1][1] + after)
            else:
                runs.append((here, after))
        return runs


@lru_cache(maxsize=64)
def tiles_of(borders: tuple[int, ...], chunk_size: int, device: torch.device) -> Tiles:
    """The tiles of documents with these borders."""
    lengths = [end - start for start, end in pairwise(borders)]
    counts = [-(-length // chunk_size) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda document: -counts[document])
    rounds = [sum(count > number for count in counts) for number in range(max(counts))]
    starts = [sum(rounds[:number]) for number in range(len(rounds) + 1)]
    slot_T = torch.empty(borders[-1], dtype=torch.int64)
    last = [0] * len(lengths)
    first_of_round = torch.tensor(starts)
    for rank, document in enumerate(order):
        place = torch.arange(lengths[document])
        chunk = first_of_round[place // chunk_size] + rank
        slot_T[borders[document] : borders[document + 1]] = chunk * chunk_size + place % chunk_size
        last[document] = starts[counts[document] - 1] + rank
    whole = len(lengths) == 1 and lengths[0] % chunk_size == 0
    return Tiles(slot_T.to(device), tuple(rounds), tuple(order), tuple(last), whole)


def _tile(flat_TX: Tensor, tiles: Tiles, chunk_size: int) -> Tensor:
    """Packed rows -> `[C, Q, ...]`, zero where a chunk is longer than its document's rest."""
    shape = (tiles.chunks, chunk_size, *flat_TX.shape[1:])
    if tiles.whole:
        return flat_TX.reshape(shape)
    tile = flat_TX.new_zeros(tiles.chunks * chunk_size, *flat_TX.shape[1:])
    return tile.index_copy_(0, tiles.slot_T, flat_TX).view(shape)


def _heads_first(x_CQHP: Tensor, scale_CQH: Tensor | None = None) -> Tensor:
    """`[C, Q, H, P]`, optionally scaled, laid out as `[C, H, Q, P]` in one pass."""
    x_CHQP = x_CQHP.transpose(1, 2)
    if scale_CQH is None:
        return x_CHQP.contiguous()
    return torch.mul(x_CHQP, scale_CQH.transpose(1, 2)[..., None], out=x_CHQP.new_empty(x_CHQP.shape))


def _untile(tile_CQX: Tensor, tiles: Tiles) -> Tensor:
    """`[C, Q, ...]` -> packed rows."""
    flat = tile_CQX.flatten(0, 1)
    return flat if tiles.whole else flat.index_select(0, tiles.slot_T)


def _decay(sums_CHQ: Tensor) -> Tensor:
    """`exp(sum of dt * A over j < k <= i)` for `i >= j`, else 0: `[C, H, Q, Q]`."""
    size = sums_CHQ.shape[-1]
    gap_CHQQ = sums_CHQ[..., :, None] - sums_CHQ[..., None, :]
    above = torch.ones(size, size, dtype=torch.bool, device=sums_CHQ.device).triu_(1)
    return gap_CHQQ.masked_fill_(above, float("-inf")).exp_()


def _group(tile_CQHP: Tensor, groups: int) -> Tensor:
    """`[C, Q, H, P]` -> `[C, G, Q, (H / G) * P]`: a view when there is one group."""
    chunks, size = tile_CQHP.shape[:2]
    return tile_CQHP.reshape(chunks, size, groups, -1).transpose(1, 2)


def _ungroup(tile_CGQR: Tensor, heads: int) -> Tensor:
    """`[C, G, Q, (H / G) * P]` -> `[C, Q, H, P]`."""
    chunks, _, size, _ = tile_CGQR.shape
    return tile_CGQR.transpose(1, 2).reshape(chunks, size, heads, -1)


def _states_before(write_CHPN: Tensor, total_CH: Tensor, tiles: Tiles, initial_DHPN: Tensor | None) -> Tensor:
    """State with which each chunk begins, `[C, H, P, N]`: that of the chunk before, decayed, plus what it wrote."""
    before = torch.empty_like(write_CHPN)
    if initial_DHPN is None:
        before[: tiles.rounds[0]] = 0
    else:
        before[: tiles.rounds[0]] = initial_DHPN[list(tiles.order)]
    start = 0
    for here, after in zip(tiles.rounds, tiles.rounds[1:], strict=False):
        source = slice(start, start + after)
        target = slice(start + here, start + here + after)
        torch.addcmul(write_CHPN[source], total_CH[source, :, None, None], before[source], out=before[target])
        start += here
    return before


def _state_gradients(direct_CHPN: Tensor, total_CH: Tensor, tiles: Tiles, final_DHPN: Tensor) -> Tensor:
    """Gradient of the state with which each chunk *ends*; turns `direct_CHPN` (gradient of its beginning) complete."""
    after_CHPN = torch.empty_like(direct_CHPN)
    after_CHPN[list(tiles.last)] = final_DHPN
    end = tiles.chunks
    for number in range(len(tiles.rounds) - 1, -1, -1):
        here = tiles.rounds[number]
        rows = slice(end - here, end)
        direct_CHPN[rows].addcmul_(total_CH[rows, :, None, None], after_CHPN[rows])
        if number:
            first = end - here - tiles.rounds[number - 1]
            after_CHPN[first : first + here] = direct_CHPN[rows]
        end -= here
    return after_CHPN


class _ChunkedScan(torch.autograd.Function):
    """Forward and backward of the chunked scan; keeps chunk states, recomputes decays and scores."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_THP: Tensor,
        dt_TH: Tensor,
        A_H: Tensor,
        B_TGN: Tensor,
        C_TGN: Tensor,
        initial_DHPN: Tensor | None,
        tiles: Tiles,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        heads, groups = x_THP.shape[1], B_TGN.shape[1]
        dt_CQH = _tile(dt_TH, tiles, chunk_size)
        x_CQHP = _tile(x_THP, tiles, chunk_size)
        B_CGQN = _group(_tile(B_TGN, tiles, chunk_size), groups)
        C_CGQN = _group(_tile(C_TGN, tiles, chunk_size), groups)
        sums_CHQ = (dt_CQH * A_H).transpose(1, 2).cumsum(-1)
        weights_CHQQ = _decay(sums_CHQ)
        _by_group(weights_CHQQ, groups).mul_(torch.matmul(C_CGQN, B_CGQN.transpose(-1, -2))[:, :, None])
        y_CQHP = torch.matmul(weights_CHQQ, _heads_first(x_CQHP, dt_CQH)).transpose(1, 2)

        sums_CQH = sums_CHQ.transpose(1, 2)
        rest_CQH = torch.exp(sums_CQH[:, -1:] - sums_CQH)
        carried_CGQR = _group(x_CQHP * (rest_CQH * dt_CQH)[..., None], groups)
        write_CHPN = torch.matmul(carried_CGQR.transpose(-1, -2), B_CGQN).view(tiles.chunks, heads, -1, B_TGN.shape[2])
        total_CH = torch.exp(sums_CHQ[..., -1])
        before_CHPN = _states_before(write_CHPN, total_CH, tiles, initial_DHPN)
        inter_CGQR = torch.matmul(C_CGQN, before_CHPN.view(tiles.chunks, groups, -1, B_TGN.shape[2]).transpose(-1, -2))
        y_CQHP = torch.addcmul(y_CQHP, _ungroup(inter_CGQR, heads), torch.exp(sums_CQH)[..., None])

        last = list(tiles.last)
        final_DHPN = torch.addcmul(write_CHPN[last], total_CH[last][..., None, None], before_CHPN[last])
        y_THP = _untile(y_CQHP, tiles)
        ctx.save_for_backward(x_THP, dt_TH, A_H, B_TGN, C_TGN, before_CHPN, y_THP, final_DHPN)
        ctx.tiles, ctx.chunk_size, ctx.with_initial = tiles, chunk_size, initial_DHPN is not None  # type: ignore[attr-defined]
        return y_THP, final_DHPN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_THP: Tensor, dfinal_DHPN: Tensor):  # type: ignore[no-untyped-def]
        x_THP, dt_TH, A_H, B_TGN, C_TGN, before_CHPN, y_THP, final_DHPN = ctx.saved_tensors
        tiles, chunk_size = ctx.tiles, ctx.chunk_size
        heads, groups = x_THP.shape[1], B_TGN.shape[1]
        dt_CQH = _tile(dt_TH, tiles, chunk_size)
        x_CQHP = _tile(x_THP, tiles, chunk_size)
        dy_CQHP = _tile(dy_THP.contiguous(), tiles, chunk_size)
        B_CGQN = _group(_tile(B_TGN, tiles, chunk_size), groups)
        C_CGQN = _group(_tile(C_TGN, tiles, chunk_size), groups)
        sums_CHQ = (dt_CQH * A_H).transpose(1, 2).cumsum(-1)
        sums_CQH = sums_CHQ.transpose(1, 2)
        total_CH = torch.exp(sums_CHQ[..., -1])

        # Between chunks: through the state each chunk begins with and the state it leaves.
        flat = (tiles.chunks, groups, -1, B_TGN.shape[2])
        dinter_CGQR = _group(dy_CQHP * torch.exp(sums_CQH)[..., None], groups)
        dC_CGQN = torch.matmul(dinter_CGQR, before_CHPN.view(flat))
        dbefore_CHPN = torch.matmul(dinter_CGQR.transpose(-1, -2), C_CGQN).view_as(before_CHPN)
        dafter_CHPN = _state_gradients(dbefore_CHPN, total_CH, tiles, dfinal_DHPN)
        rest_CQH1 = torch.exp(sums_CQH[:, -1:] - sums_CQH)[..., None]
        dB_CGQN = torch.matmul(_group(x_CQHP * (rest_CQH1 * dt_CQH[..., None]), groups), dafter_CHPN.view(flat))
        dinter_CQHP = _ungroup(torch.matmul(B_CGQN, dafter_CHPN.view(flat).transpose(-1, -2)), heads)

        # Inside a chunk.
        decay_CHQQ = _decay(sums_CHQ)
        dy_CHQP = _heads_first(dy_CQHP)
        X_CHQP = _heads_first(x_CQHP, dt_CQH)
        dscores_CHQQ = torch.matmul(dy_CHQP, X_CHQP.transpose(-1, -2)).mul_(decay_CHQQ)
        dscores_CGQQ = _by_group(dscores_CHQQ, groups).sum(2)
        dC_CGQN += torch.matmul(dscores_CGQQ, B_CGQN)
        dB_CGQN += torch.matmul(dscores_CGQQ.transpose(-1, -2), C_CGQN)
        _by_group(decay_CHQQ, groups).mul_(torch.matmul(C_CGQN, B_CGQN.transpose(-1, -2))[:, :, None])
        dX_CHQP = torch.matmul(decay_CHQQ.transpose(-1, -2), dy_CHQP)
        dX_CQHP = torch.addcmul(dX_CHQP.transpose(1, 2), dinter_CQHP, rest_CQH1)

        # d/d(sums): each token's sum raises what it reads (dy . y) and lowers what is read of it (X . dX); the sum at a
        # chunk's end raises the whole state it leaves.
        dX_THP = _untile(dX_CQHP, tiles)
        read_TH = (dX_THP * x_THP).sum(-1)
        dsums_CQH = _tile((dy_THP * y_THP).sum(-1) - dt_TH * read_TH, tiles, chunk_size).clone()
        dsums_CQH[:, -1] += _state_products(before_CHPN, final_DHPN, dafter_CHPN, tiles)
        da_TH = _untile(dsums_CQH.flip(1).cumsum(1).flip(1), tiles)
        return (
            dX_THP * dt_TH[..., None],
            da_TH * A_H + read_TH,
            (da_TH * dt_TH).sum(0),
            _untile(dB_CGQN.transpose(1, 2), tiles),
            _untile(dC_CGQN.transpose(1, 2), tiles),
            _initial_gradient(dbefore_CHPN, tiles) if ctx.with_initial else None,
            None,
            None,
        )


def _by_group(heads_CHQQ: Tensor, groups: int) -> Tensor:
    """View of `[C, H, Q, Q]` as `[C, G, H / G, Q, Q]`."""
    return heads_CHQQ.unflatten(1, (groups, -1))


def _state_products(before_CHPN: Tensor, final_DHPN: Tensor, dafter_CHPN: Tensor, tiles: Tiles) -> Tensor:
    """`<state a chunk leaves, its gradient>`, `[C, H]`: the next chunk begins with it, or it is a final state."""
    products_CH = before_CHPN.new_empty(before_CHPN.shape[:2])
    start = 0
    for here, following in tiles.strides:
        source = slice(start + here, start + here + following)
        products_CH[start : start + following] = _dot(before_CHPN[source], dafter_CHPN[start : start + following])
        start += max(here, following)
    last = list(tiles.last)
    products_CH[last] = _dot(final_DHPN, dafter_CHPN[last])
    return products_CH


def _dot(a_CHPN: Tensor, b_CHPN: Tensor) -> Tensor:
    """Sum of products over P and N, without the product in memory: `[C, H]`."""
    size = a_CHPN.shape[2] * a_CHPN.shape[3]
    return torch.bmm(a_CHPN.reshape(-1, 1, size), b_CHPN.reshape(-1, size, 1)).view(a_CHPN.shape[:2])


def _initial_gradient(dbefore_CHPN: Tensor, tiles: Tiles) -> Tensor:
    gradient = torch.empty_like(dbefore_CHPN[: tiles.rounds[0]])
    gradient[list(tiles.order)] = dbefore_CHPN[: tiles.rounds[0]]
    return gradient


def ssd_chunked(
    x_THP: Tensor,
    dt_TH: Tensor,
    A_H: Tensor,
    B_TGN: Tensor,
    C_TGN: Tensor,
    documents: Documents,
    initial_DHPN: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The scan as matrix products over chunks of `chunk_size` tokens; same meaning and shapes as `ssd_recurrent`.

    Works in the precision of `dt` (fp32, or float64 in tests) whatever the inputs are; `y` comes back in `x`'s dtype,
    the state in `dt`'s. Chunks never cross documents, so one document cannot touch another's bits.
    """
    tiles = tiles_of(tuple(documents.borders), chunk_size, x_THP.device)
    work = dt_TH.dtype
    y_THP, final_DHPN = _ChunkedScan.apply(
        x_THP.to(work), dt_TH, A_H, B_TGN.to(work), C_TGN.to(work), initial_DHPN, tiles, chunk_size
    )
    return y_THP.to(x_THP.dtype), final_DHPN
