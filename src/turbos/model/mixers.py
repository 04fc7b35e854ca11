"""The kinds of sublayer: Mamba2, Mamba-1, attention, mixture of experts, dense feed-forward.

Each maps normed packed tokens `[T, D]` to the branch that is added to the residual stream. With a state, document b of
the call continues sequence b of the state; where every document is one token, the one-step forms of the ops run.

Shapes: T tokens, B sequences, D width, H heads, K key/value heads, E head width (experts in the MoE), P Mamba head
width, G groups, N state size, C conv channels, I inner channels, R rank of dt.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.model.state import KeyValues, MambaState, SelectiveState
from turbos.ops import attention as attention_ops
from turbos.ops import moe, recycle
from turbos.ops.conv import causal_conv, conv_step
from turbos.ops.linear import linear
from turbos.ops.norm import gated_rms_norm, rms_norm
from turbos.ops.selective_scan import selective_scan_chunked, selective_scan_step
from turbos.ops.ssd import ssd_chunked, ssd_step


@dataclass(frozen=True)
class Pass:
    """One call of the model: where documents lie, what came before them, and what the routers report.

    `recycling` draws where tokens beyond an expert's capacity go; None sets no capacity.
    """

    documents: Documents
    positions_T: Tensor
    step: bool  # a state is given and every document is one token
    earlier: tuple[int, ...]  # tokens of each sequence read before this call
    fixed: bool = False  # nothing may depend on numbers that lie on the device (`RunningState.fixed`)
    routers: list[RouterReport] = field(default_factory=list)
    recycling: torch.Generator | None = None


@dataclass(frozen=True)
class RouterReport:
    """What one router did: load `[E]` (token counts), the experts it chose, its losses, coefficients included.

    `recycled` counts the choices that a capacity sent elsewhere; load and experts are of the choices before that.
    """

    load_E: Tensor
    experts_TK: Tensor
    balance_loss: Tensor
    z_loss: Tensor
    recycled: Tensor


class Projection(nn.Linear):
    """`x @ W^T` without bias, by the faster of the machine's matrix libraries (`ops.linear`)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x_TI: Tensor) -> Tensor:
        """`[T, I] -> [T, O]`."""
        return linear(x_TI, self.weight)


class Convolving(nn.Module):
    """What both Mambas share: a short causal convolution whose last inputs are carried."""

    conv_weight: nn.Parameter
    conv_bias: nn.Parameter

    def _convolve(self, x_TC: Tensor, call: Pass, state: MambaState | SelectiveState | None) -> Tensor:
        if state is None:
            return causal_conv(x_TC, self.conv_weight, self.conv_bias, call.documents)[0]
        if call.step:
            y_TC, rows = conv_step(x_TC, self.conv_weight, self.conv_bias, state.conv_BKC)
        else:
            y_TC, rows = causal_conv(x_TC, self.conv_weight, self.conv_bias, call.documents, state.conv_BKC)
        state.conv_BKC.copy_(rows)
        return y_TC


class Mamba2(Convolving):
    """Gated selective-state-space mixer (Dao & Gu 2024, arXiv 2405.21060, section 7), in Granite's parameter layout.

    `in_proj` rows: gate z, then x, B, C (under the convolution), then dt.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        rows = config.mamba_inner + config.conv_channels + config.mamba_heads
        self.in_proj = Projection(config.hidden_size, rows)
        self.conv_weight = nn.Parameter(torch.empty(config.conv_channels, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(config.conv_channels))
        self.dt_bias = nn.Parameter(torch.empty(config.mamba_heads))
        self.A_log = nn.Parameter(torch.empty(config.mamba_heads))
        self.D = nn.Parameter(torch.empty(config.mamba_heads))
        self.norm_weight = nn.Parameter(torch.empty(config.mamba_inner))
        self.out_proj = Projection(config.mamba_inner, config.hidden_size)

    def forward(self, x_TD: Tensor, call: Pass, state: MambaState | None) -> Tensor:
        """`[T, D] -> [T, D]`; a given state is advanced in place."""
        config = self.config
        z_TI, xBC_TC, dt_TH = self.in_proj(x_TD).split(
            [config.mamba_inner, config.conv_channels, config.mamba_heads], dim=-1
        )
        wide = torch.float64 if dt_TH.dtype == torch.float64 else torch.float32
        dt_TH = F.softplus(dt_TH.to(wide) + self.dt_bias.to(wide))
        xBC_TC = F.silu(self._convolve(xBC_TC, call, state))
        sizes = config.mamba_groups * config.mamba_state
        x_TI, B_TX, C_TX = xBC_TC.split([config.mamba_inner, sizes, sizes], dim=-1)
        x_THP = x_TI.unflatten(-1, (config.mamba_heads, config.mamba_head_dim))
        B_TGN, C_TGN = (x.unflatten(-1, (config.mamba_groups, config.mamba_state)) for x in (B_TX, C_TX))
        y_THP = self._scan(x_THP, dt_TH, B_TGN, C_TGN, call, state)
        y_THP = torch.addcmul(y_THP, x_THP, self.D.to(x_THP.dtype)[:, None])
        y_TI = gated_rms_norm(y_THP.flatten(1), z_TI, self.norm_weight, config.norm_eps, config.mamba_groups)
        return self.out_proj(y_TI)

    def _scan(
        self, x_THP: Tensor, dt_TH: Tensor, B_TGN: Tensor, C_TGN: Tensor, call: Pass, state: MambaState | None
    ) -> Tensor:
        A_H = -torch.exp(self.A_log.to(dt_TH.dtype))
        if state is None:
            return ssd_chunked(x_THP, dt_TH, A_H, B_TGN, C_TGN, call.documents, None, self.config.chunk_size)[0]
        if call.step:
            wide = dt_TH.dtype
            y_THP, rows = ssd_step(x_THP.to(wide), dt_TH, A_H, B_TGN.to(wide), C_TGN.to(wide), state.ssm_BHPN)
        else:
            y_THP, rows = ssd_chunked(
                x_THP, dt_TH, A_H, B_TGN, C_TGN, call.documents, state.ssm_BHPN, self.config.chunk_size
            )
        state.ssm_BHPN.copy_(rows)
        return y_THP.to(x_THP.dtype)


class Mamba1(Convolving):
    """Selective state-space mixer (Gu & Dao 2023, arXiv 2312.00752, section 3), in the reference code's layout.

    `in_proj` rows: x (under the convolution), then gate z. `x_proj` makes, from each token's convolved x, the low-rank
    input of its step sizes, then B and C; `dt_proj` spreads the step sizes over the channels.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        inner, state, rank = config.mamba1_inner, config.mamba1_state, config.dt_rank
        self.config = config
        self.in_proj = Projection(config.hidden_size, 2 * inner)
        self.conv_weight = nn.Parameter(torch.empty(inner, config.conv_kernel))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.x_proj = Projection(inner, rank + 2 * state)
        self.dt_proj = Projection(rank, inner)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Projection(inner, config.hidden_size)

    def forward(self, x_TD: Tensor, call: Pass, state: SelectiveState | None) -> Tensor:
        """`[T, D] -> [T, D]`; a given state is advanced in place."""
        sizes = [self.config.dt_rank, self.config.mamba1_state, self.config.mamba1_state]
        x_TI, z_TI = self.in_proj(x_TD).chunk(2, dim=-1)
        x_TI = F.silu(self._convolve(x_TI, call, state))
        dt_TR, B_TN, C_TN = self.x_proj(x_TI).split(sizes, dim=-1)
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        dt_TI = F.softplus(self.dt_proj(dt_TR).to(wide) + self.dt_bias.to(wide))
        y_TI = self._scan(x_TI, dt_TI, B_TN, C_TN, call, state)
        y_TI = torch.addcmul(y_TI, x_TI, self.D.to(x_TI.dtype))
        return self.out_proj(y_TI * F.silu(z_TI))

    def _scan(
        self, x_TI: Tensor, dt_TI: Tensor, B_TN: Tensor, C_TN: Tensor, call: Pass, state: SelectiveState | None
    ) -> Tensor:
        A_NI = -torch.exp(self.A_log.to(dt_TI.dtype).T)
        size = self.config.chunk_size
        if state is None:
            return selective_scan_chunked(x_TI, dt_TI, A_NI, B_TN, C_TN, call.documents, None, size)[0]
        if call.step:
            wide = dt_TI.dtype
            y_TI, rows = selective_scan_step(x_TI.to(wide), dt_TI, A_NI, B_TN.to(wide), C_TN.to(wide), state.ssm_BNI)
        else:
            y_TI, rows = selective_scan_chunked(x_TI, dt_TI, A_NI, B_TN, C_TN, call.documents, state.ssm_BNI, size)
        state.ssm_BNI.copy_(rows)
        return y_TI.to(x_TI.dtype)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), optionally with QK norm and rotary positions."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.q_proj = Projection(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = Projection(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = Projection(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = Projection(config.num_heads * config.head_dim, config.hidden_size)
        if config.qk_norm:
            self.q_norm_weight = nn.Parameter(torch.empty(config.head_dim))
            self.k_norm_weight = nn.Parameter(torch.empty(config.head_dim))

    def forward(self, x_TD: Tensor, call: Pass, state: KeyValues | None) -> Tensor:
        """`[T, D] -> [T, D]`; keys and values are written into a given state."""
        config = self.config
        q_THE = self.q_proj(x_TD).unflatten(-1, (config.num_heads, config.head_dim))
        k_TKE = self.k_proj(x_TD).unflatten(-1, (config.num_kv_heads, config.head_dim))
        v_TKE = self.v_proj(x_TD).unflatten(-1, (config.num_kv_heads, config.head_dim))
        if config.qk_norm:
            q_THE = rms_norm(q_THE, self.q_norm_weight, config.norm_eps)
            k_TKE = rms_norm(k_TKE, self.k_norm_weight, config.norm_eps)
        if config.rope_theta is not None:
            q_THE = attention_ops.rotate(q_THE, call.positions_T, config.rope_theta, config.rope_alpha)
            k_TKE = attention_ops.rotate(k_TKE, call.positions_T, config.rope_theta, config.rope_alpha)
        return self.o_proj(self._attend(q_THE, k_TKE, v_TKE, call, state).flatten(1))

    def _attend(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, call: Pass, state: KeyValues | None) -> Tensor:
        scale = self.config.attention_scale
        if state is None:
            return attention_ops.attention_packed(q_THE, k_TKE, v_TKE, call.documents, scale)
        state.write(k_TKE, v_TKE, call.documents.index_T, call.positions_T)
        lengths = [old + new for old, new in zip(call.earlier, call.documents.lengths, strict=True)]
        k_BSKE, v_BSKE = state.first(lengths)
        if call.step:
            lengths_B = call.positions_T + 1
            return attention_ops.attention_decode(q_THE, k_BSKE, v_BSKE, lengths_B, max(lengths), scale)
        return attention_ops.attention_cached(q_THE, k_BSKE, v_BSKE, lengths, call.documents, scale)


class DenseFFN(nn.Module):
    """One feed-forward network for every token."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.activation = config.activation
        self.w_in = Projection(config.hidden_size, size * (2 if config.activation == "swiglu" else 1))
        self.w_out = Projection(size, config.hidden_size)

    def forward(self, x_TD: Tensor, call: Pass, state: None) -> Tensor:
        """`[T, D] -> [T, D]`."""
        return self.w_out(moe.activate(self.w_in(x_TD), self.activation))


class Experts(nn.Module):
    """Routed experts, top-k of E, plus a shared expert that every token passes (TurboS report p.5)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        rows = config.expert_size * (2 if config.activation == "swiglu" else 1)
        self.router_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.w_in = nn.Parameter(torch.empty(config.num_experts, rows, config.hidden_size))
        self.w_out = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_size))
        self.shared = DenseFFN(config, config.shared_expert_size) if config.shared_expert_size else None
        self.selection_bias: Tensor
        if config.router == "sigmoid":
            self.register_buffer("selection_bias", torch.zeros(config.num_experts))

    def forward(self, x_TD: Tensor, call: Pass, state: None) -> Tensor:
        """`[T, D] -> [T, D]`; the router's report is appended to the call."""
        wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
        logits_TE = F.linear(x_TD.to(wide), self.router_weight.to(wide))
        routing = self._route(logits_TE)
        count = moe.expert_load_fixed if call.fixed else moe.expert_load
        load_E = count(routing.experts_TK, self.config.num_experts)
        # The router answers for what it chose itself: recycling must not hide that it overloads an expert.
        report = self._report(logits_TE, routing.experts_TK, load_E)
        if self.config.capacity_factor is not None and call.recycling is not None:
            experts_TK = self._recycle(routing.experts_TK, self.config.capacity_factor, call.recycling)
            report = replace(report, recycled=(experts_TK != routing.experts_TK).sum())
            routing = moe.Routing(experts_TK, self._gates(logits_TE, experts_TK))
            load_E = moe.expert_load(experts_TK, self.config.num_experts)
        call.routers.append(report)
        y_TD = self._mix_fixed(x_TD, routing) if call.fixed else self._mix(x_TD, routing, load_E)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD, call, None)

    def _mix(self, x_TD: Tensor, routing: moe.Routing, load_E: Tensor) -> Tensor:
        return moe.mix_experts(x_TD, routing, load_E, self.w_in, self.w_out, self.config.activation)

    def _mix_fixed(self, x_TD: Tensor, routing: moe.Routing) -> Tensor:
        return moe.mix_experts_fixed(x_TD, routing, self.w_in, self.w_out, self.config.activation)

    def _route(self, logits_TE: Tensor) -> moe.Routing:
        config = self.config
        if config.router == "softmax":
            return moe.route_softmax(logits_TE, config.top_k)
        bias_E = torch.zeros_like(self.selection_bias) if config.bias_update == "off" else self.selection_bias
        return moe.route_sigmoid(
            logits_TE, bias_E, config.top_k, normalise=config.router_normalise, scale=config.router_scale
        )

    def _recycle(self, experts_TK: Tensor, factor: float, generator: torch.Generator) -> Tensor:
        tokens, top_k = experts_TK.shape
        capacity = recycle.capacity_of(tokens, top_k, self.config.num_experts, factor)
        return recycle.recycle(experts_TK, self.config.num_experts, capacity, generator)

    def _gates(self, logits_TE: Tensor, experts_TK: Tensor) -> Tensor:
        """The router's weights for given experts."""
        config = self.config
        if config.router == "softmax":
            return moe.softmax_gates(logits_TE, experts_TK)
        return moe.sigmoid_gates(logits_TE, experts_TK, normalise=config.router_normalise, scale=config.router_scale)

    def _report(self, logits_TE: Tensor, experts_TK: Tensor, load_E: Tensor) -> RouterReport:
        zero = logits_TE.new_zeros(())
        if not torch.is_grad_enabled():
            return RouterReport(load_E, experts_TK, zero, zero, zero)
        aux, z = self.config.aux_loss, self.config.z_loss
        balance = aux * moe.balance_loss(logits_TE, load_E) if aux else zero
        return RouterReport(load_E, experts_TK, balance, z * moe.router_z_loss(logits_TE) if z else zero, zero)

    @torch.no_grad()
    def update_selection_bias(self, load_E: Tensor) -> None:
        """Raise the bias of underloaded experts by `bias_rate`, lower that of overloaded ones (arXiv 2408.15664)."""
        load = load_E.to(self.selection_bias.dtype)
        self.selection_bias += self.config.bias_rate * torch.sign(load.mean() - load)


def build_mixer(kind: str, config: ModelConfig) -> nn.Module:
    """The sublayer that a letter of `layers` stands for."""
    if kind == "M":
        return Mamba2(config)
    if kind == "S":
        return Mamba1(config)
    if kind == "A":
        return Attention(config)
    return Experts(config) if kind == "F" else DenseFFN(config, config.ffn_size)
