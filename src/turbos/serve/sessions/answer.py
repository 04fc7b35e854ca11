"""One answer in a session: it is written in a task of its own, so that its turn is kept even if nobody listens.

The question is kept before the model reads it, the answer when it ends, however that is: by itself, stopped, cut off by
a client that vanished or by a server that stops. An answer of which nothing was written leaves the question alone. What
is told meanwhile is a queue of events that any one listener may take; this file knows no HTTP.

    answer = Answer(session.id, number, question, asked)
    answer.begin(desk, release)
    async for event in answer.events(): ...
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from turbos.common.errors import UserError
from turbos.serve.asking import Asked
from turbos.serve.service import Cancellation, Finished, Part, Service
from turbos.serve.sessions.directory import Directory
from turbos.serve.sessions.records import Turn, title_of
from turbos.serve.sessions.store import Store, StoreFailed
from turbos.text.messages import Message

LOG = logging.getLogger("turbos.serve.sessions")


@dataclass(frozen=True)
class Began:
    """The answer will be turn `number`."""

    number: int


@dataclass(frozen=True)
class Notice:
    """Something that went otherwise than hoped, and does not hinder the answer."""

    message: str


@dataclass(frozen=True)
class Ended:
    """The answer, kept as turn `number` (None: nothing was written), and seconds before and after its first part."""

    number: int | None
    finished: Finished
    reading: float
    writing: float


@dataclass(frozen=True)
class Failed:
    """There is no answer; `is_ours` where the server is to blame."""

    message: str
    is_ours: bool


AnswerEvent = Began | Notice | Part | Ended | Failed


@dataclass(frozen=True)
class Desk:
    """What answers work with: the model, the states on disk, the index."""

    service: Service
    directory: Directory
    store: Store

    async def restore(self, id: str, ids: Sequence[int], always: bool = False) -> str:
        """Let the engine have a session's state from disk where it knows less (or `always`); why that failed, or ""."""
        path = self.directory.state(id)
        saved = (await asyncio.to_thread(self.store.session, id)).saved_tokens
        if not path.exists():
            return "this session has no state on disk" if always or saved is not None else ""
        kept = await asyncio.to_thread(self.service.engine.kept, ids)
        if not always and saved is not None and kept >= saved:
            return ""
        try:
            found = await asyncio.to_thread(self.service.engine.load_session, path)
        # A file may be anything by now. It stays where it is, for whoever wants to know what happened to it.
        except UserError as error:
            return self.directory.without_path(str(error))
        if tuple(ids[: len(found)]) != found:
            # Of turns that were taken back just before a crash.
            path.unlink(missing_ok=True)
            await asyncio.to_thread(self.store.mark_saved, id, None, None)
            return "the state on disk was of other turns than the session has"
        return ""


@dataclass(eq=False)
class Answer:
    """An answer that was asked for after `number` turns."""

    session: str
    number: int
    question: str | None
    asked: Asked
    cancellation: Cancellation = field(default_factory=Cancellation)
    _queue: asyncio.Queue[AnswerEvent | None] = field(default_factory=asyncio.Queue)
    _task: asyncio.Task[None] | None = None

    def begin(self, desk: Desk, release: Callable[[], object]) -> None:
        """Start to write; `release` is called when the session is free again, before the last event is told."""
        self._task = asyncio.create_task(self._run(desk, release))

    async def over(self) -> None:
        """Wait for the end."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def events(self) -> AsyncIterator[AnswerEvent]:
        """What happens, to its end. A listener that leaves early must request the cancellation."""
        while (event := await self._queue.get()) is not None:
            yield event

    async def _run(self, desk: Desk, release: Callable[[], object]) -> None:
        last: AnswerEvent = Failed("the answer was given up", is_ours=True)
        try:
            last = await self._write(desk)
        except UserError as error:
            last = Failed(desk.directory.without_path(str(error)), is_ours=isinstance(error, StoreFailed))
        # Whatever it is, it belongs to the listener; strangers learn no more than that it is our fault.
        except Exception:
            LOG.exception("session %s: its answer failed", self.session)
            last = Failed("the server failed on this answer", is_ours=True)
        finally:
            release()
            self._queue.put_nowait(last)
            self._queue.put_nowait(None)

    async def _write(self, desk: Desk) -> AnswerEvent:
        number = self.number
        if self.question is not None:
            asked = Turn(Message("user", self.question), time.time())
            number = 1 + await asyncio.to_thread(desk.store.add, self.session, asked, title_of(self.question))
        self._queue.put_nowait(Began(number))
        notice = await desk.restore(self.session, self.asked.prompt.ids)
        if notice:
            self._queue.put_nowait(Notice(f"{notice}; the conversation is read again"))
        finished, reading, writing = await self._listen(desk.service)
        if not finished.usage.completion:
            return Ended(None, finished, reading, writing)
        turn = Turn(finished.message, time.time(), finished.reason, finished.detail, finished.usage)
        return Ended(await asyncio.to_thread(desk.store.add, self.session, turn), finished, reading, writing)

    async def _listen(self, service: Service) -> tuple[Finished, float, float]:
        """Pass the parts on; returns how it ended, and the seconds before the first part and from there on."""
        began = first = time.perf_counter()
        answer = service.answer(self.asked.prompt, self.asked.params, cancellation=self.cancellation)
        has_part = False
        async with aclosing(answer) as events:
            async for event in events:
                if not has_part:
                    has_part, first = True, time.perf_counter()
                if isinstance(event, Finished):
                    return event, first - began, time.perf_counter() - first
                self._queue.put_nowait(event)
        raise RuntimeError("an answer ended without saying how")
