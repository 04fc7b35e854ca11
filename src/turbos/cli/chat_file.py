"""Conversations in files: the messages as JSON, for people and programs; beside it the engine's state, for speed.

    talk.json          {"format": "turbos chat 1", "tokenizer": ..., "messages": [{"role": ..., ...}, ...]}
    talk.json.state    what `engine.snapshot` writes

The messages are what counts. Files may come from strangers: everything read is checked, and what a model wrote is taken
from its tokens, not from the text beside them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turbos.common.errors import UserError
from turbos.text.messages import Message, ToolCall, check_conversation
from turbos.text.parse import parse
from turbos.text.tokenizer import Tokenizer

FORMAT = "turbos chat 1"
LARGEST_FILE = 1 << 28
"""Bytes of a file of messages that is read at all."""


def state_path(path: Path) -> Path:
    """Where the engine's state of a conversation lies."""
    return path.with_name(f"{path.name}.state")


def save_messages(path: Path, messages: Sequence[Message], tokenizer: Tokenizer) -> None:
    """Write a conversation, whole or not at all; UserError where the disk refuses or the file is something else."""
    if path.exists():
        _read(path)
    # A line for each message: with lists of tokens, more lines would only be longer.
    lines = ",\n".join(json.dumps(_plain(message), ensure_ascii=False) for message in messages)
    text = f'{{"format": "{FORMAT}", "tokenizer": "{tokenizer.fingerprint}", "messages": [\n{lines}\n]}}\n'
    temporary = path.with_name(f".{path.name}.saving")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot save the conversation {path}: {error.strerror}; name another place") from error


def load_messages(path: Path, tokenizer: Tokenizer) -> tuple[Message, ...]:
    """Read a conversation; UserError, naming the file, for one that is broken or cannot be.

    Tokens of another tokenizer mean nothing here: then the texts count.
    """
    content = _read(path)
    is_own = content.get("tokenizer") == tokenizer.fingerprint
    try:
        messages = tuple(_message(fields, tokenizer, is_own) for fields in content["messages"])
        check_conversation(messages)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: the messages cannot be read ({type(error).__name__}: {error})") from error
    return messages


def _read(path: Path) -> dict[str, Any]:
    """The JSON object of a saved conversation."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"{path}: too large for a conversation; name a file that /save wrote")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a file that /save wrote") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no conversation ({error}); name a file that /save wrote") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: no conversation that this version can read; name a file that /save wrote")
    return content


def _plain(message: Message) -> dict[str, object]:
    calls = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
    fields = {
        "role": message.role,
        "content": message.content,
        "thinking": message.thinking,
        "ids": None if message.ids is None else list(message.ids),
        "tool_calls": calls or None,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _message(fields: Mapping[str, Any], tokenizer: Tokenizer, is_own: bool) -> Message:
    """One message; TypeError and the like for fields that are not what they should be."""
    ids = fields.get("ids")
    if ids is not None and is_own and fields["role"] == "assistant":
        return _generated(ids, tokenizer)
    thinking = fields.get("thinking")
    if not isinstance(fields["role"], str) or not isinstance(fields["content"], str):
        raise TypeError("role and content must be texts")
    if thinking is not None and not isinstance(thinking, str):
        raise TypeError("thinking must be a text")
    calls = tuple(ToolCall(call["name"], call["arguments"]) for call in fields.get("tool_calls", ()))
    return Message(fields["role"], fields["content"], thinking, None, calls)


def _generated(ids: Any, tokenizer: Tokenizer) -> Message:
    """A turn that a model wrote, from its tokens."""
    if not isinstance(ids, list) or not all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids):
        raise TypeError("ids must be a list of the tokenizer's tokens")
    if tokenizer.speaks_chat:
        return parse(tokenizer, ids)
    return Message("assistant", tokenizer.decode(ids), None, tuple(ids))
