"""The thinking budget: where an answer stands in its thinking, and what its next token may be for the budget's sake.

Every token after `<think>` counts, those of the prompt too, until `</think>`. In the last tenth of the budget (at most
64 tokens) the closing tag is pushed more and more, so that a model ends its sentence; then it is forced. Under a budget
a turn thinks at its beginning or not at all: later tags are banned, because readers take all that stands before a
closing tag for thinking. Rendering and reading of turns are `text/`'s business.

>>> span = ThinkingSpan(Tags(open=7, close=8, assistant=4), prompt=[4, 7], budget=2)
>>> span.place, span.rule()
('thinking', Rule(forced=None, banned=(), bias=None))
>>> span.accept(50); span.accept(51); span.rule()
Rule(forced=8, banned=(), bias=None)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turbos.text.tokenizer import Tokenizer

WINDOW_SHARE, LONGEST_WINDOW = 10, 64
"""The soft window is one part in so many of the budget, and at most so many tokens."""

STRONGEST_PUSH = 12.0
"""Nats that the closing tag gains at the end of the window, in equal steps; in the midst of a sentence its
log-probability is about as far below the best."""

CLOSED_WITHIN = 4
"""A foreign template that closes thinking does so in the prompt's last few tokens (the tag and line breaks)."""

Place = Literal["start", "thinking", "answer"]


@dataclass(frozen=True)
class Tags:
    """Ids of the tags of thinking, and of the token that begins an assistant's turn where the tokenizer has it."""

    open: int
    close: int
    assistant: int | None


@dataclass(frozen=True)
class Rule:
    """What the next token may be: one token only, some tokens not, or one token more likely by some nats."""

    forced: int | None = None
    banned: tuple[int, ...] = ()
    bias: tuple[int, float] | None = None


FREE = Rule()


def thinking_tags(tokenizer: Tokenizer) -> Tags | None:
    """The tags of a tokenizer; None where it has no special tokens for thinking."""
    ids = {tokenizer.decode([id]): id for id in tokenizer.special_ids}
    if "<think>" not in ids or "</think>" not in ids:
        return None
    return Tags(ids["<think>"], ids["</think>"], ids.get("<|assistant|>"))


class ThinkingSpan:
    """Follows one answer's tokens; `place` is "start" only before the first token of a turn that decides itself."""

    def __init__(self, tags: Tags, prompt: Sequence[int], budget: int | None) -> None:
        """Read how the prompt leaves it; `budget` None counts and rules nothing."""
        self._tags, self._budget = tags, budget
        self._window = 0 if budget is None else min(budget // WINDOW_SHARE, LONGEST_WINDOW)
        self.used = 0
        self.place: Place = "start"
        for token in _last_turn(tags, prompt):
            self.accept(token)
        if tags.assistant is None and self.place != "thinking":
            self.used = 0
            self.place = "answer" if tags.close in prompt[-CLOSED_WITHIN:] else "start"
        elif tags.assistant is not None and tags.assistant not in prompt and self.place == "start":
            # A text to continue is no turn: nothing decides on thinking there.
            self.place = "answer"

    def accept(self, token: int) -> None:
        """Go on by one token."""
        if self.place == "start":
            self.place = "thinking" if token == self._tags.open else "answer"
        elif self.place == "answer":
            return
        elif token == self._tags.close:
            self.place = "answer"
        else:
            self.used += 1

    @property
    def left(self) -> int | None:
        """Tokens of thinking that are left, never below 0; None without a budget."""
        return None if self._budget is None else max(self._budget - self.used, 0)

    @property
    def may_open(self) -> int | None:
        """The opening tag where the next token may begin the turn's thinking, else None."""
        return self._tags.open if self.place == "start" and self.left != 0 else None

    def rule(self) -> Rule:
        """What the budget asks of the next token."""
        left = self.left
        if left is None:
            return FREE
        if self.place != "thinking":
            return Rule(
                banned=(self._tags.close,) if self.may_open is not None else (self._tags.close, self._tags.open)
            )
        if left == 0:
            return Rule(forced=self._tags.close)
        if left > self._window:
            return FREE
        push = STRONGEST_PUSH * (self._window - left + 1) / self._window
        return Rule(bias=(self._tags.close, push))


def _last_turn(tags: Tags, prompt: Sequence[int]) -> Sequence[int]:
    """Tokens after the last beginning of an assistant's turn; where there is none, from the last opening tag on."""
    backwards = list(reversed(prompt))
    if tags.assistant in backwards:
        return prompt[len(prompt) - backwards.index(tags.assistant) :]
    return prompt[len(prompt) - backwards.index(tags.open) - 1 :] if tags.open in backwards else ()
