"""The meter tab: what a text of some length costs this model and its attention twin, in memory and in time.

The twin is the same stack with attention in place of every Mamba sublayer, and initial weights: what the numbers are
makes no difference to the work. Bytes are counted. Milliseconds are measured, on sequences of that length whose caches
hold noise, through the step that decodes here; where the twin is too large for the machine they are left open. The two
are measured in turns. Figures of a busy server are too high, for both.

    meter(engine, 8192).twin.ms_per_token / meter(engine, 8192).model.ms_per_token
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from turbos.common.errors import UserError
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.layout import Layout
from turbos.engine.memory import available_memory
from turbos.engine.pool import PoolRow, StatePool
from turbos.engine.precision import Weights
from turbos.engine.runner import Runner
from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.model.lm import LanguageModel

LONGEST_METER = 1 << 18
"""Tokens."""

SHARE = 0.4
"""Part of the memory that is free at present which a measurement may take."""

ROUNDS = 7
ROUND_STEPS = 4
NOISE = 0.5


@dataclass(frozen=True)
class Reading:
    """What a session of the metered length holds, and what one token more takes; None where it was not measured."""

    sublayers: str
    state_bytes: int
    kv_bytes_per_token: int
    bytes: int
    ms_per_token: float | None


@dataclass(frozen=True)
class Meter:
    """Readings at a length; `twin` is None for a model that is attention throughout."""

    tokens: int
    model: Reading
    twin: Reading | None


def twin_config(config: ModelConfig) -> ModelConfig | None:
    """The shape with attention in place of every Mamba sublayer; None where there is none to replace."""
    layers = config.layers.replace("M", "A").replace("S", "A")
    return None if layers == config.layers else replace(config, layers=layers)


def meter(engine: Engine, tokens: int) -> Meter:
    """Count and measure at `tokens`; UserError for a length that no session has. Takes a second or a few."""
    if not 1 <= tokens <= LONGEST_METER:
        raise UserError(f"tokens must lie between 1 and {LONGEST_METER}, not {tokens}")
    config = engine.model.config
    other = twin_config(config)
    own = Stack.of_engine(engine, tokens)
    twin = None if other is None else Stack.of_twin(engine, other, tokens)
    seconds = _measured([stack for stack in (own, twin) if stack is not None])
    own_seconds = None if own is None else seconds[0]
    twin_seconds = None if twin is None else seconds[-1]
    return Meter(
        tokens,
        _reading(engine, config, tokens, own_seconds),
        None if other is None else _reading(engine, other, tokens, twin_seconds),
    )


def _reading(engine: Engine, config: ModelConfig, tokens: int, seconds: float | None) -> Reading:
    layout = Layout.of(config, engine.model.embed_weight.dtype)
    held = layout.state_bytes + tokens * layout.kv_bytes_per_token
    milliseconds = None if seconds is None else 1e3 * seconds
    return Reading(config.layers, layout.state_bytes, layout.kv_bytes_per_token, held, milliseconds)


@dataclass(frozen=True)
class Stack:
    """A model with a pool of its own, in which one sequence of `tokens` noisy tokens lies."""

    runner: Runner
    row: PoolRow
    tokens: int

    @classmethod
    def of_engine(cls, engine: Engine, tokens: int) -> Stack | None:
        """The engine's model, whose own pool is left alone; None where the sequence does not fit beside it."""
        if not _fits(engine, engine.model.config, tokens, weights_bytes=0):
            return None
        return cls._filled(engine.weights, tokens)

    @classmethod
    def of_twin(cls, engine: Engine, config: ModelConfig, tokens: int) -> Stack | None:
        """A twin in the engine's precision; None where weights and sequence do not fit."""
        weight, held = engine.model.embed_weight, engine.weights
        # As the model's own and packed, int8 at least.
        if not _fits(engine, config, tokens, (weight.itemsize + 4) * describe(config).total_params):
            return None
        model = LanguageModel(config).init_weights(0).to(device=weight.device, dtype=weight.dtype)
        precision = "own" if held.precision == "fp64" or weight.device.type != "cpu" else held.precision
        options = EngineConfig(precision=precision, path=engine.config.path, threads=held.threads)
        return cls._filled(Weights.prepare(model, options), tokens)

    @classmethod
    def _filled(cls, weights: Weights, tokens: int) -> Stack:
        model, weight = weights.model, weights.model.embed_weight
        length = tokens + ROUND_STEPS
        pages, scratch = Layout.of(model.config).pages_for(length), bool(weights.static)
        pool = StatePool(model.config, 1, pages, weight.device, weight.dtype, scratch=scratch)
        row = pool.new_row()
        assert row is not None and pool.ensure(row, length), "the pool was made for it"
        for tensor in (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values):
            tensor.normal_(0.0, NOISE)
        row.length = tokens
        return cls(weights.runner(pool), row, tokens)

    @torch.inference_mode()
    def seconds(self) -> float:
        """Seconds a token, over a few; the sequence is as long as before afterwards."""
        start = time.perf_counter()
        for _ in range(ROUND_STEPS):
            self.runner.step([self.row], [0], want_routes=False)
        self.row.length = self.tokens
        return (time.perf_counter() - start) / ROUND_STEPS


def _fits(engine: Engine, config: ModelConfig, tokens: int, weights_bytes: int) -> bool:
    weight = engine.model.embed_weight
    layout = Layout.of(config, weight.dtype)
    pages = layout.pages_for(tokens + ROUND_STEPS)
    needed = weights_bytes + layout.state_bytes + pages * layout.page_bytes
    return needed < SHARE * available_memory(weight.device)


def _measured(stacks: Sequence[Stack]) -> list[float]:
    """Median seconds a token of each, in turns, so that a busy moment hits both."""
    rounds = [[stack.seconds() for stack in stacks] for _ in range(ROUNDS + 1)]
    # The first one fetches buffers and code.
    return [statistics.median(times) for times in zip(*rounds[1:], strict=True)]
