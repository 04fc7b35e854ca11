"""The directory that a server keeps its sessions in: one server at a time, and where each file lies.

    DIR/lock                  held by the server that is running, with its process number
    DIR/index.sqlite          all conversations (`store.py`), with SQLite's own files beside it
    DIR/states/ID.state       the model's state after a session's tokens (`engine.snapshot`), whole or absent

Names of files are made of ids that were drawn here, never of anything that a client sends.

    directory = Directory.open(Path("sessions"))        # UserError where another server has it
    directory.state("0123456789abcdef0123456789abcdef")
    directory.close()
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from turbos.common.errors import UserError

ID = re.compile(r"[0-9a-f]{32}")


def new_id() -> str:
    """An id that nobody can guess."""
    return secrets.token_hex(16)


@dataclass(frozen=True)
class Directory:
    """A directory that this process holds, until `close` or its end, whichever way it ends."""

    path: Path
    lock: BinaryIO

    @classmethod
    def open(cls, path: Path) -> Directory:
        """Make the directory where it is missing, and hold it. UserError where that cannot be."""
        try:
            # Conversations are their owner's alone.
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (path / "states").mkdir(mode=0o700, exist_ok=True)
            lock = (path / "lock").open("a+b", buffering=0)
        except OSError as error:
            raise UserError(f"sessions {path}: {error.strerror}; name another directory with --sessions") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(lock)
            lock.close()
            what = f"sessions {path}: another server{holder} keeps its sessions here"
            raise UserError(f"{what}; stop it, or name another directory with --sessions") from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n".encode())
        return cls(path, lock)

    def close(self) -> None:
        """Let the next server in."""
        self.lock.close()

    @property
    def index(self) -> Path:
        """SQLite's file."""
        return self.path / "index.sqlite"

    def state(self, id: str) -> Path:
        """Where the state of a session lies, if it was saved. ValueError for an id that was not drawn here."""
        if not ID.fullmatch(id):
            raise ValueError("no id of a session")
        return self.path / "states" / f"{id}.state"

    def sweep(self, ids: Collection[str]) -> None:
        """Remove what a crash left: halves of files, and states of sessions that are no more."""
        for file in (self.path / "states").iterdir():
            if file.suffix == ".saving" or (file.suffix == ".state" and file.stem not in ids):
                file.unlink(missing_ok=True)

    def without_path(self, text: str) -> str:
        """A message for clients, who need not know where on this machine files lie."""
        return text.replace(f"{self.path}{os.sep}", "")


def _holder(lock: BinaryIO) -> str:
    lock.seek(0)
    number = lock.read(32).strip()
    return f" (process {number.decode()})" if number.isdigit() else ""
