"""Turns that were written here, found again by their text: for clients that keep conversations as texts.

The tokens of an assistant's turn are more than its text (its thinking is mostly not sent back), and text is often
encoded otherwise than it was sampled. So a turn that a client sends back is looked up under what came before it and
what it says, and takes its ids again; the engine then finds the state that these ids left. What is not found is a text
like any other. Memory is bounded, the least recently used turns go first. No lock: one event loop or one caller.

>>> memory = TurnMemory()
>>> asked, said = Message("user", "2 plus 2?"), Message("assistant", "4", thinking="2+2=4", ids=(7, 8))
>>> memory.remember(memory.recall([asked]).key, said)
>>> memory.recall([asked, Message("assistant", "4"), Message("user", "and 1?")]).turns[1] == said
True
>>> memory.recall([Message("user", "2 plus 3?"), Message("assistant", "4")]).turns[1].ids is None
True
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock

from turbos.text.messages import Message, Tool

MOST_TURNS = 1 << 15
MOST_TOKENS = 1 << 23
"""Of all turns that are remembered: about 64 MB and 100 MB of small integers."""

ALIKE = 4
"""Turns of one text after one beginning that are kept apart by their thinking."""


@dataclass(frozen=True)
class Recalled:
    """A conversation in which turns that were written here have their ids; `key` stands for all of it."""

    turns: tuple[Message, ...]
    key: bytes


class TurnMemory:
    """Assistant turns by what came before and what they say."""

    def __init__(self, most_turns: int = MOST_TURNS, most_tokens: int = MOST_TOKENS) -> None:
        self._most_turns, self._most_tokens = most_turns, most_tokens
        self._turns: OrderedDict[bytes, tuple[Message, ...]] = OrderedDict()
        self._num_turns = self._num_tokens = 0
        self._lock = Lock()

    def recall(self, turns: Sequence[Message], tools: Sequence[Tool] = ()) -> Recalled:
        """The conversation with the ids of all turns that are known; those that carry ids keep them."""
        key = _hash(b"", *(tool.definition for tool in tools))
        found = []
        for turn in turns:
            key = _after(key, turn)
            if turn.role == "assistant" and turn.ids is None:
                turn = self._find(key, turn) or turn
            found.append(turn)
        return Recalled(tuple(found), key)

    def remember(self, before: bytes, turn: Message, shown: str | None = None) -> None:
        """Keep a turn that was written after the conversation of a key; `shown` where a client saw another content."""
        key = _after(before, turn if shown is None else replace(turn, content=shown))
        with self._lock:
            known = self._turns.pop(key, ())
            # The first of equal turns stays: whoever went on from it finds the same tokens each time.
            if len(known) < ALIKE and all(other.ids != turn.ids for other in known):
                known = (*known, turn)
                self._num_turns += 1
                self._num_tokens += len(turn.ids or ())
            self._turns[key] = known
            while self._num_turns > self._most_turns or self._num_tokens > self._most_tokens:
                _, gone = self._turns.popitem(last=False)
                self._num_turns -= len(gone)
                self._num_tokens -= sum(len(other.ids or ()) for other in gone)

    def _find(self, key: bytes, turn: Message) -> Message | None:
        with self._lock:
            if key not in self._turns:
                return None
            self._turns.move_to_end(key)
            known = self._turns[key]
        # No thinking sent back may be any; one that was sent back must be the turn's own.
        return next((one for one in known if not turn.thinking or turn.thinking == one.thinking), None)


def _after(key: bytes, turn: Message) -> bytes:
    """The key of a conversation and one turn more. Thinking is no part of it: clients seldom send it back."""
    return _hash(key, turn.role, turn.content, *(call.text for call in turn.tool_calls))


def _hash(before: bytes, *texts: str) -> bytes:
    digest = hashlib.blake2b(before, digest_size=16)
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.digest()
