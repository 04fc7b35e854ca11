"""An assistant's turn read as its tokens come: typed deltas whose sum is what `parse` reads from the whole.

However the tokens are cut into parts, the deltas add up to the same message. A character whose bytes come in several
tokens is held back until it is whole; a call is given when it is closed, so that only calls that can be read are given.
A `</think>` that nothing opened turns all content so far into reasoning: that is a delta of its own.

>>> tokenizer = Tokenizer.train(["what is 2 plus 2? it is 4"] * 3, vocab_size=320)
>>> stream = TurnStream(tokenizer)
>>> stream.feed([tokenizer.special("<think>"), *tokenizer.encode("2 plus 2")])
[ReasoningDelta(text='2 plus 2')]
>>> stream.feed([tokenizer.special("</think>"), *tokenizer.encode("it is 4")]) + stream.finish()
[ContentDelta(text='it is 4')]
>>> stream.message().thinking
'2 plus 2'
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turbos.text.messages import Message, ToolCall
from turbos.text.parse import call_of, chat_tokens
from turbos.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ReasoningDelta:
    """More of the thinking; an empty one says that thinking was opened."""

    text: str


@dataclass(frozen=True)
class ContentDelta:
    """More of the content."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A whole call, number `index` of the turn."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class RecastDelta:
    """All content so far was reasoning: the model closed thinking that it had not opened."""


Delta = ReasoningDelta | ContentDelta | ToolCallDelta | RecastDelta

Place = Literal["start", "thinking", "content", "call"]
"""Parts of a turn; at the start its first token decides."""


class TurnStream:
    """Reads one turn; `prompt` (all tokens before it) says whether its thinking was opened or closed already."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer, self._tokens = tokenizer, chat_tokens(tokenizer)
        self._ids: list[int] = []
        self._deltas: list[Delta] = []
        self._given: list[Delta] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._place: Place = "start"
        self._call: list[int] = []
        # Blanks that may turn out to be all there is between two calls, and whether this part is known to be more.
        self._blank, self._said = "", False
        self._num_calls = 0
        self._recastable = True
        self.ended = False
        assistant = self._tokens.roles["assistant"]
        if assistant in prompt:
            self.feed(prompt[len(prompt) - list(reversed(prompt)).index(assistant) :])

    @property
    def place(self) -> Place:
        """Where in the turn the next token stands."""
        return self._place

    def feed(self, ids: Sequence[int]) -> list[Delta]:
        """What the next tokens add; nothing after an end token (`ended` is true then)."""
        for id in ids:
            if id in self._tokens.stops:
                self.ended = True
            if self.ended:
                break
            self._read(id)
            self._ids.append(id)
        return self._give()

    def finish(self) -> list[Delta]:
        """What was held back; the turn is over."""
        self.ended = True
        self._flush()
        if self._place == "call":
            self._add_text(self._tokenizer.decode(self._call))
            self._place, self._call = "content", []
        return self._give()

    def message(self) -> Message:
        """All that was given so far, as a message that carries its tokens."""
        return fold(self._given, tuple(self._ids))

    def _read(self, id: int) -> None:
        tokens = self._tokens
        if self._place == "start":
            self._place = "thinking" if id == tokens.think else "content"
            if id == tokens.think:
                self._recastable = False
                self._deltas.append(ReasoningDelta(""))
                return
        if self._place == "call":
            self._call.append(id)
            if id == tokens.call_end:
                self._close_call()
        elif self._place == "thinking" and id == tokens.think_end:
            self._leave("content")
        elif self._place == "content" and id == tokens.call:
            self._leave("call")
            self._call, self._recastable = [id], False
        elif id == tokens.think_end and self._recastable:
            self._leave("content")
            self._deltas.append(RecastDelta())
            self._recastable = False
        else:
            self._add_text(self._decoder.decode(self._tokenizer.token_bytes(id)))

    def _leave(self, place: Place) -> None:
        self._flush()
        self._place = place

    def _flush(self) -> None:
        """End a part: bytes that make no character will not, and blanks after a call are nothing."""
        self._add_text(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._blank, self._said = "", False

    def _add_text(self, text: str) -> None:
        if self._num_calls and self._place == "content" and not self._said:
            text, self._blank = self._blank + text, ""
            self._said = bool(text) and not text.isspace()
            if not self._said:
                self._blank = text
                return
        if text:
            kind = ReasoningDelta if self._place == "thinking" else ContentDelta
            self._deltas.append(kind(text))

    def _close_call(self) -> None:
        call = call_of(self._tokenizer, self._call)
        if isinstance(call, ToolCall):
            self._deltas.append(ToolCallDelta(self._num_calls, call))
            self._num_calls += 1
        else:
            self._add_text(self._tokenizer.decode(self._call))
        self._place, self._call = "content", []

    def _give(self) -> list[Delta]:
        given = _joined(self._deltas)
        self._given += given
        self._deltas = []
        return given


def _joined(deltas: Sequence[Delta]) -> list[Delta]:
    """Neighbours of one kind as one delta; the empty reasoning that opens thinking goes with what follows it."""
    found: list[Delta] = []
    for delta in deltas:
        last = found[-1] if found else None
        if isinstance(delta, ReasoningDelta) and isinstance(last, ReasoningDelta):
            found[-1] = ReasoningDelta(last.text + delta.text)
        elif isinstance(delta, ContentDelta) and isinstance(last, ContentDelta):
            found[-1] = ContentDelta(last.text + delta.text)
        else:
            found.append(delta)
    return found


def fold(deltas: Sequence[Delta], ids: tuple[int, ...] | None = None) -> Message:
    """The message that deltas add up to."""
    thinking: str | None = None
    content: list[str] = []
    calls: list[ToolCall] = []
    for delta in deltas:
        if isinstance(delta, ReasoningDelta):
            thinking = (thinking or "") + delta.text
        elif isinstance(delta, ContentDelta):
            content.append(delta.text)
        elif isinstance(delta, ToolCallDelta):
            calls.append(delta.call)
        else:
            thinking, content = "".join(content), []
    return Message("assistant", "".join(content), thinking, ids, tuple(calls))
