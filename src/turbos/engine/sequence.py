"""One answer on its way through the engine, and the group of answers that share a prompt.

A sequence waits, reads its prompt, writes, and ends. What it has read is the length of its row in the pool; what there
is to read is its prompt and what it has written. A preempted sequence has no row; when it gets one again, it reads its
prompt and then what it had written, token by token as it did before, so that it goes on with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turbos.common.records import Completion, Finish
from turbos.engine.cache import Snapshot
from turbos.engine.pool import PoolRow
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.writer import Top, Writer


@dataclass(frozen=True)
class Delta:
    """What a step added to answer `index` of a request: ids with their log-probabilities, and text that is certain.

    Text lags behind ids while it may begin a stop string or a character is not whole. `tops` has the likeliest tokens
    of each place, where asked for. The last delta has `finish` and the whole answer as `completion`.
    """

    index: int
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str = ""
    finish: Finish | None = None
    reason: str = ""
    tops: tuple[Top, ...] = ()
    completion: Completion | None = None


@dataclass(eq=False)
class Group:
    """Sequences with one prompt: the first one reads it, the others begin with a copy of its state.

    `waiting` counts members that have not begun to write; `snapshot` is there once the prompt was read, as long as some
    wait. `logits_V` follow the prompt; `routes` `[n, L, K]` are its experts, where the members want them. Members read
    alike: with the same marks, and all or none of them from kept states. `looked_up` and `counted` are of the metrics:
    a prompt's look among kept states, and the tokens that came of it, count once.
    """

    waiting: int = 0
    snapshot: Snapshot | None = None
    logits_V: Tensor | None = None
    routes: tuple[Tensor, ...] = ()
    looked_up: bool = False
    counted: bool = False


@dataclass(eq=False)
class Sequence:
    """A running answer; `sink` is called with each delta, from the thread that drives the engine.

    `number` is its place in the line, by age, once it stands there.
    """

    prompt_ids: tuple[int, ...]
    writer: Writer
    params: SamplingParams
    marks: frozenset[int]
    sink: Callable[[Delta], None]
    number: int = -1
    group: Group = field(default_factory=Group)
    row: PoolRow | None = None
    hidden_D: Tensor | None = None  # of the prompt's last token, where its state was there as a whole
    finish: Finish | None = None
    reason: str = ""
    cancelled: bool = False
    cached_tokens: int = 0
    weights_version: int = 0
    routes: list[Tensor] = field(default_factory=list)  # [n, L, K] of what was read, by its group or itself

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def likeness(self) -> tuple[object, ...]:
        """What members of a group have in common."""
        return self.prompt_ids, self.marks, self.params.routes, self.params.cache

    @property
    def total(self) -> int:
        """Tokens of the prompt and of what was written."""
        return self.prompt_length + len(self.writer.ids)

    def ids(self, start: int, stop: int) -> list[int]:
        """Tokens `start .. stop - 1` of prompt and answer."""
        prompt = self.prompt_ids[start:stop]
        written = self.writer.ids[max(0, start - self.prompt_length) : max(0, stop - self.prompt_length)]
        return [*prompt, *written]

    def completion(self) -> Completion:
        """The answer as it stands, for one that has ended."""
        assert self.finish is not None
        return Completion(
            prompt_ids=self.prompt_ids,
            ids=tuple(self.writer.ids),
            logprobs=tuple(self.writer.logprobs),
            finish=self.finish,
            weights_version=self.weights_version,
            text=self.writer.text,
            reason=self.reason,
            top_logprobs=tuple(self.writer.tops),
            routes=torch.cat(self.routes) if self.params.routes and self.routes else None,
            cached_tokens=self.cached_tokens,
        )
