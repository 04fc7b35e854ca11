"""The three shapes of `turbos bench length`, and what each must read and hold at a length.

One size, three ways to mix tokens: the hybrid has one attention sublayer in nine mixers (the report has 7 in 64), its
twin is attention throughout, the third Mamba2 throughout. Hidden size, feed-forward and heads are equal. Twelve
attention mixers with their feed-forwards have as many parameters as nine mixers of the hybrid, because a Mamba2 mixer
is larger than grouped-query attention. Feed-forwards are dense, so that no routing is in the differences; none has
positions, which cost nothing either way.

What a token costs in memory traffic is counted here and not measured: every weight once, all keys and values, scan
states twice (read and written). A step that is bound by memory alone would have exactly these ratios:

>>> for length in (2048, 8192, 32768, 131072):
...     print(length, round(floor_ratio(HYBRID, ATTENTION, length), 2), round(held_ratio(HYBRID, ATTENTION, length), 2))
2048 1.49 4.71
8192 3.13 8.65
32768 6.54 10.94
131072 9.85 11.72

The ratios are of these sizes, which were chosen by this count: the more weights stand beside each token's keys, the
longer the length at which attention begins to matter, for a single session. With hidden size 768, Mamba2 of 16 heads
and feed-forwards of 640 the same count gives 5.3 at 32k and 9.0 at 128k. Many sessions share the weights (`--budget`).
"""

from __future__ import annotations

from dataclasses import dataclass

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.describe import describe

TOLERANCE = 0.03
"""Largest relative difference of active parameters from the hybrid's."""

KV_HEADS, HEAD_DIM = 2, 64
FP32 = 4


@dataclass(frozen=True)
class Shape:
    """One of the three: its key in ratios, what it is called, and its sublayers."""

    name: str
    title: str
    layers: str


HYBRID = Shape("hybrid", "hybrid, 8 Mamba2 + 1 attention", "(MD)*4AD(MD)*4")
ATTENTION = Shape("attention", "attention twin, 12 attention", "(AD)*12")
MAMBA = Shape("mamba", "Mamba-only, 9 Mamba2", "(MD)*9")
SHAPES = (HYBRID, ATTENTION, MAMBA)


@dataclass(frozen=True)
class Size:
    """What all three have in common."""

    vocab_size: int = 8192
    hidden_size: int = 512
    num_heads: int = 8
    mamba_heads: int = 12
    mamba_state: int = 128
    ffn_size: int = 720


def shape_config(shape: Shape, size: Size = Size()) -> ModelConfig:
    """A shape as a model's configuration."""
    return ModelConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        layers=shape.layers,
        num_heads=size.num_heads,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        mamba_heads=size.mamba_heads,
        mamba_head_dim=64,
        mamba_state=size.mamba_state,
        ffn_size=size.ffn_size,
        max_positions=2**18,
    )


def require_equal_sizes(size: Size = Size()) -> None:
    """Refuse shapes whose active parameters differ from the hybrid's by more than `TOLERANCE`."""
    active = {shape.name: describe(shape_config(shape, size)).active_params for shape in SHAPES}
    for name, count in active.items():
        if abs(count / active[HYBRID.name] - 1) > TOLERANCE:
            raise UserError(f"bench length: {name} has {count} active parameters, {active[HYBRID.name]} are wanted")


def held_bytes(shape: Shape, length: int, size: Size = Size()) -> int:
    """Bytes that a session of `length` tokens holds: fp32 keys, values, conv rows and scan states."""
    counted = describe(shape_config(shape, size), FP32)
    return length * counted.kv_bytes_per_token + counted.state_bytes


def traffic_bytes(shape: Shape, length: int, size: Size = Size()) -> int:
    """Bytes moved for a token of a session alone: int8 weights and keys and values once, states twice."""
    counted = describe(shape_config(shape, size), FP32)
    return counted.active_params + length * counted.kv_bytes_per_token + 2 * counted.state_bytes


def floor_ratio(shape: Shape, other: Shape, length: int, size: Size = Size()) -> float:
    """How many times the traffic of `shape` that of `other` is, one session, int8 weights."""
    return traffic_bytes(other, length, size) / traffic_bytes(shape, length, size)


def held_ratio(shape: Shape, other: Shape, length: int, size: Size = Size()) -> float:
    """How many times the bytes held by `shape` those of `other` are."""
    return held_bytes(other, length, size) / held_bytes(shape, length, size)


def describe_shape(shape: Shape, size: Size = Size()) -> str:
    """One line: sublayers, sizes, parameters, bytes."""
    config = shape_config(shape, size)
    counted = describe(config, FP32)
    return (
        f"{shape.title}: {shape.layers}, {counted.active_params / 1e6:.1f} M active, hidden {config.hidden_size}, "
        f"FFN {config.ffn_size}, {config.num_heads} query and {KV_HEADS} key heads of {HEAD_DIM}; "
        f"state {counted.state_bytes / 1e6:.1f} MB, KV {counted.kv_bytes_per_token * 1000 / 1e6:.1f} MB per 1k tokens"
    )
