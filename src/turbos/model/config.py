"""What a model is: a string of sublayers and the sizes of each kind.

`layers` has one letter per pre-norm residual sublayer: `M` Mamba2, `S` Mamba-1 (selective scan), `A` grouped-query
attention, `F` mixture of experts with a shared expert, `D` dense feed-forward. A part in brackets may be repeated:
`"(MF)*3AF"` is `"MFMFMFAF"`.

>>> ModelConfig(vocab_size=512, hidden_size=64, layers="(MF)*3AF").layers
'MFMFMFAF'
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from turbos.common.errors import UserError

KINDS = {"M": "Mamba2", "S": "Mamba-1", "A": "attention", "F": "mixture of experts", "D": "dense feed-forward"}

TRAINING_FIELDS = ("aux_loss", "z_loss", "bias_update", "bias_rate", "capacity_factor", "init_std")
"""Options that only training reads."""

FIELDS_OF_SUBLAYERS = (
    ("A", ("num_heads", "num_kv_heads", "head_dim", "rope_theta", "rope_alpha", "qk_norm", "attention_multiplier")),
    ("M", ("mamba_heads", "mamba_head_dim", "mamba_state", "mamba_groups")),
    ("S", ("mamba1_inner", "mamba1_state", "mamba1_dt_rank")),
    ("MS", ("conv_kernel", "chunk_size")),
    ("F", ("num_experts", "top_k", "expert_size", "shared_expert_size", "router", "router_normalise", "router_scale")),
    ("D", ("ffn_size",)),
    ("FD", ("activation",)),
)
"""Options that say nothing in a model without such sublayers."""

_REPEAT = re.compile(r"\(([A-Z]+)\)\*(\d{1,6})")
LONGEST_STACK = 10_000
"""Most sublayers of a model: a slip such as `(MF)*99999999` is refused instead of filling the memory."""
LARGEST_SIZE = 2**24
"""Largest size of any kind, for the same reason."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape and options of a model; an impossible combination raises `UserError`.

    Multipliers and `logits_scaling` are Granite's: embedding output and residual branches are multiplied, logits are
    divided. `attention_multiplier` None means `head_dim ** -0.5`. `rope_theta` None means no positions (NoPE).
    `mamba1_dt_rank` None means a sixteenth of `hidden_size`, rounded up.
    Balancing: `aux_loss` and `z_loss` are coefficients; `bias_update` steers the sigmoid router's selection bias by
    `bias_rate` a step (`freeze` keeps it, `off` ignores it); `capacity_factor` limits an expert to that many times its
    even share of a training batch, and tokens beyond it are recycled (`ops.recycle`; None: no limit).
    """

    vocab_size: int
    hidden_size: int
    layers: str
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rope_theta: float | None = None
    rope_alpha: float = 1.0
    qk_norm: bool = False
    mamba_heads: int = 8
    mamba_head_dim: int = 32
    mamba_state: int = 64
    mamba_groups: int = 1
    mamba1_inner: int = 256
    mamba1_state: int = 16
    mamba1_dt_rank: int | None = None
    conv_kernel: int = 4
    chunk_size: int = 64
    ffn_size: int = 256
    num_experts: int = 8
    top_k: int = 2
    expert_size: int = 128
    shared_expert_size: int = 128
    activation: Literal["swiglu", "relu2"] = "swiglu"
    router: Literal["softmax", "sigmoid"] = "softmax"
    router_normalise: bool = True
    router_scale: float = 1.0
    aux_loss: float = 0.01
    z_loss: float = 0.001
    bias_update: Literal["update", "freeze", "off"] = "off"
    bias_rate: float = 0.001
    capacity_factor: float | None = None
    norm_eps: float = 1e-5
    tied: bool = True
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    init_std: float = 0.02
    max_positions: int = 4096

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", expand_layers(self.layers))
        for problem in _impossible(self):
            raise UserError(f"model: {problem}")
        if self.attention_multiplier == self.head_dim**-0.5:
            # One spelling for one model: files may say what None means.
            object.__setattr__(self, "attention_multiplier", None)

    @property
    def mamba_inner(self) -> int:
        """Channels of a Mamba2 sublayer (`d_inner`)."""
        return self.mamba_heads * self.mamba_head_dim

    @property
    def conv_channels(self) -> int:
        """Channels under the convolution: x, B and C."""
        return self.mamba_inner + 2 * self.mamba_groups * self.mamba_state

    @property
    def dt_rank(self) -> int:
        """Rank of the step size's projection in a Mamba-1 sublayer (Mamba's default: hidden_size / 16, rounded up)."""
        return -(-self.hidden_size // 16) if self.mamba1_dt_rank is None else self.mamba1_dt_rank

    @property
    def scans(self) -> bool:
        """Whether some sublayer scans in chunks of `chunk_size`."""
        return bool(set("MS") & set(self.layers))

    @property
    def attention_scale(self) -> float:
        """Factor on query-key products."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier


def expand_layers(layers: str) -> str:
    """`"(MF)*3AF"` -> `"MFMFMFAF"`; what is not brackets stays as it is. UserError for a stack that is too long."""
    text = layers.replace(" ", "")
    while found := _REPEAT.search(text):
        if len(found[1]) * int(found[2]) > LONGEST_STACK:
            raise UserError(f"model: layers: {found[0][:80]} makes more than {LONGEST_STACK} sublayers")
        text = text[: found.start()] + found[1] * int(found[2]) + text[found.end() :]
    if len(text) > LONGEST_STACK:
        raise UserError(f"model: layers names {len(text)} sublayers, at most {LONGEST_STACK} are possible")
    return text


# Smallest value of each size, by the kinds of sublayer that use it ("" = every model).
_LEAST = (
    ("", 1, ("vocab_size", "hidden_size", "max_positions")),
    ("", 0, ("residual_multiplier",)),
    ("A", 1, ("num_heads", "num_kv_heads", "head_dim")),
    ("M", 1, ("mamba_heads", "mamba_head_dim", "mamba_state", "mamba_groups")),
    ("S", 1, ("mamba1_inner", "mamba1_state", "dt_rank")),
    ("MS", 1, ("chunk_size",)),
    ("MS", 2, ("conv_kernel",)),
    ("F", 1, ("num_experts", "top_k", "expert_size")),
    ("F", 0, ("shared_expert_size", "aux_loss", "z_loss", "bias_rate")),
    ("D", 1, ("ffn_size",)),
)
_POSITIVE = (
    *("rope_alpha", "router_scale", "norm_eps", "init_std"),
    *("embedding_multiplier", "logits_scaling"),
)
_WORDS = {
    "activation": ("swiglu", "relu2"),
    "router": ("softmax", "sigmoid"),
    "bias_update": ("update", "freeze", "off"),
}


def _impossible(config: ModelConfig) -> Iterator[str]:
    """What forbids this configuration, one line each, the option named."""
    letters = "".join(KINDS)
    if not config.layers:
        yield f"layers is empty: give one letter of {letters} per sublayer, such as (MF)*3AF"
    for place, letter in enumerate(config.layers):
        if letter not in KINDS:
            known = ", ".join(f"{key} ({name})" for key, name in KINDS.items())
            yield f"layers {config.layers!r}: letter {letter!r} at place {place} is none of {known}"
    yield from _impossible_numbers(config)
    for name, words in _WORDS.items():
        if getattr(config, name) not in words:
            yield f"{name} {getattr(config, name)!r} is none of {', '.join(words)}"
    if "A" in config.layers:
        yield from _impossible_attention(config)
    if "M" in config.layers and config.mamba_heads % config.mamba_groups:
        yield f"mamba_heads {config.mamba_heads} must be a multiple of mamba_groups {config.mamba_groups}"
    if "F" in config.layers:
        yield from _impossible_experts(config)


def _impossible_numbers(config: ModelConfig) -> Iterator[str]:
    for letters, least, names in _LEAST:
        for name in names if not letters or set(letters) & set(config.layers) else ():
            if not getattr(config, name) >= least:
                yield f"{name} must be at least {least}, not {getattr(config, name)}"
            if getattr(config, name) > LARGEST_SIZE:
                yield f"{name} must be at most {LARGEST_SIZE}, not {getattr(config, name)}"
    for name in _POSITIVE:
        if not 0 < getattr(config, name) < math.inf:
            yield f"{name} must be above 0 and finite, not {getattr(config, name)}"
    for name in ("rope_theta", "attention_multiplier"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            yield f"{name} must be above 0 and finite, or null; not {value}"


def _impossible_attention(config: ModelConfig) -> Iterator[str]:
    if config.num_heads % config.num_kv_heads:
        yield f"num_heads {config.num_heads} must be a multiple of num_kv_heads {config.num_kv_heads}"
    if config.rope_theta is not None and (config.head_dim % 2 or config.head_dim < 4):
        yield f"head_dim {config.head_dim} must be even and at least 4 for rotary positions (rope_theta)"
    if config.rope_theta is None and config.rope_alpha != 1.0:
        yield "rope_alpha stretches rotary positions: set rope_theta too, or leave rope_alpha at 1"


def _impossible_experts(config: ModelConfig) -> Iterator[str]:
    if config.capacity_factor is not None and not 1 <= config.capacity_factor < math.inf:
        yield (
            f"capacity_factor must be at least 1 (below, not all tokens find an expert), or null for no limit; "
            f"not {config.capacity_factor}"
        )
    if config.top_k > config.num_experts:
        yield f"top_k {config.top_k} must lie between 1 and num_experts {config.num_experts}"
    if config.router == "softmax":
        if config.bias_update != "off":
            yield f"bias_update {config.bias_update!r} needs router 'sigmoid'; use aux_loss with 'softmax'"
        if not config.router_normalise:
            yield "router_normalise false needs router 'sigmoid': the softmax over the top-k sums to 1 by itself"
        if config.router_scale != 1.0:
            yield "router_scale needs router 'sigmoid'"
