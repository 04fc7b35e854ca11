"""States of an engine's conversations on disk: what `snapshot.py` writes, from and into the engine's kept states.

After a restart a conversation goes on without being read again. Nothing may run in the engine meanwhile.

    origin = origin_of(engine.model)                        # once for each set of weights
    save_state(path, engine, ids, origin)                   # the longest state kept of a beginning of ids
    load_state(path, engine, origin)                        # found by whoever submits a prompt that begins so
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from turbos.common.errors import UserError
from turbos.engine.cache import Miss
from turbos.engine.snapshot import Origin, load_session, save_session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from turbos.engine.engine import Engine


def save_state(path: Path, engine: Engine, ids: Sequence[int], origin: Origin) -> int:
    """Write the longest state that is kept of a beginning of `ids`; returns how many of them it has read.

    UserError where no state is kept, or the disk refuses.
    """
    found = engine.cache.find(ids)
    if isinstance(found, Miss):
        raise UserError(f"{path}: no state of these {len(ids)} tokens is kept ({found.reason})")
    try:
        save_session(path, engine.cache, found.snapshot, ids, origin)
    finally:
        engine.cache.release(found.snapshot)
    return found.length


def load_state(path: Path, engine: Engine, origin: Origin) -> tuple[int, ...]:
    """Keep a state that was written; returns the tokens that it has read. UserError as `snapshot.load_session`."""
    session = load_session(path, engine.cache, origin)
    row = engine.pool.new_row()
    try:
        if row is None:
            raise UserError(f"{path}: all of the engine's rows are busy; load the session when one is free")
        engine.cache.restore(session.snapshot, row)
        engine.cache.keep(session.ids, row, session.snapshot.hidden_D)
    finally:
        engine.cache.release(session.snapshot)
        if row is not None:
            engine.pool.free_row(row)
    return session.ids
