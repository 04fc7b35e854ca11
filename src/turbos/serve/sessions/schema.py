"""What requests about sessions hold, and the JSON that answers them: pydantic at the edge, records within."""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from turbos.serve.schema import ChatOptions, Strict
from turbos.serve.service import Usage
from turbos.serve.sessions.records import LONGEST_TITLE, Session, Turn
from turbos.text.messages import surrogate

TEMPERATURE = 0.7
"""Where a message names none: these are conversations with people."""

MAX_TOKENS = 2048
LONGEST_CONTENT = 1 << 23
"""Characters of one message; the server's limits on bodies and tokens are mostly lower."""

MOST_SESSIONS = 1000
"""In one list."""


def _is_text(text: str) -> str:
    if surrogate(text) is not None:
        raise ValueError("half a surrogate pair is no text")
    return text


Title = Annotated[str, Field(max_length=LONGEST_TITLE), AfterValidator(_is_text)]
Content = Annotated[str, Field(min_length=1, max_length=LONGEST_CONTENT), AfterValidator(_is_text)]


class CreateBody(Strict):
    """A new session; without a title its first question gives one."""

    title: Title | None = None
    system: Content | None = Field(default=None, description="a system message, the first turn")


class RenameBody(Strict):
    """Another title."""

    title: Title


class ForkBody(Strict):
    """The new session has the turns before `turn`, all where none is named."""

    turn: int | None = Field(default=None, ge=0, lt=1 << 31)
    title: Title | None = None


class MessageBody(Strict):
    """A question and how to answer it; without content the last turn, if it has no answer, is answered."""

    content: Content | None = None
    thinking: str | None = Field(default=None, max_length=40, description="auto, on, off or budget N")
    max_tokens: int | None = Field(default=None, ge=1, lt=1 << 31, description="at most; less where memory ends before")
    temperature: float | None = Field(default=None, ge=0, le=1e6, description="0: the likeliest token; default 0.7")
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=1e-3, le=1e3)
    seed: int | None = Field(default=None, ge=0, lt=1 << 62)

    def options(self) -> ChatOptions:
        """The same as options of a chat. With `auto`, a `/think` or `/no_think` of the messages is heard."""
        given = self.model_dump(exclude={"content", "max_tokens"}, exclude_none=True)
        if self.thinking == "auto":
            del given["thinking"]
        return ChatOptions.model_validate({"temperature": TEMPERATURE, **given})


def session_json(session: Session) -> dict[str, Any]:
    """What lists show."""
    return {
        "id": session.id,
        "object": "session",
        "title": session.title,
        "created": session.created,
        "updated": session.updated,
        "turns_count": session.num_turns,
        "parent": session.parent,
        "saved": bool(session.num_turns) and session.saved_turns == session.num_turns,
        "saved_tokens": session.saved_tokens,
        "saved_turns": session.saved_turns,
    }


def turn_json(number: int, turn: Turn, html: str | None) -> dict[str, Any]:
    """One turn; `html` is an answer's content, where it is rendered."""
    message, usage = turn.message, turn.usage
    calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls]
    return {
        "index": number,
        "role": message.role,
        "content": message.content,
        "html": html,
        "thinking": message.thinking,
        "thinking_tokens": 0 if usage is None else usage.reasoning,
        "tool_calls": calls,
        "created": turn.created,
        "finish": turn.finish,
        "detail": turn.detail,
        "usage": None if usage is None else usage_json(usage),
    }


def usage_json(usage: Usage) -> dict[str, int]:
    """Tokens of an answer."""
    return {
        "prompt_tokens": usage.prompt,
        "cached_tokens": usage.cached,
        "completion_tokens": usage.completion,
        "reasoning_tokens": usage.reasoning,
    }
