"""Conversations that are kept: asked on, forked, taken back, saved and found again after a restart. No HTTP.

The index has every turn from the moment it ends. The model's state of a session is written when somebody asks for it,
and for all that were spoken in when the server stops; with it a restarted server reads nothing again. A state that
cannot be used costs time, never words: the conversation is read again, and the answer says why. One answer at a time
in each session.

    sessions = Sessions.open(service, Path("sessions"))
    session = await sessions.create("greatest common divisors")
    answer = await sessions.ask(session.id, "What is it of 12 and 18?", Wish(max_tokens=256), limits)
    async for event in answer.events(): ...
    await sessions.save(session.id)
    await sessions.close()
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from turbos.common.errors import UserError
from turbos.engine.sampling_params import SamplingParams
from turbos.serve.asking import ask
from turbos.serve.limits import ServeOptions
from turbos.serve.schema import ChatOptions
from turbos.serve.service import Service
from turbos.serve.sessions.answer import Answer, Desk
from turbos.serve.sessions.directory import Directory
from turbos.serve.sessions.records import LONGEST_TITLE, Session, Turn, messages_of
from turbos.serve.sessions.store import Store, StoreFailed
from turbos.text.chat import render
from turbos.text.foreign import foreign_prompt_ids
from turbos.text.messages import Message

LOG = logging.getLogger("turbos.serve.sessions")


class Busy(UserError):
    """The session cannot do this while it answers, or while its state is written."""


@dataclass(frozen=True)
class Conversation:
    """A session and all its turns."""

    session: Session
    turns: tuple[Turn, ...]
    is_answering: bool


class Sessions:
    """The sessions of one service and one directory. Used from one event loop."""

    def __init__(self, service: Service, directory: Directory, store: Store) -> None:
        """Takes over directory and store; `open` makes them."""
        self._service, self._directory, self._store = service, directory, store
        self._desk = Desk(service, directory, store)
        self._answers: dict[str, Answer] = {}
        self._claimed: set[str] = set()
        self._unsaved: set[str] = set()

    @classmethod
    def open(cls, service: Service, where: Path | Directory) -> Sessions:
        """Hold a directory, unless it is held already, and read its index.

        UserError where another server has it, or the index is damaged; it is let go then.
        """
        directory = Directory.open(where) if isinstance(where, Path) else where
        try:
            store = Store(directory.index, service.tokenizer)
            directory.sweep(store.ids())
        except BaseException:
            directory.close()
            raise
        return cls(service, directory, store)

    async def close(self) -> None:
        """End all answers, write the states of sessions that were spoken in, and let the directory go."""
        for id in list(self._answers):
            await self.stop(id)
        for id in sorted(self._unsaved):
            try:
                await self._save_what_is_kept(id)
            # The words are safe; without the state they will be read again.
            except UserError as error:
                LOG.warning("session %s: its state was not saved: %s", id, error)
        self._store.close()
        self._directory.close()

    # What is there

    async def create(self, title: str = "", system: str = "") -> Session:
        """A session without turns, or with a system message."""
        session = await asyncio.to_thread(self._store.create, title)
        if system:
            await asyncio.to_thread(self._store.add, session.id, Turn(Message("system", system), session.created))
        return session

    async def recent(self, limit: int, offset: int = 0) -> list[Session]:
        """Sessions, the one that was spoken in last first."""
        return await asyncio.to_thread(self._store.recent, limit, offset)

    async def read(self, id: str) -> Conversation:
        """A session with its turns; waits for an answer that is being stopped, since its turn is about to come."""
        answer = self._answers.get(id)
        if answer is not None and answer.cancellation.requested:
            await answer.over()
        session = await asyncio.to_thread(self._store.session, id)
        turns = await asyncio.to_thread(self._store.turns, id)
        return Conversation(session, turns, id in self._answers)

    async def rename(self, id: str, title: str) -> Session:
        """Give another title."""
        return await asyncio.to_thread(self._store.rename, id, title)

    async def delete(self, id: str) -> None:
        """Forget a session, its answer and its state on disk."""
        await self.stop(id)
        with self._claim(id):
            await asyncio.to_thread(self._store.delete, id)
            self._unsaved.discard(id)
            self._directory.state(id).unlink(missing_ok=True)

    # What is said

    async def ask(self, id: str, question: str | None, wish: ChatOptions, limits: ServeOptions) -> Answer:
        """Put a question, or without one answer the last turn; the answer's turn is kept whoever listens.

        Busy while another answer comes; UserError or ApiError for what cannot be, and nothing is kept then.
        """
        with self._claim(id):
            turns = await asyncio.to_thread(self._store.turns, id)
            asked = await ask(self._service, wish, limits, _with(messages_of(turns), question))
            await self._service.check(asked.prompt, asked.params)
            answer = Answer(id, len(turns), question, asked)
            self._answers[id] = answer
        self._unsaved.add(id)
        answer.begin(self._desk, lambda: self._answers.pop(id))
        return answer

    async def stop(self, id: str) -> None:
        """End the answer that comes, if one does; returns when what there is of it is kept."""
        answer = self._answers.get(id)
        if answer is not None:
            answer.cancellation.request()
            await answer.over()

    async def undo(self, id: str) -> Message:
        """Take the last question back, and all after it; returns the question. UserError where nothing was asked."""
        with self._claim(id):
            turns = await asyncio.to_thread(self._store.turns, id)
            asked = [number for number, turn in enumerate(turns) if turn.message.role == "user"]
            if not asked:
                raise UserError("nothing was asked in this session yet")
            session = await asyncio.to_thread(self._store.cut, id, asked[-1])
            if session.saved_tokens is None:
                self._directory.state(id).unlink(missing_ok=True)
            return turns[asked[-1]].message

    async def fork(self, id: str, count: int | None = None, title: str | None = None) -> Session:
        """Another session with the first `count` turns (None: all); turns that are kept are forked while it answers."""
        session = await asyncio.to_thread(self._store.session, id)
        count = session.num_turns if count is None else count
        if not 0 <= count <= session.num_turns:
            raise UserError(f"turn must lie between 0 and {session.num_turns}, not {count}")
        title = session.title if title is None else title
        forked = await asyncio.to_thread(self._store.fork, id, count, title[:LONGEST_TITLE])
        return forked if forked.saved_tokens is None else await self._share_state(id, forked)

    async def _share_state(self, id: str, forked: Session) -> Session:
        """Files of states are only ever replaced, so one may have two names."""
        try:
            os.link(self._directory.state(id), self._directory.state(forked.id))
        # It may just have gone, or the file system has no second names: the words are there.
        except OSError as error:
            LOG.info("session %s: begins without a state on disk (%s)", forked.id, error.strerror)
            return await asyncio.to_thread(self._store.mark_saved, forked.id, None, None)
        return forked

    # States on disk

    async def save(self, id: str) -> Session:
        """Write the state after all turns. UserError where nothing was said, or no state can be had."""
        with self._claim(id):
            turns = await asyncio.to_thread(self._store.turns, id)
            if not turns:
                raise UserError("nothing was said in this session yet, so there is no state to save")
            await self._read_rest(await asyncio.to_thread(self._ids, messages_of(turns)))
            return await self._write_state(id)

    async def load(self, id: str) -> Session:
        """Read the state from disk; asking does it by itself where it helps. UserError, naming a file that is bad."""
        with self._claim(id):
            turns = await asyncio.to_thread(self._store.turns, id)
            ids = await asyncio.to_thread(self._ids, messages_of(turns)) if turns else ()
            notice = await self._desk.restore(id, ids, always=True)
            if notice:
                raise UserError(notice)
            return await asyncio.to_thread(self._store.session, id)

    async def _save_what_is_kept(self, id: str) -> None:
        """Write the state that the engine has, unless the one on disk has read more."""
        session, turns = self._store.session(id), self._store.turns(id)
        kept = self._service.engine.kept(self._ids(messages_of(turns))) if turns else 0
        if kept > (session.saved_tokens or 0):
            await self._write_state(id)

    async def _read_rest(self, ids: Sequence[int]) -> None:
        """Let the engine have the state after all tokens; an answer leaves one or two at its end unread."""
        engine = self._service.engine
        is_full = engine.longest is not None and len(ids) >= engine.longest
        if is_full or await asyncio.to_thread(engine.kept, ids) == len(ids):
            return
        prompt, params = self._service.text_prompt(ids), SamplingParams(max_new_tokens=1)
        async with aclosing(self._service.answer(prompt, params)) as events:
            async for _ in events:
                pass

    async def _write_state(self, id: str) -> Session:
        turns = await asyncio.to_thread(self._store.turns, id)
        ids = await asyncio.to_thread(self._ids, messages_of(turns)) if turns else ()
        path = self._directory.state(id)
        try:
            length = await asyncio.to_thread(self._service.engine.save_session, path, ids)
        except UserError as error:
            kind = StoreFailed if isinstance(error.__cause__, OSError | SafetensorError) else UserError
            raise kind(self._directory.without_path(str(error))) from error
        self._unsaved.discard(id)
        return await asyncio.to_thread(self._store.mark_saved, id, length, len(turns))

    def _ids(self, messages: Sequence[Message]) -> Sequence[int]:
        """Tokens of all turns."""
        if self._service.speaks_chat:
            return render(self._service.tokenizer, messages).ids
        return foreign_prompt_ids(self._service.tokenizer, messages)

    @contextmanager
    def _claim(self, id: str) -> Iterator[None]:
        """Have a session to oneself."""
        if id in self._answers or id in self._claimed:
            what = "an answer is coming" if id in self._answers else "it is being changed"
            raise Busy(f"the session is busy ({what}): wait for its end, or stop it")
        self._claimed.add(id)
        try:
            yield
        finally:
            self._claimed.discard(id)


def _with(messages: Sequence[Message], question: str | None) -> tuple[Message, ...]:
    """A conversation and a question more; one that was never answered is part of it."""
    if question is None:
        return tuple(messages)
    now = [Turn(message, 0.0) for message in messages]
    return messages_of([*now, Turn(Message("user", question), 0.0)])
