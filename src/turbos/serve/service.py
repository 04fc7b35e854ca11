"""A model that answers: one engine driven for many callers, its tokenizer, and what it remembers of turns. No HTTP.

    async with Service.of_checkpoint("runs/demo/final", EngineConfig()) as service:
        prompt = service.prompt([Message("user", "What is the greatest common divisor of 12 and 18?")])
        async for event in service.answer(prompt, SamplingParams(max_new_tokens=256)):
            if isinstance(event, Part) and isinstance(event.delta, ContentDelta):
                print(event.delta.text, end="")

Turns that were written here are rendered from their ids, so that a conversation's tokens only grow and the engine finds
its state again; clients that send texts back are matched to them. A checkpoint with a chat template of its own has
neither thinking nor tools here: both are refused.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal

from turbos.common.errors import UserError
from turbos.common.records import Completion, Finish
from turbos.engine.config import DEFAULTS, EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.sequence import Delta
from turbos.engine.stream import AsyncEngine, Stream
from turbos.serve.reading import ChatReader, Read, Reader, TextReader, Token
from turbos.serve.turns import TurnMemory
from turbos.text.chat import opening_ids, render
from turbos.text.foreign import foreign_prompt_ids
from turbos.text.messages import Message, Tool, check_conversation, check_prompt, surrogate
from turbos.text.stream import Delta as TurnDelta
from turbos.text.thinking import Thinking


@dataclass(frozen=True)
class Prompt:
    """What is asked: tokens, and after how many of them the state is worth keeping (ends of messages).

    `layout` says how the answer is to be read; `opening` is what the prompt holds of the answer's turn already; `key`
    stands for the conversation, where the answer will be a turn of one.
    """

    ids: tuple[int, ...]
    marks: tuple[int, ...] = ()
    layout: Literal["chat", "foreign", "text"] = "text"
    opening: tuple[int, ...] = ()
    key: bytes = b""


@dataclass(frozen=True)
class Usage:
    """Tokens of an answer: of the prompt, how many of those came from a kept state, written, and of those thought."""

    prompt: int
    cached: int
    completion: int
    reasoning: int


@dataclass(frozen=True)
class Part:
    """More of answer `index`: thinking, content or a call, the content's tokens, those of thinking and all so far."""

    index: int
    delta: TurnDelta
    tokens: tuple[Token, ...] = ()
    reasoning_tokens: int = 0
    written: int = 0


@dataclass(frozen=True)
class Finished:
    """Answer `index` is over: why (an error has its `detail`), what the engine wrote, and the turn with its ids.

    A turn that a stop string ended is not `whole`: its ids say more than was shown.
    """

    index: int
    reason: Finish
    completion: Completion
    usage: Usage
    message: Message
    detail: str = ""
    whole: bool = True


Event = Part | Finished


class Cancellation:
    """A way to end an answer whose `Finished` is still wanted: it comes as cancelled, with what there is."""

    def __init__(self) -> None:
        """Nothing is wanted yet."""
        self.requested = False
        self._cancel: Callable[[], None] | None = None

    def request(self) -> None:
        """End the answer, before or after it has begun."""
        self.requested = True
        if self._cancel is not None:
            self._cancel()

    def meet(self, cancel: Callable[[], None]) -> None:
        """What ends the answer, from now on."""
        self._cancel = cancel
        if self.requested:
            cancel()


class Service:
    """Answers of one model. Open it with `async with`; `prompt` and `check` may be called from any thread."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        assert engine.tokenizer is not None, "a service speaks text"
        self.engine, self.tokenizer, self.model_name = engine, engine.tokenizer, model_name
        self.running = AsyncEngine(engine)
        self.turns = TurnMemory()

    @classmethod
    def of_checkpoint(cls, name: str | Path, config: EngineConfig = DEFAULTS, model_name: str | None = None) -> Service:
        """A service of a checkpoint directory or hub id, which names the model unless another name is given."""
        engine = Engine.from_checkpoint(name, config)
        return cls(engine, model_name or _name_of(name))

    async def __aenter__(self) -> Service:
        self.running.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.running.close)

    @property
    def failed(self) -> bool:
        """Whether the model has raised an error: it answers no more."""
        return self.running.failed

    @property
    def speaks_chat(self) -> bool:
        """Whether chats are in our layout, with thinking and tools."""
        return self.tokenizer.speaks_chat

    def prompt(self, turns: Sequence[Message], tools: Sequence[Tool] = (), thinking: Thinking | None = None) -> Prompt:
        """The tokens that ask for the next turn of a conversation. UserError for one that cannot be."""
        check_conversation(turns)
        check_prompt(turns)
        thinking = thinking or Thinking()
        recalled = self.turns.recall(turns, tools)
        if not self.speaks_chat:
            if tools or thinking.mode != "auto":
                what = "tools" if tools else "thinking"
                raise UserError(f"{what}: this checkpoint's chat template is its own, which is asked for neither here")
            ids = tuple(foreign_prompt_ids(self.tokenizer, recalled.turns))
            return Prompt(ids, (), "foreign", (), recalled.key)
        rendered = render(self.tokenizer, recalled.turns, tools)
        opening = tuple(opening_ids(self.tokenizer, thinking))
        # What many conversations begin with, and where another mode of thinking or another answer goes on from.
        head = max((span.end for span in rendered.spans if span.message is None), default=0)
        if turns[0].role == "system":
            head = max(span.end for span in rendered.spans if span.message == 0)
        marks = {head, len(rendered.ids)} - {0}
        return Prompt((*rendered.ids, *opening), tuple(sorted(marks)), "chat", opening, recalled.key)

    def text_prompt(self, text: str | Sequence[int]) -> Prompt:
        """The tokens of a text that is to be continued as it is; given ids are taken as they are."""
        if isinstance(text, str) and surrogate(text) is not None:
            raise UserError("prompt: half a surrogate pair is no text")
        ids = self.tokenizer.encode_batch([text])[0] if isinstance(text, str) else text
        if not ids:
            raise UserError("prompt: it is empty; give at least one character or token")
        return Prompt(tuple(ids))

    async def check(self, prompt: Prompt, params: SamplingParams) -> None:
        """UserError for what `answer` would refuse. A grammar is compiled here, beside the event loop."""
        params = replace(params, stop=())
        if params.grammar is None:
            self.engine.check(prompt.ids, params, marks=prompt.marks)
        else:
            await asyncio.to_thread(self.engine.check, prompt.ids, params, marks=prompt.marks)

    async def answer(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        most_calls: int | None = None,
        cancellation: Cancellation | None = None,
    ) -> AsyncGenerator[Event, None]:
        """The events of `params.n` answers as they come, a `Finished` for each; leaving early cancels what is left.

        Stop strings end content only. `most_calls` ends an answer after so many calls of tools.
        """
        readers = [self._reader(prompt, params, most_calls) for _ in range(params.n)]
        unfinished = set(range(params.n))
        with self.running.open(prompt.ids, replace(params, stop=()), marks=prompt.marks) as stream:
            if cancellation is not None:
                cancellation.meet(stream.cancel)
            while unfinished:
                for index, deltas in _by_answer(await stream.get_all()).items():
                    if index not in unfinished:
                        continue
                    for event in _events(readers[index], index, deltas, prompt, stream):
                        if isinstance(event, Finished):
                            unfinished.discard(index)
                            self._remember(prompt, event, readers[index].shown)
                        yield event

    def _reader(self, prompt: Prompt, params: SamplingParams, most_calls: int | None) -> Reader:
        if prompt.layout == "chat":
            return ChatReader(self.tokenizer, prompt.opening, params.stop, most_calls)
        ends = self.engine.eos_ids if params.stop_ids is None else params.stop_ids
        return TextReader(self.tokenizer, ends, params.stop)

    def _remember(self, prompt: Prompt, finished: Finished, shown: str) -> None:
        is_turn = finished.reason in ("stop", "length") and finished.whole and bool(finished.message.ids)
        if prompt.key and is_turn:
            self.turns.remember(prompt.key, finished.message)
            if shown != finished.message.content:
                self.turns.remember(prompt.key, finished.message, shown)


def _name_of(checkpoint: str | Path) -> str:
    """A hub id as it is; of a directory its last part, of a run's last checkpoint the run's."""
    if not Path(checkpoint).is_dir():
        return str(checkpoint)
    directory = Path(checkpoint).resolve()
    return directory.parent.name if directory.name == "final" else directory.name


def _by_answer(deltas: Sequence[Delta]) -> dict[int, list[Delta]]:
    found: dict[int, list[Delta]] = {}
    for delta in deltas:
        found.setdefault(delta.index, []).append(delta)
    return found


def _events(reader: Reader, index: int, deltas: Sequence[Delta], prompt: Prompt, stream: Stream) -> list[Event]:
    """What deltas of one answer come to."""
    tokens = [token for delta in deltas for token in _tokens(delta)]
    reads = reader.feed(tokens)
    events: list[Event] = []
    last = deltas[-1]
    if reader.stopped:
        stream.cancel(index)
    if reader.stopped or last.finish is not None:
        reads += reader.finish()
    events += [_part(index, read, reader.num_tokens) for read in reads]
    if reader.stopped:
        events.append(_cut(reader, index, prompt, stream))
    elif last.completion is not None and last.finish is not None:
        completion = last.completion
        usage = Usage(len(prompt.ids), completion.cached_tokens, len(completion.ids), reader.reasoning_tokens)
        events.append(Finished(index, last.finish, completion, usage, reader.message(), last.reason))
    return events


def _cut(reader: Reader, index: int, prompt: Prompt, stream: Stream) -> Finished:
    """An answer that a stop string or its last call ended: what the engine wrote beyond it does not count."""
    answer = stream.answers[index]
    count = reader.num_tokens
    completion = Completion(
        prompt.ids,
        tuple(answer.writer.ids[:count]),
        tuple(answer.writer.logprobs[:count]),
        "stop",
        answer.weights_version,
        reader.message().content,
        top_logprobs=tuple(answer.writer.tops[:count]),
        cached_tokens=answer.cached_tokens,
    )
    usage = Usage(len(prompt.ids), answer.cached_tokens, count, reader.reasoning_tokens)
    return Finished(index, "stop", completion, usage, reader.message(), whole=not reader.cut)


def _tokens(delta: Delta) -> list[Token]:
    tops = delta.tops or ((),) * len(delta.ids)
    return [Token(id, logprob, top) for id, logprob, top in zip(delta.ids, delta.logprobs, tops, strict=True)]


def _part(index: int, read: Read, written: int) -> Part:
    return Part(index, read.delta, read.tokens, read.reasoning_tokens, written)
