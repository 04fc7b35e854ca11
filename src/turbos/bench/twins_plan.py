"""The twins: three models of one size that differ in how they mix tokens, and the plan that is the same for all.

Width, depth, vocabulary, optimizer, tokens and their order are equal. What a mixer has fewer parameters than another,
its feed-forward sublayers have more, so that active parameters agree within `TOLERANCE`. Feed-forward sublayers are
dense: with experts, routing noise would be in every difference. One attention sublayer in six mixers is as sparse as
six allow (the report has 7 in 64), and Mamba2 has expand 1, as the report's parameter count wants.

Attention-only has rotary positions, because without any it has nothing but the causal mask to tell order by, and that
is not what anyone trains; the hybrid has none, because its convolutions and scans tell order, and no length is then the
longest that was trained (as in Granite 4.0-H and Nemotron-H). Beyond the training length attention-only is measured
twice: as it is, and with its rotary base stretched by the NTK rule (Hunyuan-Large's, `ops.attention.rotate`).

QK norm (TurboS report p.4) and an embedding multiplier (Granite's) are what makes recall learnable in a million tokens
at all: with plain 0.02 initial weights none of the three learns any.

>>> [round(describe(twin_model(twin)).active_params / 1e6, 3) for twin in TWINS]
[1.108, 1.107, 1.107]
"""

from __future__ import annotations

from dataclasses import dataclass, field

from turbos.bench.recall import Symbols
from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.train.loop import TrainConfig
from turbos.train.optim import OptimConfig

TOLERANCE = 0.02
"""Largest relative difference of active parameters between twins."""

VOCABULARY = 1024
"""Tokens of text; the symbols of recall have the ids above."""

SYMBOLS = Symbols(first=VOCABULARY)


@dataclass(frozen=True)
class Twin:
    """One of the three: its name in files and tables, its sublayers, and what makes its size and positions."""

    name: str
    title: str
    layers: str
    ffn_size: int
    rope_theta: float | None = None


ATTENTION = Twin("attention", "attention-only", "(AD)*6", 288, rope_theta=10_000.0)
MAMBA = Twin("mamba", "Mamba-only", "(MD)*6", 240)
HYBRID = Twin("hybrid", "hybrid", "(MD)*3AD(MD)*2", 248)
TWINS = (ATTENTION, MAMBA, HYBRID)


@dataclass(frozen=True)
class Plan:
    """What is trained and measured, the same for all twins.

    `length` is the longest document in training; `pairs` are the sizes of recall, trained and measured; needles are
    measured at `multiples` of `length`; speed and memory at `cost_lengths`. `recall_answers` and `haystacks` say how
    much is measured of each, `held_out_tokens` of each source of text. `text_megabytes` limits each source.
    """

    steps: int = 1300
    tokens_per_step: int = 1024
    length: int = 256
    pairs: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    needles: int = 4
    multiples: tuple[int, ...] = (1, 2, 4, 8)
    recall_answers: int = 1024
    haystacks: int = 48
    held_out_tokens: int = 12_288
    cost_lengths: tuple[int, ...] = (2048, 8192, 32768)
    text_megabytes: float = 3.0
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=5e-3, warmup_steps=20, decay_fraction=0.3, final_lr_ratio=0.05)
    )

    def __post_init__(self) -> None:
        if self.tokens_per_step % self.length:
            raise UserError(f"twins: tokens_per_step {self.tokens_per_step} is no multiple of length {self.length}")
        if 4 * max(self.pairs) > self.length or 4 * self.needles >= self.length:
            raise UserError(f"twins: {max(self.pairs)} pairs or {self.needles} needles do not fit {self.length} tokens")

    @property
    def tokens(self) -> int:
        """Tokens of a whole run."""
        return self.steps * self.tokens_per_step

    def train_config(self, seed: int) -> TrainConfig:
        """One thread, so that two runs share two cores; saved five times, so that little is lost."""
        return TrainConfig(
            steps=self.steps,
            tokens_per_step=self.tokens_per_step,
            micro_batch_tokens=self.tokens_per_step,
            eval_every=self.steps,
            save_every=max(1, self.steps // 5),
            keep=1,
            seed=seed,
            threads=1,
        )


QUICK = Plan(
    steps=30, recall_answers=64, haystacks=2, held_out_tokens=1024, cost_lengths=(512, 2048), text_megabytes=0.3
)
"""A minute, to see that everything runs: its figures say nothing about the models."""


def twin_model(twin: Twin) -> ModelConfig:
    """A twin's shape."""
    return ModelConfig(
        vocab_size=SYMBOLS.end,
        hidden_size=128,
        layers=twin.layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rope_theta=twin.rope_theta,
        qk_norm=True,
        mamba_heads=4,
        mamba_head_dim=32,
        mamba_state=64,
        ffn_size=twin.ffn_size,
        embedding_multiplier=12.0,
        init_std=0.08,
        max_positions=65_536,
    )


def twin_named(name: str) -> Twin:
    """The twin of a name; UserError for another."""
    for twin in TWINS:
        if twin.name == name:
            return twin
    raise UserError(f"no twin {name!r}: there are {', '.join(twin.name for twin in TWINS)}")


def require_equal_sizes() -> None:
    """Refuse twins whose active parameters differ by more than `TOLERANCE`."""
    sizes = {twin.name: describe(twin_model(twin)).active_params for twin in TWINS}
    if max(sizes.values()) > (1 + TOLERANCE) * min(sizes.values()):
        raise UserError(f"twins: active parameters differ by more than {TOLERANCE:.0%}: {sizes}; mend ffn_size")
