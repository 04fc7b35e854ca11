"""One answer while it is written: its tokens, its text, its place in thinking and grammar, and why it ended.

It holds all that sampling needs to know of an answer and nothing of where its state lies, so it survives preemption. It
does not sample: `sampler.py` makes writers, asks them for their rules and gives choices that go into `accept`.

>>> writer = Writer(SamplingParams(max_new_tokens=2), prompt_ids=(1, 2), stop_ids=frozenset({0}), tokenizer=None)
>>> writer.accept(5, -0.5), writer.accept(0, -0.1).finish, writer.ids
(Written(text='', finish=None), 'stop', [5, 0])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from turbos.common.records import Finish
from turbos.engine.grammar import Constraint
from turbos.engine.penalties import TokenCounts
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.stop_text import StopText
from turbos.engine.thinking import FREE, Rule, ThinkingSpan
from turbos.text.tokenizer import Tokenizer

Top = tuple[tuple[int, float], ...]
"""The likeliest tokens of a place with their log-probabilities, best first."""


@dataclass(frozen=True)
class Written:
    """What a token added: text that is certain (it may lag behind), and why the answer ended if it did."""

    text: str
    finish: Finish | None


class Writer:
    """Answer number `place` of a request. `text` is None without a tokenizer; a stop id is in `ids`, not in `text`."""

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        stop_ids: frozenset[int],
        tokenizer: Tokenizer | None,
        place: int = 0,
        thinking: ThinkingSpan | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Begin an answer. `Sampler.writer` is the way to one whose ids and grammar have been checked."""
        self.params, self.prompt_ids, self.place, self.stop_ids = params, tuple(prompt_ids), place, stop_ids
        self.seed = params.seed + place
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.tops: list[Top] = []
        self.text: str | None = None if tokenizer is None else ""
        self.finish: Finish | None = None
        self.reason = ""
        self.counts = TokenCounts(self.prompt_ids) if params.penalises else None
        self._tokenizer = tokenizer
        self._text = StopText(params.stop)
        self._thinking, self._constraint = thinking, constraint

    @property
    def position(self) -> int:
        """Number of tokens before the next one: with the seed, the key of its noise."""
        return len(self.prompt_ids) + len(self.ids)

    @property
    def constraint(self) -> Constraint | None:
        """The grammar that the next token must follow; None while thinking."""
        return None if self._thinking is not None and self._thinking.place == "thinking" else self._constraint

    @property
    def may_open(self) -> int | None:
        """The tag that may begin thinking in place of what the grammar wants, if it may."""
        return None if self._thinking is None else self._thinking.may_open

    def rule(self) -> Rule:
        """What the thinking budget asks of the next token; what a grammar wants is still to come after the thinking."""
        if self._thinking is None:
            return FREE
        rule = self._thinking.rule()
        is_owed = self._constraint is not None and self._thinking.place == "thinking" and rule.forced is None
        return replace(rule, banned=(*rule.banned, *self.stop_ids)) if is_owed else rule

    def accept(self, token: int, logprob: float, top: Top = ()) -> Written:
        """Go on by one token. An answer that has ended takes no more: ValueError."""
        if self.finish is not None:
            raise ValueError(f"answer {self.place} has ended ({self.finish}): it takes no token {token}")
        self.ids.append(token)
        self.logprobs.append(logprob)
        if self.params.logprobs is not None:
            self.tops.append(top)
        if self.counts is not None:
            self.counts.add(token)
        constraint = self.constraint
        if self._thinking is not None:
            self._thinking.accept(token)
        if token in self.stop_ids:
            return self._end("stop")
        delta = self._decode(token)
        # The tag that opens thinking is not the grammar's.
        if constraint is not None and self.constraint is not None and not constraint.accept(token):
            return self._end("error", f"the grammar has no token {token} here", delta)
        if self._text.stopped or (self.constraint is not None and self.constraint.complete):
            return self._end("stop", delta=delta)
        return self._end("length", delta=delta) if len(self.ids) == self.params.max_new_tokens else Written(delta, None)

    def fail(self, reason: str) -> Written:
        """End where no token can be chosen; what was held back of the text is given."""
        return self._end("error", reason)

    def _decode(self, token: int) -> str:
        if self._tokenizer is None or self.text is None:
            return ""
        delta = self._text.feed(self._tokenizer.token_bytes(token))
        self.text += delta
        return delta

    def _end(self, finish: Finish, reason: str = "", delta: str = "") -> Written:
        self.finish, self.reason = finish, reason
        rest = self._text.finish()
        if self.text is not None:
            self.text += rest
        return Written(delta + rest, finish)
