"""Records of kept conversations: a session, its turns, and what a turn cost. No disk and no HTTP here.

A turn that was written here carries its tokens, so that a session's tokens only grow. Two turns of the user's in a row
(the first one's answer never came) are read by the model as one.

>>> asked = Turn(Message("user", "2 plus 2?"), created=0.0), Turn(Message("user", "quick!"), created=1.0)
>>> messages_of(asked)
(Message(role='user', content='2 plus 2?\\n\\nquick!', thinking=None, ids=None, tool_calls=()),)
>>> title_of("What is the\\ngreatest common divisor?")
'What is the'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from turbos.common.records import Finish
from turbos.serve.conversation import BETWEEN
from turbos.serve.service import Usage
from turbos.text.messages import Message

LONGEST_TITLE = 200
"""Characters."""

SHOWN_TITLE = 48
"""Characters of a title that is made of the first question."""


@dataclass(frozen=True)
class Turn:
    """A message and when it was said; of an answer also why it ended (an error has its `detail`) and its tokens."""

    message: Message
    created: float
    finish: Finish | None = None
    detail: str = ""
    usage: Usage | None = None


@dataclass(frozen=True)
class Session:
    """What the list shows. The state on disk has read `saved_tokens`, of `saved_turns` (None: there is none)."""

    id: str
    title: str
    created: float
    updated: float
    num_turns: int = 0
    parent: str | None = None
    saved_tokens: int | None = None
    saved_turns: int | None = None


def messages_of(turns: Sequence[Turn]) -> tuple[Message, ...]:
    """The conversation as the model reads it."""
    found: list[Message] = []
    for turn in turns:
        message = turn.message
        if found and message.role == found[-1].role == "user":
            found[-1] = replace(message, content=f"{found[-1].content}{BETWEEN}{message.content}")
        else:
            found.append(message)
    return tuple(found)


def title_of(question: str) -> str:
    """A title for a session that was given none."""
    line = next(iter(question.strip().splitlines()), "").strip()
    return line if len(line) <= SHOWN_TITLE else f"{line[: SHOWN_TITLE - 1].rstrip()}…"
