"""The whole model against a slow one, written here a second time from the papers' equations, in float64.

`slow_logits` reads the weights of a model and nothing else of it: one document, one token, one expert at a time.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from model_cases import VARIANTS, logits_of, random_tokens, tiny_model
from op_cases import relative_error
from turbos.model.config import ModelConfig

Weights = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of one vector."""
    return x / torch.sqrt((x * x).mean() + eps) * weight


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    return x / (1 + torch.exp(-x))


def slow_mamba(rows: list[Tensor], w: Weights, c: ModelConfig) -> list[Tensor]:
    """Mamba2, token by token and head by head."""
    inner, size, groups = c.mamba_heads * c.mamba_head_dim, c.mamba_state, c.mamba_groups
    window = [torch.zeros(inner + 2 * groups * size, dtype=torch.float64)] * c.conv_kernel
    states = [torch.zeros(c.mamba_head_dim, size, dtype=torch.float64) for _ in range(c.mamba_heads)]
    outputs = []
    for row in rows:
        projected = w["in_proj.weight"] @ row
        gate, raw, dt = projected.split([inner, inner + 2 * groups * size, c.mamba_heads])
        window = [*window[1:], raw]
        convolved = silu(sum(w["conv_weight"][:, k] * window[k] for k in range(c.conv_kernel)) + w["conv_bias"])
        x, B, C = convolved.split([inner, groups * size, groups * size])
        dt = torch.log1p(torch.exp(dt + w["dt_bias"]))
        heads = []
        for h in range(c.mamba_heads):
            group = h // (c.mamba_heads // groups)
            x_h = x[h * c.mamba_head_dim : (h + 1) * c.mamba_head_dim]
            B_g, C_g = (v[group * size : (group + 1) * size] for v in (B, C))
            states[h] = torch.exp(-dt[h] * w["A_log"][h].exp()) * states[h] + dt[h] * torch.outer(x_h, B_g)
            heads.append(states[h] @ C_g + w["D"][h] * x_h)
        gated = torch.cat(heads) * silu(gate)
        parts = [norm(part, torch.ones_like(part), c.norm_eps) for part in gated.chunk(groups)]
        outputs.append(w["out_proj.weight"] @ (torch.cat(parts) * w["norm_weight"]))
    return outputs


def slow_mamba1(rows: list[Tensor], w: Weights, c: ModelConfig) -> list[Tensor]:
    """Mamba-1, token by token and channel by channel."""
    inner, size, rank = c.mamba1_inner, c.mamba1_state, c.dt_rank
    window = [torch.zeros(inner, dtype=torch.float64)] * c.conv_kernel
    states = [torch.zeros(size, dtype=torch.float64) for _ in range(inner)]
    outputs = []
    for row in rows:
        raw, gate = (w["in_proj.weight"] @ row).split([inner, inner])
        window = [*window[1:], raw]
        x = silu(sum(w["conv_weight"][:, k] * window[k] for k in range(c.conv_kernel)) + w["conv_bias"])
        low, B, C = (w["x_proj.weight"] @ x).split([rank, size, size])
        dt = torch.log1p(torch.exp(w["dt_proj.weight"] @ low + w["dt_bias"]))
        y = torch.zeros_like(x)
        for i in range(inner):
            states[i] = torch.exp(-dt[i] * w["A_log"][i].exp()) * states[i] + dt[i] * x[i] * B
            y[i] = states[i] @ C + w["D"][i] * x[i]
        outputs.append(w["out_proj.weight"] @ (y * silu(gate)))
    return outputs


def turn(x: Tensor, position: int, c: ModelConfig) -> Tensor:
    """Rotary position of one head's vector, pairs `(i, i + E / 2)`."""
    if c.rope_theta is None:
        return x
    half = c.head_dim // 2
    base = c.rope_theta * c.rope_alpha ** (c.head_dim / (c.head_dim - 2))
    result = x.clone()
    for i in range(half):
        angle = position * base ** (-2 * i / c.head_dim)
        cos, sin = math.cos(angle), math.sin(angle)
        result[i], result[i + half] = x[i] * cos - x[i + half] * sin, x[i + half] * cos + x[i] * sin
    return result


def slow_attention(rows: list[Tensor], w: Weights, c: ModelConfig) -> list[Tensor]:
    """Grouped-query attention, one query of one head at a time."""

    def heads_of(name: str, count: int) -> list[list[Tensor]]:
        projected = [[*(w[f"{name}_proj.weight"] @ row).view(count, c.head_dim)] for row in rows]
        if c.qk_norm and name != "v":
            projected = [[norm(x, w[f"{name}_norm_weight"], c.norm_eps) for x in row] for row in projected]
        if name == "v":
            return projected
        return [[turn(x, t, c) for x in row] for t, row in enumerate(projected)]

    queries, keys, values = heads_of("q", c.num_heads), heads_of("k", c.num_kv_heads), heads_of("v", c.num_kv_heads)
    outputs = []
    for t in range(len(rows)):
        mixed = []
        for h in range(c.num_heads):
            shared = h // (c.num_heads // c.num_kv_heads)
            scores = torch.stack([queries[t][h] @ keys[s][shared] for s in range(t + 1)]) * c.attention_scale
            weights = torch.exp(scores - scores.max())
            mixed.append(sum(weight * values[s][shared] for s, weight in enumerate(weights / weights.sum())))
        outputs.append(w["o_proj.weight"] @ torch.cat(mixed))
    return outputs


def slow_feed(row: Tensor, w_in: Tensor, w_out: Tensor, c: ModelConfig) -> Tensor:
    """SwiGLU or squared-relu network of one token."""
    hidden = w_in @ row
    if c.activation == "relu2":
        return w_out @ hidden.clamp(min=0) ** 2
    gate, up = hidden.chunk(2)
    return w_out @ (silu(gate) * up)


def slow_experts(row: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    """The chosen experts of one token, weighted, and the shared one."""
    logits = w["router_weight"] @ row
    if c.router == "softmax":
        chosen = logits.argsort(descending=True)[: c.top_k]
        gates = torch.exp(logits[chosen]) / torch.exp(logits[chosen]).sum()
    else:
        scores = 1 / (1 + torch.exp(-logits))
        bias = 0 if c.bias_update == "off" else w["selection_bias"]
        chosen = (scores + bias).argsort(descending=True)[: c.top_k]
        gates = scores[chosen] / (scores[chosen].sum() if c.router_normalise else 1) * c.router_scale
    total = sum(g * slow_feed(row, w["w_in"][e], w["w_out"][e], c) for e, g in zip(chosen, gates, strict=True))
    if c.shared_expert_size:
        total = total + slow_feed(row, w["shared.w_in.weight"], w["shared.w_out.weight"], c)
    return total


def slow_logits(weights: Weights, c: ModelConfig, tokens: list[int]) -> Tensor:
    """Logits of one document."""
    rows = [weights["embed_weight"][token] * c.embedding_multiplier for token in tokens]
    for index, kind in enumerate(c.layers):
        start = f"sublayers.{index}."
        w = {name.removeprefix(f"{start}mixer."): x for name, x in weights.items() if name.startswith(f"{start}mixer.")}
        normed = [norm(row, weights[f"{start}norm_weight"], c.norm_eps) for row in rows]
        if kind in "MSA":
            branch = {"M": slow_mamba, "S": slow_mamba1, "A": slow_attention}[kind](normed, w, c)
        elif kind == "F":
            branch = [slow_experts(row, w, c) for row in normed]
        else:
            branch = [slow_feed(row, w["w_in.weight"], w["w_out.weight"], c) for row in normed]
        rows = [row + c.residual_multiplier * add for row, add in zip(rows, branch, strict=True)]
    head = weights["embed_weight"] if c.tied else weights["untied_head_weight"]
    return torch.stack([head @ norm(row, weights["norm_weight"], c.norm_eps) for row in rows]) / c.logits_scaling


@pytest.mark.parametrize("variant", [*VARIANTS, "gates not normalised"])
def test_the_model_is_the_slow_model(variant: str) -> None:
    changes = VARIANTS.get(variant, {"router": "sigmoid", "router_normalise": False})
    model = tiny_model(dtype=torch.float64, **changes)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    lengths = (5, 1, 11)
    tokens = random_tokens(sum(lengths))
    want = torch.cat([slow_logits(weights, model.config, piece.tolist()) for piece in tokens.split(lengths)])
    # Rotary angles are fp32 by design; all else is float64.
    tolerance = 1e-6 if model.config.rope_theta else 1e-11
    assert relative_error(logits_of(model, tokens, lengths), want) <= tolerance
    assert relative_error(logits_of(model.float(), tokens, lengths), want) <= 1e-4
