"""A shape of `turbos bench length` ready to run: its model with int8's numbers, and the same numbers packed.

stack = Stack.of(HYBRID, Size())
stack.sessions(1, 8192, room=64).seconds(64)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from turbos.bench.length_plan import Shape, Size, shape_config
from turbos.bench.sessions import Sessions
from turbos.engine.fused.weights import PackedModel, pack
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel


@dataclass(frozen=True)
class Stack:
    """One shape: the model reads prompts, the packed weights are for the fused step."""

    shape: Shape
    config: ModelConfig
    model: LanguageModel
    packed: PackedModel

    @classmethod
    def of(cls, shape: Shape, size: Size) -> Stack:
        """Initial weights from seed 0."""
        config = shape_config(shape, size)
        model = LanguageModel(config).init_weights(seed=0)
        packed = pack(model, "int8")
        packed.round_to_packed(model)
        return cls(shape, config, model, packed)

    def sessions(self, batch: int, length: int, room: int) -> Sessions:
        """Sessions of `length` tokens with `room` for more."""
        sessions = Sessions(self.config, self.packed, batch, length + room, torch.get_num_threads())
        sessions.fill(length)
        return sessions


def say(line: str) -> None:
    """A line for whoever watches."""
    print(f"bench length: {line}", file=sys.stderr)
