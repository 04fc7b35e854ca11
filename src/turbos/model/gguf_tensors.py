"""A model's parameters under llama.cpp's names and in its layouts: nothing is copied until a tensor is written.

llama.cpp keeps `A = -exp(A_log)` instead of its logarithm, gate and up projections apart, per-head numbers as columns
and the gated norm's weight by group. This module knows no file: `gguf.py` writes one.

Shapes: V vocabulary, D width, E experts, F feed-forward width, C conv channels, K kernel, H heads, G groups, I inner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from turbos.model.lm import LanguageModel, Sublayer
from turbos.model.mixers import Attention, DenseFFN, Experts, Mamba2


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file; an `exact` one is stored in fp32 whatever the file's kind (norms, scan, router)."""

    name: str
    tensor: Tensor
    exact: bool = False


def file_tensors(model: LanguageModel, sublayers_per_block: int) -> Iterator[FileTensor]:
    """Every tensor of the file; a block holds two sublayers in Granite (mixer, feed-forward) and one in Nemotron."""
    yield FileTensor("token_embd.weight", model.embed_weight.detach())
    for index, module in enumerate(model.sublayers):
        sublayer = cast(Sublayer, module)
        block, place = divmod(index, sublayers_per_block)
        norm = "ffn_norm" if place else "attn_norm"
        yield FileTensor(f"blk.{block}.{norm}.weight", sublayer.norm_weight.detach(), exact=True)
        for part in _mixer_tensors(sublayer.mixer):
            yield FileTensor(f"blk.{block}.{part.name}", part.tensor.detach(), part.exact)
    yield FileTensor("output_norm.weight", model.norm_weight.detach(), exact=True)
    if not model.config.tied:
        yield FileTensor("output.weight", model.head_weight.detach())


def _mixer_tensors(mixer: object) -> Iterator[FileTensor]:
    if isinstance(mixer, Mamba2):
        return _mamba(mixer)
    if isinstance(mixer, Attention):
        return _attention(mixer)
    if isinstance(mixer, Experts):
        return _experts(mixer)
    assert isinstance(mixer, DenseFFN)
    return _feed_forward(mixer, "")


def _mamba(mixer: Mamba2) -> Iterator[FileTensor]:
    yield FileTensor("ssm_in.weight", mixer.in_proj.weight)
    yield FileTensor("ssm_conv1d.weight", mixer.conv_weight, exact=True)
    yield FileTensor("ssm_conv1d.bias", mixer.conv_bias, exact=True)
    yield FileTensor("ssm_dt.bias", mixer.dt_bias, exact=True)
    yield FileTensor("ssm_a", -torch.exp(mixer.A_log.float())[:, None], exact=True)
    yield FileTensor("ssm_d", mixer.D[:, None], exact=True)
    yield FileTensor("ssm_norm.weight", mixer.norm_weight.view(mixer.config.mamba_groups, -1), exact=True)
    yield FileTensor("ssm_out.weight", mixer.out_proj.weight)


def _attention(mixer: Attention) -> Iterator[FileTensor]:
    yield FileTensor("attn_q.weight", mixer.q_proj.weight)
    yield FileTensor("attn_k.weight", mixer.k_proj.weight)
    yield FileTensor("attn_v.weight", mixer.v_proj.weight)
    yield FileTensor("attn_output.weight", mixer.o_proj.weight)


def _experts(mixer: Experts) -> Iterator[FileTensor]:
    yield FileTensor("ffn_gate_inp.weight", mixer.router_weight, exact=True)
    if mixer.config.router == "sigmoid":
        yield FileTensor("exp_probs_b.bias", mixer.selection_bias, exact=True)
    yield from _projections(mixer.w_in, mixer.w_out, mixer.config.activation, "_exps")
    assert mixer.shared is not None  # both families have a shared expert
    yield from _feed_forward(mixer.shared, "_shexp")


def _feed_forward(ffn: DenseFFN, suffix: str) -> Iterator[FileTensor]:
    return _projections(ffn.w_in.weight, ffn.w_out.weight, ffn.activation, suffix)


def _projections(w_in: Tensor, w_out: Tensor, activation: str, suffix: str) -> Iterator[FileTensor]:
    """`w_in` `[(E,) (2)F, D]` and `w_out` `[(E,) D, F]`; SwiGLU's first rows are the gate."""
    if activation == "swiglu":
        gate, up = w_in.chunk(2, dim=-2)
        yield FileTensor(f"ffn_gate{suffix}.weight", gate)
    else:
        up = w_in
    yield FileTensor(f"ffn_up{suffix}.weight", up)
    yield FileTensor(f"ffn_down{suffix}.weight", w_out)
