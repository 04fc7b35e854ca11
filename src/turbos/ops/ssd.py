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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turbos.common.records import Documents
from turbos.ops.exponential import exponential, exponential_

BLOCK_NUMBERS = 1 << 18
"""Numbers per tensor that a block of chunks works on: 1 MiB in fp32, about a core's second-level cache."""


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
    return exponential_(gap_CHQQ.masked_fill_(above, float("-inf")))


def _group(tile_CQHP: Tensor, groups: int) -> Tensor:
    """`[C, Q, H, P]` -> `[C, G, Q, (H / G) * P]`: a view when there is one group."""
    chunks, size = tile_CQHP.shape[:2]
    return tile_CQHP.reshape(chunks, size, groups, -1).transpose(1, 2)


def _ungroup(tile_CGQR: Tensor, heads: int) -> Tensor:
    """`[C, G, Q, (H / G) * P]` -> `[C, Q, H, P]`."""
    chunks, _, size, _ = tile_CGQR.shape
    return tile_CGQR.transpose(1, 2).reshape(chunks, size, heads, -1)


@dataclass(frozen=True)
class _Chunks:
    """Inputs of some chunks, tiled; a slice of chunks is a view. States `[C, H, P, N]` are grouped `[C, G, R, N]`."""

    x_CQHP: Tensor
    dt_CQH: Tensor
    sums_CQH: Tensor  # running sums of dt * A inside each chunk
    B_CQGN: Tensor
    C_CQGN: Tensor

    @classmethod
    def cut(
        cls, x_THP: Tensor, dt_TH: Tensor, A_H: Tensor, B_TGN: Tensor, C_TGN: Tensor, tiles: Tiles, chunk_size: int
    ) -> _Chunks:
        """Packed inputs as chunks."""
        x_CQHP, dt_CQH, B_CQGN, C_CQGN = (_tile(flat, tiles, chunk_size) for flat in (x_THP, dt_TH, B_TGN, C_TGN))
        return cls(x_CQHP, dt_CQH, (dt_CQH * A_H).cumsum(1), B_CQGN, C_CQGN)

    def __getitem__(self, rows: slice) -> _Chunks:
        return _Chunks(self.x_CQHP[rows], self.dt_CQH[rows], self.sums_CQH[rows], self.B_CQGN[rows], self.C_CQGN[rows])

    def blocks(self) -> Iterator[slice]:
        """Slices of chunks whose working set stays in a core's cache."""
        count, size, heads, width = self.x_CQHP.shape
        step = max(1, BLOCK_NUMBERS // (size * heads * max(size, width)))
        return (slice(start, start + step) for start in range(0, count, step))

    @property
    def heads(self) -> int:
        """Heads of x."""
        return self.x_CQHP.shape[2]

    @property
    def groups(self) -> int:
        """Groups of B and C."""
        return self.B_CQGN.shape[2]

    @property
    def sums_CHQ(self) -> Tensor:
        """The running sums, heads first, contiguous."""
        return self.sums_CQH.transpose(1, 2).contiguous()

    @property
    def rest_CQH(self) -> Tensor:
        """Decay from each token to its chunk's end."""
        return exponential(self.sums_CQH[:, -1:] - self.sums_CQH)

    def scores(self) -> Tensor:
        """`C_i . B_j`, `[C, G, Q, Q]`."""
        return torch.matmul(self.C_CQGN.transpose(1, 2), self.B_CQGN.permute(0, 2, 3, 1))

    def carried(self) -> Tensor:
        """`dt * x`, decayed to the chunk's end, `[C, G, Q, R]`: what a chunk adds to the state, before B."""
        return _group(self.x_CQHP * (self.rest_CQH * self.dt_CQH)[..., None], self.groups)

    def grouped(self, state_CHPN: Tensor) -> Tensor:
        """A state of these chunks as `[C, G, R, N]`."""
        return state_CHPN.view(state_CHPN.shape[0], self.groups, -1, state_CHPN.shape[3])


def _inside(block: _Chunks) -> Tensor:
    """What tokens of a chunk read of one another, `[C, H, Q, P]`."""
    weights_CHQQ = _decay(block.sums_CHQ)
    _by_group(weights_CHQQ, block.groups).mul_(block.scores()[:, :, None])
    return torch.matmul(weights_CHQQ, _heads_first(block.x_CQHP, block.dt_CQH))


def _inside_gradients(block: _Chunks, dy_CQHP: Tensor, dB_CQGN: Tensor, dC_CQGN: Tensor) -> Tensor:
    """Gradient of `dt * x` through `_inside`, `[C, H, Q, P]`; those of B and C are added to the given tensors."""
    groups = block.groups
    decay_CHQQ = _decay(block.sums_CHQ)
    dy_CHQP, X_CHQP = _heads_first(dy_CQHP), _heads_first(block.x_CQHP, block.dt_CQH)
    dscores_CHQQ = torch.matmul(dy_CHQP, X_CHQP.transpose(-1, -2)).mul_(decay_CHQQ)
    dscores_CGQQ = _by_group(dscores_CHQQ, groups).sum(2)
    dC_CQGN += torch.matmul(dscores_CGQQ, block.B_CQGN.transpose(1, 2)).transpose(1, 2)
    dB_CQGN += torch.matmul(dscores_CGQQ.transpose(-1, -2), block.C_CQGN.transpose(1, 2)).transpose(1, 2)
    _by_group(decay_CHQQ, groups).mul_(block.scores()[:, :, None])
    return torch.matmul(decay_CHQQ.transpose(-1, -2), dy_CHQP)


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
    def forward(ctx, x_THP, dt_TH, A_H, B_TGN, C_TGN, initial_DHPN, tiles, chunk_size):  # type: ignore[no-untyped-def]
        chunks = _Chunks.cut(x_THP, dt_TH, A_H, B_TGN, C_TGN, tiles, chunk_size)
        heads, shape = chunks.heads, (tiles.chunks, chunks.heads, x_THP.shape[2], B_TGN.shape[2])
        write_CHPN = x_THP.new_empty(shape)
        for rows in chunks.blocks():
            block = chunks[rows]
            torch.matmul(
                block.carried().transpose(-1, -2), block.B_CQGN.transpose(1, 2), out=block.grouped(write_CHPN[rows])
            )
        total_CH = exponential(chunks.sums_CQH[:, -1])
        before_CHPN = _states_before(write_CHPN, total_CH, tiles, initial_DHPN)
        last = list(tiles.last)
        final_DHPN = torch.addcmul(write_CHPN[last], total_CH[last][..., None, None], before_CHPN[last])
        del write_CHPN

        y_CQHP = torch.empty_like(chunks.x_CQHP, memory_format=torch.contiguous_format)
        for rows in chunks.blocks():
            block = chunks[rows]
            read_CGQR = torch.matmul(block.C_CQGN.transpose(1, 2), block.grouped(before_CHPN[rows]).transpose(-1, -2))
            decay_CQH1 = exponential(block.sums_CQH)[..., None]
            torch.addcmul(_inside(block).transpose(1, 2), _ungroup(read_CGQR, heads), decay_CQH1, out=y_CQHP[rows])
        y_THP = _untile(y_CQHP, tiles)
        ctx.save_for_backward(x_THP, dt_TH, A_H, B_TGN, C_TGN, before_CHPN, y_THP, final_DHPN)
        ctx.tiles, ctx.chunk_size, ctx.with_initial = tiles, chunk_size, initial_DHPN is not None
        return y_THP, final_DHPN

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_THP: Tensor, dfinal_DHPN: Tensor):  # type: ignore[no-untyped-def]
        x_THP, dt_TH, A_H, B_TGN, C_TGN, before_CHPN, y_THP, final_DHPN = ctx.saved_tensors
        tiles, chunk_size = ctx.tiles, ctx.chunk_size
        chunks = _Chunks.cut(x_THP, dt_TH, A_H, B_TGN, C_TGN, tiles, chunk_size)
        dy_CQHP = _tile(dy_THP.contiguous(), tiles, chunk_size)
        heads = chunks.heads
        dB_CQGN, dC_CQGN, dX_CQHP = (torch.empty_like(x) for x in (chunks.B_CQGN, chunks.C_CQGN, chunks.x_CQHP))

        # Between chunks: from what tokens read of the state that their chunk begins with ...
        dbefore_CHPN = torch.empty_like(before_CHPN)
        for rows in chunks.blocks():
            block = chunks[rows]
            dread_CGQR = _group(dy_CQHP[rows] * exponential(block.sums_CQH)[..., None], block.groups)
            C_CGQN = block.C_CQGN.transpose(1, 2)
            dC_CQGN[rows] = torch.matmul(dread_CGQR, block.grouped(before_CHPN[rows])).transpose(1, 2)
            torch.matmul(dread_CGQR.transpose(-1, -2), C_CGQN, out=block.grouped(dbefore_CHPN[rows]))
        dafter_CHPN = _state_gradients(dbefore_CHPN, exponential(chunks.sums_CQH[:, -1]), tiles, dfinal_DHPN)
        # ... to what each token wrote into the state that its chunk leaves; then inside each chunk.
        for rows in chunks.blocks():
            block = chunks[rows]
            dafter_CGRN = block.grouped(dafter_CHPN[rows])
            dB_CQGN[rows] = torch.matmul(block.carried(), dafter_CGRN).transpose(1, 2)
            dwrite_CGQR = torch.matmul(block.B_CQGN.transpose(1, 2), dafter_CGRN.transpose(-1, -2))
            inside_CHQP = _inside_gradients(block, dy_CQHP[rows], dB_CQGN[rows], dC_CQGN[rows])
            rest_CQH1 = block.rest_CQH[..., None]
            torch.addcmul(inside_CHQP.transpose(1, 2), _ungroup(dwrite_CGQR, heads), rest_CQH1, out=dX_CQHP[rows])

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
            _untile(dB_CQGN, tiles),
            _untile(dC_CQGN, tiles),
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
