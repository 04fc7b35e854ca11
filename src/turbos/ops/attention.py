"""Grouped-query attention over packed documents, over a cache of earlier keys, and for one-token decode.

`attention_truth` is the slow form: one token at a time, meant for float64. The others call torch's fused kernel once
per document, so that no document can touch another's bits and nothing is padded.

Shapes: T tokens, B sequences, S cache slots, H query heads, K key/value heads (H a multiple of K), E head width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from turbos.common.records import Documents

QUERY_ROWS = 256
"""Queries per call where earlier keys need an explicit mask: bounds the mask to `QUERY_ROWS x keys`."""


def attention_truth(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    documents: Documents,
    scale: float,
    earlier: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Causal attention, token by token. `earlier` gives keys and values `[S, K, E]` before each document."""
    repeat = q_THE.shape[1] // k_TKE.shape[1]
    outputs = []
    for document, (start, end) in enumerate(pairwise(documents.borders)):
        for t in range(start, end):
            keys, values = k_TKE[start : t + 1], v_TKE[start : t + 1]
            if earlier is not None:
                keys = torch.cat([earlier[document][0], keys])
                values = torch.cat([earlier[document][1], values])
            scores_SH = (keys.repeat_interleave(repeat, 1) * q_THE[t]).sum(-1) * scale
            weights_SH = torch.softmax(scores_SH, 0)
            outputs.append((weights_SH[..., None] * values.repeat_interleave(repeat, 1)).sum(0))
    return torch.stack(outputs)


def _heads_first(x_TKE: Tensor, heads: int) -> Tensor:
    """`[T, K, E]` -> `[1, H, T, E]`, repeating each key head for its queries."""
    repeat = heads // x_TKE.shape[1]
    if repeat > 1:
        x_TKE = x_TKE[:, :, None].expand(-1, -1, repeat, -1).flatten(1, 2)
    return x_TKE.transpose(0, 1)[None]


def attention_packed(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, documents: Documents, scale: float) -> Tensor:
    """Causal attention inside each packed document: `[T, H, E]`."""
    heads = q_THE.shape[1]
    q, k, v = (_heads_first(x, heads) for x in (q_THE, k_TKE, v_TKE))
    outputs = [
        F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, start:end], v[:, :, start:end], is_causal=True, scale=scale
        )
        for start, end in pairwise(documents.borders)
    ]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


def attention_cached(
    q_THE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, lengths: list[int], documents: Documents, scale: float
) -> Tensor:
    """Attention of document b's queries over row b of a cache that already holds their keys: `[T, H, E]`.

    `lengths[b]` counts the valid slots of row b, the document's own tokens last.
    """
    outputs: list[Tensor] = []
    for row, (start, end) in enumerate(pairwise(documents.borders)):
        keys, values = k_BSKE[row, : lengths[row]], v_BSKE[row, : lengths[row]]
        outputs.append(_attend_last(q_THE[start:end], keys, values, scale))
    return torch.cat(outputs)


def _attend_last(q_LHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, scale: float) -> Tensor:
    """Causal attention of the last L of S positions: `[L, H, E]`."""
    heads, earlier = q_LHE.shape[1], k_SKE.shape[0] - q_LHE.shape[0]
    if earlier and q_LHE.device.type == "cpu":
        return _attend_in_two_parts(q_LHE, k_SKE, v_SKE, earlier, scale)
    q, k, v = q_LHE.transpose(0, 1)[None], _heads_first(k_SKE, heads), _heads_first(v_SKE, heads)
    if earlier:
        return _attend_masked(q, k, v, earlier, scale)[0].transpose(0, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)[0].transpose(0, 1)


def _attend_in_two_parts(q_LHE: Tensor, k_SKE: Tensor, v_SKE: Tensor, earlier: int, scale: float) -> Tensor:
    """Earlier keys without a mask and own keys causally, joined by their log-partitions: no masked product is computed.

    The queries of a key head become rows of one head, so that the earlier keys are read where they lie, not copied. The
    kernel is the one that torch's attention calls on the CPU; only this way gives its log-partition as well.
    """
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rows, heads, width = q_LHE.shape
    kv_heads = k_SKE.shape[1]
    q = q_LHE.transpose(0, 1).contiguous()[None]
    folded = q.view(1, kv_heads, -1, width)
    k_before, v_before = (x_SKE[:earlier].transpose(0, 1)[None] for x_SKE in (k_SKE, v_SKE))
    before, log_before = kernel(folded, k_before, v_before, 0.0, False, scale=scale)
    k_own, v_own = (_heads_first(x_SKE[earlier:], heads) for x_SKE in (k_SKE, v_SKE))
    own, log_own = kernel(q, k_own, v_own, 0.0, True, scale=scale)
    share = torch.sigmoid(log_before.reshape(1, heads, rows) - log_own)[..., None].to(own.dtype)
    return torch.lerp(own, before.reshape(own.shape), share)[0].transpose(0, 1)


def _attend_masked(q: Tensor, k: Tensor, v: Tensor, earlier: int, scale: float) -> Tensor:
    """The same with an explicit mask, in blocks of queries that see only the keys they may."""
    blocks = []
    for start in range(0, q.shape[2], QUERY_ROWS):
        rows = q[:, :, start : start + QUERY_ROWS]
        seen = earlier + start + rows.shape[2]
        last = torch.arange(seen - rows.shape[2], seen, device=q.device)
        mask = torch.arange(seen, device=q.device) <= last[:, None]
        blocks.append(F.scaled_dot_product_attention(rows, k[:, :, :seen], v[:, :, :seen], attn_mask=mask, scale=scale))
    return torch.cat(blocks, dim=2)


def attention_decode(
    q_BHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, lengths_B: Tensor, longest: int, scale: float
) -> Tensor:
    """One query per sequence over its cache row (own key already written): `[B, H, E]`.

    `lengths_B` counts valid slots; `longest` is its maximum or more, and no slot beyond it is read. Keys beyond a
    length may be anything, values there must be finite. The softmax is fp32 or wider.
    """
    batch, heads, width = q_BHE.shape
    kv_heads = k_BSKE.shape[2]
    keys = k_BSKE[:, :longest].permute(0, 2, 3, 1)
    values = v_BSKE[:, :longest].transpose(1, 2)
    q = q_BHE.view(batch, kv_heads, heads // kv_heads, width) * scale
    scores_BKRS = torch.matmul(q, keys)
    scores_BKRS = scores_BKRS if scores_BKRS.dtype == torch.float64 else scores_BKRS.float()
    hidden_BS = torch.arange(longest, device=q.device) >= lengths_B[:, None]
    scores_BKRS.masked_fill_(hidden_BS[:, None, None], -math.inf)
    return torch.matmul(torch.softmax(scores_BKRS, -1).to(values.dtype), values).view(batch, heads, width)


def rotate(x_THE: Tensor, positions_T: Tensor, theta: float, alpha: float = 1.0) -> Tensor:
    """Rotary positions, halves convention; `alpha` stretches the base by the NTK rule `theta * alpha^(E / (E - 2))`.

    Source: Hunyuan-Large (arXiv 2411.02265) and its released config; TurboS report p.6 (alpha 50 and 1000).
    """
    width = x_THE.shape[-1]
    base = theta * alpha ** (width / (width - 2))
    wide = torch.float64 if x_THE.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, width, 2, dtype=wide, device=x_THE.device) / width
    angles = positions_T.to(wide)[:, None] * (base**-exponents)[None]
    cos, sin = angles.cos()[:, None].to(x_THE.dtype), angles.sin()[:, None].to(x_THE.dtype)
    first, second = x_THE.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
