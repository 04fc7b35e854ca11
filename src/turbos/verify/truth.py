"""The slow truth in float64: each sublayer from its equations, its tensors named as the hooks name them.

Built on the truth forms of the ops (`conv_recurrent`, `ssd_recurrent`, `selective_scan_recurrent`, `attention_truth`),
token by token, and on nothing of `mixers`. Rotary angles are rounded to fp32 as every implementation does, because
their rounding grows with the position.

Shapes: T tokens, D width, E experts, K experts per token, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.ops.attention import attention_truth
from turbos.ops.conv import conv_recurrent
from turbos.ops.selective_scan import selective_scan_recurrent
from turbos.ops.ssd import ssd_recurrent
from turbos.verify.readings import EMBEDDING, FINAL_NORM, GATES, LOGITS, NORM, RESIDUAL, ROUTER, Place, Rows

Weights = Callable[[str], Tensor]
Named = Iterator[tuple[str, Tensor]]


class Truth:
    """A model's weights and equations; weights are widened to float64 as they are used."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64):
        self.config, self._tensors, self.dtype = config, tensors, dtype

    def rounded(self) -> Truth:
        """The same equations in fp32: how far they lie from the truth is what rounding alone does to a text."""
        return Truth(self.config, self._tensors, torch.float32)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._tensors)

    def gradients(self, texts: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Gradients of the summed next-token loss of documents, by name of what has one."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self._tensors.items()}
        logits_TV = Truth(self.config, leaves).whole(texts)[LOGITS]
        losses = [
            -torch.log_softmax(rows[:-1], -1).gather(1, text[1:, None]).sum()
            for rows, text in zip(logits_TV.split([len(text) for text in texts]), texts, strict=True)
        ]
        found = torch.autograd.grad(torch.stack(losses).sum(), list(leaves.values()), allow_unused=True)
        return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}

    def _weight(self, name: str) -> Tensor:
        return self._tensors[name].to(self.dtype)

    def weight_of(self, index: int) -> Weights:
        """Weights of a sublayer's mixer, by their names in it."""
        return lambda name: self._weight(f"sublayers.{index}.mixer.{name}")

    def embedding(self, tokens_T: Tensor) -> Tensor:
        """Rows that the first sublayer reads."""
        return self._weight("embed_weight")[tokens_T] * self.config.embedding_multiplier

    def sublayer(self, index: int, x_TD: Tensor, documents: Documents) -> dict[Place, Tensor]:
        """Every named tensor of a sublayer that reads `x_TD`, the residual stream after it last."""
        start = f"sublayers.{index}."
        normed_TD = rms_norm(x_TD, self._weight(f"{start}norm_weight"), self.config.norm_eps)
        rows = {NORM: normed_TD}
        for name, tensor in MIXERS[self.config.layers[index]](self.config, self.weight_of(index), normed_TD, documents):
            rows[name] = tensor
        rows[RESIDUAL] = x_TD + self.config.residual_multiplier * rows["output"]
        return {Place(index, name): tensor for name, tensor in rows.items()}

    def head(self, x_TD: Tensor) -> dict[Place, Tensor]:
        """Final norm and logits."""
        hidden_TD = rms_norm(x_TD, self._weight("norm_weight"), self.config.norm_eps)
        weight_VD = self._weight("embed_weight" if self.config.tied else "untied_head_weight")
        return {FINAL_NORM: hidden_TD, LOGITS: hidden_TD @ weight_VD.T / self.config.logits_scaling}

    def whole(self, pieces: Sequence[Tensor]) -> Rows:
        """Rows of whole documents, packed."""
        documents = Documents.from_lengths([len(piece) for piece in pieces])
        return self.after_embedding(self.embedding(torch.cat(list(pieces))), documents)

    def after_embedding(self, x_TD: Tensor, documents: Documents) -> Rows:
        """Rows of whole documents, from what the first sublayer reads."""
        rows: Rows = {EMBEDDING: x_TD}
        for index in range(len(self.config.layers)):
            rows |= self.sublayer(index, x_TD, documents)
            x_TD = rows[Place(index, RESIDUAL)]
        return rows | self.head(x_TD)

    def sublayer_by_sublayer(self, pieces: Sequence[Tensor], got: Rows) -> Rows:
        """Rows of sublayers that each read what the other implementation's sublayer before it gave."""
        documents = Documents.from_lengths([len(piece) for piece in pieces])
        rows: Rows = {EMBEDDING: self.embedding(torch.cat(list(pieces)))}
        x_TD = got[EMBEDDING].double()
        for index in range(len(self.config.layers)):
            rows |= self.sublayer(index, x_TD, documents)
            x_TD = got[Place(index, RESIDUAL)].double()
        return rows | self.head(x_TD)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight`."""
    return x_TD / torch.sqrt(x_TD.square().mean(-1, keepdim=True) + eps) * weight_D


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)`."""
    return x / (1 + torch.exp(-x))


def mamba_rows(config: ModelConfig, weight: Weights, x_TD: Tensor, documents: Documents) -> Named:
    """Mamba2 (arXiv 2405.21060, section 7)."""
    sizes = config.mamba_groups * config.mamba_state
    projected_TR = x_TD @ weight("in_proj.weight").T
    yield "in_proj", projected_TR
    gate_TI, raw_TC, dt_TH = projected_TR.split([config.mamba_inner, config.conv_channels, config.mamba_heads], -1)
    conv_TC, _ = conv_recurrent(raw_TC, weight("conv_weight"), weight("conv_bias"), documents)
    yield "conv", conv_TC
    x_TI, B_TX, C_TX = silu(conv_TC).split([config.mamba_inner, sizes, sizes], -1)
    dt_TH = torch.nn.functional.softplus(dt_TH + weight("dt_bias"))
    x_THP = x_TI.unflatten(-1, (config.mamba_heads, -1))
    B_TGN, C_TGN = (rows.unflatten(-1, (config.mamba_groups, -1)) for rows in (B_TX, C_TX))
    yield from (("x", x_THP), ("dt", dt_TH), ("B", B_TGN), ("C", C_TGN))
    y_THP, _ = ssd_recurrent(x_THP, dt_TH, -torch.exp(weight("A_log")), B_TGN, C_TGN, documents)
    yield "scan", y_THP
    skip_THP = y_THP + weight("D")[:, None] * x_THP
    yield "scan + D", skip_THP
    gated_TGI = (skip_THP.flatten(1) * silu(gate_TI)).unflatten(-1, (config.mamba_groups, -1))
    ones = gated_TGI.new_ones(gated_TGI.shape[-1])
    gated_TI = rms_norm(gated_TGI, ones, config.norm_eps).flatten(1) * weight("norm_weight")
    yield "gated norm", gated_TI
    yield "output", gated_TI @ weight("out_proj.weight").T


def mamba1_rows(config: ModelConfig, weight: Weights, x_TD: Tensor, documents: Documents) -> Named:
    """Mamba-1 (arXiv 2312.00752, section 3)."""
    projected_TR = x_TD @ weight("in_proj.weight").T
    yield "in_proj", projected_TR
    raw_TI, gate_TI = projected_TR.split([config.mamba1_inner] * 2, -1)
    conv_TI, _ = conv_recurrent(raw_TI, weight("conv_weight"), weight("conv_bias"), documents)
    yield "conv", conv_TI
    x_TI = silu(conv_TI)
    selected_TR = x_TI @ weight("x_proj.weight").T
    yield "x_proj", selected_TR
    dt_TR, B_TN, C_TN = selected_TR.split([config.dt_rank, config.mamba1_state, config.mamba1_state], -1)
    dt_TI = torch.nn.functional.softplus(dt_TR @ weight("dt_proj.weight").T + weight("dt_bias"))
    yield from (("x", x_TI), ("dt", dt_TI), ("B", B_TN), ("C", C_TN))
    y_TI, _ = selective_scan_recurrent(x_TI, dt_TI, -torch.exp(weight("A_log").T), B_TN, C_TN, documents)
    yield "scan", y_TI
    gated_TI = (y_TI + weight("D") * x_TI) * silu(gate_TI)
    yield "gated", gated_TI
    yield "output", gated_TI @ weight("out_proj.weight").T


def attention_rows(config: ModelConfig, weight: Weights, x_TD: Tensor, documents: Documents) -> Named:
    """Grouped-query attention, optionally with QK norm and rotary positions."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    projected = {}
    for name, count in heads.items():
        projected[name] = (x_TD @ weight(f"{name}_proj.weight").T).unflatten(-1, (count, config.head_dim))
        yield f"{name}_proj", projected[name]
    for name in "qk":
        if config.qk_norm:
            projected[name] = rms_norm(projected[name], weight(f"{name}_norm_weight"), config.norm_eps)
        projected[name] = turned(projected[name], documents.positions_T, config)
    for name, kind in (("queries", "q"), ("keys", "k"), ("values", "v")):
        yield name, projected[kind]
    mixed_THE = attention_truth(projected["q"], projected["k"], projected["v"], documents, config.attention_scale)
    yield "attention", mixed_THE
    yield "output", mixed_THE.flatten(1) @ weight("o_proj.weight").T


def turned(x_THE: Tensor, positions_T: Tensor, config: ModelConfig) -> Tensor:
    """Rotary positions in the halves convention, base `theta * alpha^(E / (E - 2))`."""
    if config.rope_theta is None:
        return x_THE
    width = config.head_dim
    base = config.rope_theta * config.rope_alpha ** (width / (width - 2))
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = (positions_T.float()[:, None] * frequencies).to(x_THE.dtype)[:, None]
    first, second = x_THE.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def feed(x_TD: Tensor, w_in: Tensor, w_out: Tensor, config: ModelConfig) -> Tensor:
    """SwiGLU (gate rows first) or squared-relu network."""
    hidden = x_TD @ w_in.T
    if config.activation == "relu2":
        return hidden.clamp(min=0).square() @ w_out.T
    gate, up = hidden.chunk(2, -1)
    return (silu(gate) * up) @ w_out.T


def dense_rows(config: ModelConfig, weight: Weights, x_TD: Tensor, documents: Documents) -> Named:
    """Dense feed-forward."""
    yield "w_in", x_TD @ weight("w_in.weight").T
    yield "output", feed(x_TD, weight("w_in.weight"), weight("w_out.weight"), config)


def expert_rows(config: ModelConfig, weight: Weights, x_TD: Tensor, documents: Documents) -> Named:
    """Routed experts and the shared one, expert by expert."""
    logits_TE = x_TD @ weight("router_weight").T
    yield ROUTER, logits_TE
    gates_TE = true_gates(config, weight, logits_TE)
    yield GATES, gates_TE
    w_in, w_out = weight("w_in"), weight("w_out")
    routed_TD = torch.zeros_like(x_TD)
    for expert in range(config.num_experts):
        rows = torch.nonzero(gates_TE[:, expert])[:, 0]
        if len(rows):
            output = feed(x_TD[rows], w_in[expert], w_out[expert], config)
            routed_TD[rows] += gates_TE[rows, expert, None] * output
    if not config.shared_expert_size:
        yield "output", routed_TD
        return
    shared_TD = feed(x_TD, weight("shared.w_in.weight"), weight("shared.w_out.weight"), config)
    yield "shared expert", shared_TD
    yield "routed experts", routed_TD
    yield "output", routed_TD + shared_TD


def true_gates(config: ModelConfig, weight: Weights, logits_TE: Tensor) -> Tensor:
    """Weight of every expert for every token, 0 where it was not chosen: `[T, E]`."""
    scores_TE = 1 / (1 + torch.exp(-logits_TE)) if config.router == "sigmoid" else logits_TE
    bias_E = weight("selection_bias") if config.router == "sigmoid" and config.bias_update != "off" else 0.0
    chosen_TK = (scores_TE + bias_E).argsort(1, descending=True)[:, : config.top_k]
    picked_TK = scores_TE.gather(1, chosen_TK)
    if config.router == "softmax":
        picked_TK = torch.exp(picked_TK - picked_TK.amax(1, keepdim=True))
    if config.router == "softmax" or config.router_normalise:
        picked_TK = picked_TK / picked_TK.sum(1, keepdim=True)
    return torch.zeros_like(logits_TE).scatter_(1, chosen_TK, picked_TK * config.router_scale)


MIXERS = {"M": mamba_rows, "S": mamba1_rows, "A": attention_rows, "F": expert_rows, "D": dense_rows}
"""Equations of a mixer, by its letter."""
