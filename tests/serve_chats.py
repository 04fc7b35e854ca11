"""What tests of chats over HTTP share: a question, two tools, and the real client's calls.

Not a test file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve_cases import Server
from tiny import tiny_tokenizer
from turbos.text.messages import Message
from turbos.text.parse import chat_tokens

TOKENIZER = tiny_tokenizer()
TAGS = chat_tokens(TOKENIZER)
ASK = [{"role": "user", "content": "gcd of 12 and 18?"}]
TURNS = [Message("user", "gcd of 12 and 18?")]
OFF = {"thinking": "off"}
"""A random model opens no thinking that it closes; where the answer matters, it is off."""

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds two numbers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [12, 34]}, "b": {"enum": [6]}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
NOP = {"type": "function", "function": {"name": "nop"}}


def chat(server: Server, messages: Sequence[Any] = ASK, **options: Any) -> ChatCompletion:
    settings = {"model": "tiny", "temperature": 0.0, "max_tokens": 24, "extra_body": OFF, **options}
    reply: ChatCompletion = server.client().chat.completions.create(messages=list(messages), **settings)
    return reply


def chunks(server: Server, messages: Sequence[Any] = ASK, **options: Any) -> list[ChatCompletionChunk]:
    settings = {"model": "tiny", "temperature": 0.0, "max_tokens": 24, "extra_body": OFF, **options}
    return list(server.client().chat.completions.create(messages=list(messages), stream=True, **settings))


def summed(parts: Sequence[ChatCompletionChunk], field: str, index: int = 0) -> str:
    """All of a field of a stream's deltas."""
    choices = [choice for part in parts for choice in part.choices if choice.index == index]
    return "".join(getattr(choice.delta, field, None) or "" for choice in choices)


def finishes(parts: Sequence[ChatCompletionChunk]) -> dict[int, str]:
    return {choice.index: choice.finish_reason for part in parts for choice in part.choices if choice.finish_reason}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
