"""A conversation with a model on the engine: what was said, and the next answer to it. No terminal here.

Turns that the model wrote carry their ids and are rendered from them, so the conversation's tokens only grow, and the
engine finds the state after the last answer again: of a long conversation only what was said since is read.

    session = ChatSession(engine, params, read_think("auto"))
    answer = session.ask("What is the greatest common divisor of 12 and 18?", show, stopped=lambda: False)
    answer.message.content, answer.speed
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from turbos.cli.chat_file import load_messages, save_messages, state_path
from turbos.cli.engine_options import ThinkOption
from turbos.cli.speed import Speed, Stopwatch
from turbos.common.errors import UserError
from turbos.text.chat import prompt_ids, render
from turbos.text.foreign import foreign_prompt_ids
from turbos.text.messages import Message, check_conversation
from turbos.text.parse import chat_tokens
from turbos.text.stream import ContentDelta, ReasoningDelta, TurnStream
from turbos.text.stream import Delta as TurnDelta
from turbos.text.thinking import Thinking, requested_thinking
from turbos.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from turbos.common.records import Finish
    from turbos.engine.engine import Engine
    from turbos.engine.sampling_params import SamplingParams
    from turbos.engine.sequence import Delta

RETRY_TEMPERATURE = 0.7
"""Of another answer to the same question, where answers are greedy: without noise it would be the same again."""

Show = Callable[[TurnDelta, int], None]
"""Takes each part of an answer, and the number of tokens of thinking so far."""


@dataclass(frozen=True)
class Answer:
    """An answer that is over: the message, None where nothing was written, and how it went."""

    message: Message | None
    finish: Finish
    reason: str
    thinking_tokens: int
    speed: Speed


class ChatSession:
    """Messages so far and the settings of the next answer; a question that is refused leaves them as they were."""

    def __init__(self, engine: Engine, params: SamplingParams, think: ThinkOption, system: str = "") -> None:
        """Begin to talk; UserError for a checkpoint that has no layout for chats, or no thinking that is asked for."""
        assert engine.tokenizer is not None, "a checkpoint has a tokenizer"
        self.engine, self.params, self.tokenizer = engine, params, engine.tokenizer
        self.messages: tuple[Message, ...] = (Message("system", system),) if system else ()
        self._retries = 0
        self.set_think(think)
        self.prompt([*self.messages, Message("user", "?")])

    def set_think(self, option: ThinkOption) -> None:
        """Who decides on thinking from the next answer on; UserError where this checkpoint's chats have none."""
        if not self.tokenizer.speaks_chat and option.mode.mode != "auto":
            raise UserError(f"think {option}: this checkpoint's chats have no thinking to open or close")
        self.think = option

    def prompt(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """Tokens up to where the answer begins, and places in them whose state is worth keeping."""
        if not self.tokenizer.speaks_chat:
            check_conversation(messages)
            return foreign_prompt_ids(self.tokenizer, messages), []
        # Another mode of thinking, or another answer, goes on from the end of the last message.
        mark = len(render(self.tokenizer, messages).ids)
        return prompt_ids(self.tokenizer, messages, self._mode(messages)), [mark]

    def _mode(self, messages: Sequence[Message]) -> Thinking:
        """The session's mode; where that is auto, what a message itself asks for (`/think`, `/no_think` at its end)."""
        said = [message.content for message in messages if message.role in ("system", "user")]
        mode = self.think.mode
        return requested_thinking(*said, thinking=None if mode.mode == "auto" else str(mode))

    @property
    def num_tokens(self) -> int:
        """Tokens of all messages."""
        return len(self._ids())

    def save(self, path: Path) -> str:
        """Write the messages, and beside them the engine's state; returns what was written. UserError if it fails."""
        save_messages(path, self.messages, self.tokenizer)
        state_path(path).unlink(missing_ok=True)
        wrote = f"saved {len(self.messages)} messages to {path}"
        try:
            length = self.engine.save_session(state_path(path), self._ids())
        except UserError as error:
            return f"{wrote}, without the model's state: {error}"
        return f"{wrote}, the state after {length} tokens to {state_path(path)}"

    def load(self, path: Path) -> str:
        """Go on with a conversation from a file; a state that is damaged or another model's is refused, not the words.

        Returns what was read. UserError, and nothing changed, where the messages are no conversation.
        """
        self.messages = load_messages(path, self.tokenizer)
        read = f"loaded {len(self.messages)} messages from {path}"
        try:
            length = len(self.engine.load_session(state_path(path)))
        except UserError as error:
            return f"{read}; they are read again: {error}"
        return f"{read}, and the state after {length} tokens"

    def _ids(self) -> Sequence[int]:
        """Tokens of all messages."""
        if not self.messages or self.tokenizer.speaks_chat:
            return render(self.tokenizer, self.messages).ids if self.messages else ()
        return foreign_prompt_ids(self.tokenizer, self.messages)

    def ask(self, question: str, show: Show, stopped: Callable[[], bool]) -> Answer:
        """Let the model answer; the answer is cut off soon after `stopped()` is true. UserError for what cannot be."""
        self._retries = 0
        return self._answer((*self.messages, Message("user", question)), self.params, show, stopped)

    def retry(self, show: Show, stopped: Callable[[], bool]) -> Answer:
        """Another answer to the last question, with noise of its own."""
        question = self._last_question()
        self._retries += 1
        temperature = self.params.temperature or RETRY_TEMPERATURE
        params = replace(self.params, temperature=temperature, seed=self.params.seed + self._retries)
        return self._answer(self.messages[: question + 1], params, show, stopped)

    def undo(self) -> str:
        """Take the last question and its answer back; returns the question."""
        question = self._last_question()
        text = self.messages[question].content
        self.messages = self.messages[:question]
        return text

    def _last_question(self) -> int:
        places = [place for place, message in enumerate(self.messages) if message.role == "user"]
        if not places:
            raise UserError("nothing was asked yet")
        return places[-1]

    def _answer(
        self, messages: tuple[Message, ...], params: SamplingParams, show: Show, stopped: Callable[[], bool]
    ) -> Answer:
        prompt, marks = self.prompt(messages)
        room = params.max_new_tokens if self.engine.longest is None else self.engine.longest - len(prompt)
        if room < 1:
            raise UserError(f"{len(prompt)} tokens are more than fit into memory: /undo, or begin with more --memory")
        params = replace(
            params, max_new_tokens=min(room, params.max_new_tokens), thinking_budget=self._budget(messages)
        )
        reader = _reader(self.tokenizer, prompt, self.engine.eos_ids)
        watch = Stopwatch(self.engine)
        last = self._drive(prompt, params, marks, stopped, lambda delta: _read(reader, delta, watch, show))
        for part in reader.finish():
            show(part, reader.thinking_tokens)
        message = reader.message() if watch.speed().written else None
        if message is not None:
            self.messages = (*messages, message)
        assert last.finish is not None, "an answer is over when the engine says how"
        return Answer(message, last.finish, last.reason, reader.thinking_tokens, watch.speed())

    def _budget(self, messages: Sequence[Message]) -> int | None:
        return None if not self.tokenizer.speaks_chat else (self._mode(messages).budget or self.think.budget)

    def _drive(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        marks: Sequence[int],
        stopped: Callable[[], bool],
        take: Callable[[Delta], None],
    ) -> Delta:
        """Run the engine until the answer is over; returns its last delta.

        As `Engine.stream`, but a wish to stop is heard between any two steps, also while a long prompt is read.
        """
        deltas: deque[Delta] = deque()
        (sequence,) = self.engine.submit(prompt, params, marks=marks, sink=deltas.append)
        try:
            while True:
                if stopped() and sequence.finish is None:
                    self.engine.cancel(sequence)
                elif sequence.finish is None:
                    self.engine.step()
                while deltas:
                    delta = deltas.popleft()
                    take(delta)
                    if delta.finish is not None:
                        return delta
        finally:
            if sequence.finish is None:
                self.engine.cancel(sequence)


def _read(reader: OwnReader | ForeignReader, delta: Delta, watch: Stopwatch, show: Show) -> None:
    if delta.ids:
        watch.lap()
    for part in reader.feed(delta):
        show(part, reader.thinking_tokens)


def _reader(tokenizer: Tokenizer, prompt: Sequence[int], eos_ids: frozenset[int]) -> OwnReader | ForeignReader:
    return OwnReader(tokenizer, prompt) if tokenizer.speaks_chat else ForeignReader(eos_ids)


class OwnReader:
    """Reads an answer in our layout; counts tokens of thinking."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._turn = TurnStream(tokenizer, prompt)
        self._tags = chat_tokens(tokenizer)
        message = self._turn.message()
        self._is_thinking = message.thinking is not None and self._tags.think_end not in (message.ids or ())
        self.thinking_tokens = 0

    def feed(self, delta: Delta) -> list[TurnDelta]:
        """What a delta of the engine adds; an empty reasoning where thinking goes on without visible text."""
        found: list[TurnDelta] = []
        for id in delta.ids:
            parts = self._turn.feed([id])
            if parts:
                self._is_thinking = isinstance(parts[-1], ReasoningDelta)
            elif id == self._tags.think_end:
                self._is_thinking = False
            if self._is_thinking and id not in (self._tags.think, self._tags.think_end):
                self.thinking_tokens += 1
                parts = parts or [ReasoningDelta("")]
            found += parts
        return found

    def finish(self) -> list[TurnDelta]:
        """What was held back."""
        return self._turn.finish()

    def message(self) -> Message:
        """The turn with its ids."""
        return self._turn.message()


class ForeignReader:
    """Reads an answer in a foreign layout: all of it is content."""

    def __init__(self, eos_ids: frozenset[int]) -> None:
        self._eos_ids = eos_ids
        self._texts: list[str] = []
        self._ids: list[int] = []
        self.thinking_tokens = 0

    def feed(self, delta: Delta) -> list[TurnDelta]:
        """What a delta of the engine adds."""
        self._ids += [id for id in delta.ids if id not in self._eos_ids]
        self._texts.append(delta.text)
        return [ContentDelta(delta.text)] if delta.text else []

    def finish(self) -> list[TurnDelta]:
        """Nothing is held back: the engine's last delta has the rest."""
        return []

    def message(self) -> Message:
        """The turn with its ids."""
        return Message("assistant", "".join(self._texts), None, tuple(self._ids))
