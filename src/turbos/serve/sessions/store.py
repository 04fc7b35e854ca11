"""The index of sessions: conversations in SQLite, one transaction for each thing that happens, on disk when it returns.

A process that is killed at any moment leaves each session as it was after its last whole turn. The states of the model
are files of their own (`directory.py`). Calls are short and may come from any thread; what is wrong with the disk is
`StoreFailed`.

    store = Store(directory.index, tokenizer)
    session = store.create("greatest common divisors")
    store.add(session.id, Turn(Message("user", "12 and 18?"), created=time.time()))
    store.turns(session.id)
"""

from __future__ import annotations

import sqlite3
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from turbos.common.errors import UserError
from turbos.serve.service import Usage
from turbos.serve.sessions.directory import new_id
from turbos.serve.sessions.records import Session, Turn
from turbos.text.messages import Message, ToolCall, read_call
from turbos.text.tokenizer import Tokenizer

VERSION = 1
"""Of the tables; another one is refused."""

TABLES = """
CREATE TABLE sessions (
    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, title TEXT NOT NULL, created REAL NOT NULL,
    updated REAL NOT NULL, parent TEXT, saved_tokens INTEGER, saved_turns INTEGER
);
CREATE INDEX by_age ON sessions (updated DESC, number DESC);
CREATE TABLE turns (
    session TEXT NOT NULL REFERENCES sessions (id) ON DELETE CASCADE, number INTEGER NOT NULL,
    created REAL NOT NULL, role TEXT NOT NULL, content TEXT NOT NULL, thinking TEXT, calls TEXT NOT NULL,
    ids BLOB, tokenizer TEXT NOT NULL, finish TEXT, detail TEXT NOT NULL,
    prompt INTEGER, cached INTEGER, completion INTEGER, reasoning INTEGER,
    PRIMARY KEY (session, number)
) WITHOUT ROWID;
"""

TURN = "created, role, content, thinking, calls, ids, tokenizer, finish, detail, prompt, cached, completion, reasoning"
SESSION = """
SELECT id, title, created, updated, (SELECT count(*) FROM turns WHERE session = id) AS num_turns, parent,
    saved_tokens, saved_turns FROM sessions
"""


class NoSession(UserError):
    """No session has this id."""


class StoreFailed(UserError):
    """The index cannot be read or written: the disk is full, say."""


class Store:
    """The index that lies at a path; made where there is none."""

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        """UserError, naming the file, for one that is damaged or of another version."""
        self._path, self._fingerprint = path, tokenizer.fingerprint
        self._lock = threading.Lock()
        # A disk that refuses is told of where something happens; here the file itself is looked at.
        with self._named():
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA foreign_keys = ON")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")
            self._make_tables()

    def close(self) -> None:
        """Nothing more is asked of it."""
        with self._lock:
            self._database.close()

    def _make_tables(self) -> None:
        (found,) = self._database.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(str(found))
        (version,) = self._database.execute("PRAGMA user_version").fetchone()
        if version not in (0, VERSION):
            raise UserError(f"{self._path}: written by another version ({version}, read here is {VERSION})")
        if version == 0:
            self._database.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreFailed(f"{self._path}: {error}; make room, or bring back a copy of the file") from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All of what is done inside, or nothing."""
        with self._lock, self._named():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            finally:
                # A full disk has ended it already.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")

    # Sessions

    def create(self, title: str = "", parent: str | None = None) -> Session:
        """A session without turns."""
        now = time.time()
        session = Session(new_id(), title, now, now, parent=parent)
        with self._transaction() as database:
            _insert(database, session)
        return session

    def session(self, id: str) -> Session:
        """A session; NoSession where there is none of the id."""
        with self._transaction() as database:
            return _session(database, id)

    def recent(self, limit: int, offset: int = 0) -> list[Session]:
        """Sessions, the one that was spoken in last first."""
        order = f"{SESSION} ORDER BY updated DESC, number DESC LIMIT ? OFFSET ?"
        with self._transaction() as database:
            return [Session(**dict(row)) for row in database.execute(order, (limit, offset))]

    def ids(self) -> set[str]:
        """Ids of all sessions."""
        with self._transaction() as database:
            return {row["id"] for row in database.execute("SELECT id FROM sessions")}

    def rename(self, id: str, title: str) -> Session:
        """Give a title."""
        return self._set(id, "title = ?", title)

    def mark_saved(self, id: str, tokens: int | None, turns: int | None) -> Session:
        """Note what the state on disk has read; None where there is none."""
        return self._set(id, "saved_tokens = ?, saved_turns = ?", tokens, turns)

    def _set(self, id: str, fields: str, *values: object) -> Session:
        with self._transaction() as database:
            database.execute(f"UPDATE sessions SET {fields} WHERE id = ?", (*values, id))
            return _session(database, id)

    def delete(self, id: str) -> None:
        """Forget a session and its turns."""
        with self._transaction() as database:
            _session(database, id)
            database.execute("DELETE FROM sessions WHERE id = ?", (id,))

    # Turns

    def turns(self, id: str) -> tuple[Turn, ...]:
        """The turns of a session, oldest first."""
        with self._transaction() as database:
            _session(database, id)
            rows = database.execute(f"SELECT {TURN} FROM turns WHERE session = ? ORDER BY number", (id,)).fetchall()
        with self._named():
            return tuple(self._turn(row) for row in rows)

    def add(self, id: str, turn: Turn, title: str = "") -> int:
        """One turn more; returns its number. `title` is for a session that has none."""
        with self._transaction() as database:
            number = _session(database, id).num_turns
            values = (id, number, *self._values(turn))
            database.execute(f"INSERT INTO turns (session, number, {TURN}) VALUES ({_marks(values)})", values)
            update = "UPDATE sessions SET updated = ?, title = CASE title WHEN '' THEN ? ELSE title END WHERE id = ?"
            database.execute(update, (turn.created, title, id))
            return number

    def cut(self, id: str, count: int) -> Session:
        """Keep the first `count` turns; a state of more than those is of no use and no longer noted."""
        with self._transaction() as database:
            session = _session(database, id)
            database.execute("DELETE FROM turns WHERE session = ? AND number >= ?", (id, count))
            if (session.saved_turns or 0) > count:
                database.execute("UPDATE sessions SET saved_tokens = NULL, saved_turns = NULL WHERE id = ?", (id,))
            return _session(database, id)

    def fork(self, id: str, count: int, title: str) -> Session:
        """Another session with the first `count` turns of one, and what is noted of its state if that fits."""
        now = time.time()
        with self._transaction() as database:
            parent = _session(database, id)
            fits = parent.saved_turns is not None and parent.saved_turns <= count
            noted = (parent.saved_tokens, parent.saved_turns) if fits else (None, None)
            session = Session(new_id(), title, now, now, count, id, *noted)
            _insert(database, session)
            copy = f"INSERT INTO turns (session, number, {TURN}) SELECT ?, number, {TURN} FROM turns"
            database.execute(f"{copy} WHERE session = ? AND number < ?", (session.id, id, count))
        return session

    def _values(self, turn: Turn) -> tuple[object, ...]:
        message, usage = turn.message, turn.usage
        calls = "\n".join(call.text for call in message.tool_calls)
        ids = None if message.ids is None else array("i", message.ids).tobytes()
        counts = (None,) * 4 if usage is None else (usage.prompt, usage.cached, usage.completion, usage.reasoning)
        said = (message.role, message.content, message.thinking, calls, ids, self._fingerprint)
        return (turn.created, *said, turn.finish, turn.detail, *counts)

    def _turn(self, row: sqlite3.Row) -> Turn:
        usage = None
        if row["prompt"] is not None:
            usage = Usage(row["prompt"], row["cached"], row["completion"], row["reasoning"])
        return Turn(self._message(row), row["created"], row["finish"], row["detail"], usage)

    def _message(self, row: sqlite3.Row) -> Message:
        """The message; tokens of another tokenizer mean nothing here, its text counts then."""
        calls: tuple[ToolCall, ...] = tuple(read_call(line) for line in row["calls"].split("\n") if line)
        message = Message(row["role"], row["content"], row["thinking"], None, calls)
        if row["ids"] is None or row["tokenizer"] != self._fingerprint:
            says_nothing = row["role"] == "assistant" and not (message.content or calls) and message.thinking is None
            return replace(message, thinking="") if says_nothing else message
        return replace(message, ids=tuple(array("i", row["ids"])))


def _session(database: sqlite3.Connection, id: str) -> Session:
    row = database.execute(f"{SESSION} WHERE id = ?", (id,)).fetchone()
    if row is None:
        raise NoSession("there is no such session")
    return Session(**dict(row))


def _insert(database: sqlite3.Connection, session: Session) -> None:
    values: Sequence[Any] = (
        session.id,
        session.title,
        session.created,
        session.updated,
        session.parent,
        session.saved_tokens,
        session.saved_turns,
    )
    names = "id, title, created, updated, parent, saved_tokens, saved_turns"
    database.execute(f"INSERT INTO sessions ({names}) VALUES ({_marks(values)})", values)


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" for _ in values)
