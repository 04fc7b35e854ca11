"""An answer read as the engine writes it: typed parts for whoever shows them, and what it comes to at the end.

There is a reader for our own layout of chats, and one for plain text (a foreign layout, a text that is continued).
Stop strings end the content only: what a model thinks, and the arguments of its calls, may spell them. Nothing here
knows HTTP, or runs a model.

>>> from turbos.text.tokenizer import Tokenizer
>>> tokenizer = Tokenizer.train(["what is 2 plus 2? it is 4"] * 3, vocab_size=320)
>>> reader = ChatReader(tokenizer, [tokenizer.special("<|assistant|>"), tokenizer.special("<think>")], stop=("4",))
>>> ids = [*tokenizer.encode("2 plus 2 is 4"), tokenizer.special("</think>"), *tokenizer.encode("it is 4.")]
>>> [part.delta for part in reader.feed([Token(id, 0.0) for id in ids])]
[ReasoningDelta(text='2 plus 2 is 4'), ContentDelta(text='it is ')]
>>> reader.stopped, reader.reasoning_tokens, reader.message().thinking
(True, 7, '2 plus 2 is 4')
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from turbos.engine.stop_text import StopText
from turbos.engine.writer import Top
from turbos.text.messages import Message, ToolCall
from turbos.text.stream import ContentDelta, ReasoningDelta, RecastDelta, ToolCallDelta, TurnStream
from turbos.text.stream import Delta as TurnDelta
from turbos.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of an answer with its log-probability, and the likeliest ones in its place where asked for."""

    id: int
    logprob: float
    top: Top = ()


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """What a token adds to a text; bytes that are no whole characters are spelt, so that tokens can be told apart."""
    content = tokenizer.token_bytes(id)
    try:
        return content.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


@dataclass(frozen=True)
class Read:
    """What some tokens added: a delta, the tokens of content among them, and the tokens of thinking up to here.

    A reasoning delta without text says that thinking goes on.
    """

    delta: TurnDelta
    tokens: tuple[Token, ...] = ()
    reasoning_tokens: int = 0


class ChatReader:
    """Reads a turn in our layout; `opening` is what the prompt holds of it already, from `<|assistant|>` on.

    `most_calls` ends the answer after so many calls. Once `stopped` nothing more is read; `cut` by a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, opening: Sequence[int], stop: Sequence[str] = (), most_calls: int | None = None
    ) -> None:
        self._turn = TurnStream(tokenizer, opening)
        self._stop = StopText(stop)
        self._most_calls = most_calls
        self._content: list[str] = []
        self._shown: list[str] = []
        self._thinking: str | None = None
        self._calls: list[ToolCall] = []
        self.stopped = self.cut = False
        self.reasoning_tokens = 0
        self.num_tokens = 0
        opened = self._turn.message()
        self._thinking = opened.thinking

    def feed(self, tokens: Sequence[Token]) -> list[Read]:
        """What the next tokens add; nothing once `stopped`."""
        found: list[Read] = []
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            before = self._turn.place
            deltas = self._turn.feed([token.id])
            after = self._turn.place
            recast = any(isinstance(delta, RecastDelta) for delta in deltas)
            is_content = after == "content" and before in ("start", "content") and not recast and not self._turn.ended
            if recast:
                # All that there is so far but the tag itself.
                self.reasoning_tokens = self.num_tokens - 1
            elif before == after == "thinking":
                self.reasoning_tokens += 1
                deltas = deltas or [ReasoningDelta("")]
            found += self._taken(deltas, token if is_content else None)
        return _joined(found)

    def finish(self) -> list[Read]:
        """What was held back: the answer is over."""
        if self.stopped:
            return []
        found = self._taken(self._turn.finish(), None)
        rest = "" if self.stopped else self._stop.finish()
        if rest:
            self._add(ContentDelta(rest))
            found.append(self._as_read(ContentDelta(rest)))
        return _joined(found)

    def message(self) -> Message:
        """The turn as it was shown, with all its tokens."""
        ids = self._turn.message().ids
        return Message("assistant", "".join(self._content), self._thinking, ids, tuple(self._calls))

    @property
    def shown(self) -> str:
        """All that was given as content, thinking that was recast included: what a client of a stream may have seen."""
        return "".join(self._shown)

    def _taken(self, deltas: Sequence[TurnDelta], token: Token | None) -> list[Read]:
        """Deltas after the stop strings have been looked for."""
        found = []
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                delta = ContentDelta(self._stop.feed(delta.text.encode()))
                self.stopped = self.cut = self._stop.stopped
            self._add(delta)
            if not isinstance(delta, ContentDelta) or delta.text:
                found.append(self._as_read(delta))
            if self.stopped:
                break
        if token is not None:
            # The token that completes a stop string is not shown, nor is its part of the text.
            if found and not self.stopped:
                found[-1] = replace(found[-1], tokens=(token,))
            elif not self.stopped:
                found.append(replace(self._as_read(ContentDelta("")), tokens=(token,)))
        return found

    def _add(self, delta: TurnDelta) -> None:
        if isinstance(delta, ReasoningDelta):
            self._thinking = (self._thinking or "") + delta.text
        elif isinstance(delta, ContentDelta):
            self._content.append(delta.text)
            self._shown.append(delta.text)
        elif isinstance(delta, ToolCallDelta):
            self._calls.append(delta.call)
            self.stopped = len(self._calls) == self._most_calls
        else:
            self._thinking, self._content = "".join(self._content), []

    def _as_read(self, delta: TurnDelta) -> Read:
        return Read(delta, (), self.reasoning_tokens)


class TextReader:
    """Reads tokens as one text; `end_ids` are no part of it."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Collection[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._end_ids = tokenizer, frozenset(end_ids)
        self._stop = StopText(stop)
        self._texts: list[str] = []
        self._ids: list[int] = []
        self.stopped = self.cut = False
        self.reasoning_tokens = 0
        self.num_tokens = 0

    def feed(self, tokens: Sequence[Token]) -> list[Read]:
        """What the next tokens add; nothing once `stopped`."""
        found: list[Read] = []
        for token in tokens:
            if self.stopped:
                break
            self.num_tokens += 1
            if token.id in self._end_ids:
                continue
            self._ids.append(token.id)
            text = self._stop.feed(self._tokenizer.token_bytes(token.id))
            self.stopped = self.cut = self._stop.stopped
            self._texts.append(text)
            if text or not self.stopped:
                found.append(Read(ContentDelta(text), () if self.stopped else (token,)))
        return _joined(found)

    def finish(self) -> list[Read]:
        """What was held back: the answer is over."""
        rest = self._stop.finish()
        self._texts.append(rest)
        return [Read(ContentDelta(rest))] if rest else []

    def message(self) -> Message:
        """The turn as it was shown, with all its tokens."""
        return Message("assistant", self.shown, None, tuple(self._ids))

    @property
    def shown(self) -> str:
        """All that was given."""
        return "".join(self._texts)


Reader = ChatReader | TextReader


def _joined(found: Sequence[Read]) -> list[Read]:
    """Neighbours of one kind as one."""
    joined: list[Read] = []
    for read in found:
        last = joined[-1] if joined else None
        if last is not None and isinstance(read.delta, ReasoningDelta) and isinstance(last.delta, ReasoningDelta):
            joined[-1] = Read(ReasoningDelta(last.delta.text + read.delta.text), (), read.reasoning_tokens)
        elif last is not None and isinstance(read.delta, ContentDelta) and isinstance(last.delta, ContentDelta):
            text = last.delta.text + read.delta.text
            joined[-1] = Read(ContentDelta(text), last.tokens + read.tokens, read.reasoning_tokens)
        else:
            joined.append(read)
    return joined
