"""Records of a conversation, and what is refused in one: every refusal says which message and which part.

A conversation is an optional list of tools, an optional system message, then turns: the user speaks, the assistant
answers or calls tools, the tools answer. JSON is kept as canonical text, so that equal calls are equal records.
How records become tokens is `chat.py`'s matter.

>>> ToolCall("add", '{"a":1,  "b": 2}').arguments
'{"a": 1, "b": 2}'
>>> check_conversation([Message("user", "hello"), Message("user", "again")])
Traceback (most recent call last):
turbos.text.messages.ChatError: message 1, role: a user turn cannot follow a user turn; join the two
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from turbos.common.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

MAX_DEPTH = 64
DEEP = f"nested deeper than {MAX_DEPTH}"

ErrorKind = Literal["role", "order", "empty", "field", "json", "surrogate", "tag", "ids"]


class ChatError(UserError):
    """A conversation that cannot be: `kind` of mistake, number of the `message` (None: the tools), and the `part`.

    `at` is the place inside the part: a character of a text, or a token of ids; None where the whole part is wrong.
    """

    def __init__(self, kind: ErrorKind, message: int | None, part: str, what: str, at: int | None = None) -> None:
        self.kind, self.message, self.part, self.what, self.at = kind, message, part, what, at
        place = part if message is None else f"message {message}, {part}"
        super().__init__(f"{place}{'' if at is None else f' at {at}'}: {what}")

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is pickled by its one line otherwise, and could not come back from a worker.
        return type(self), (self.kind, self.message, self.part, self.what, self.at)


class _NotJSON(ValueError):
    """Why a text is no JSON object that may be written into a conversation."""


def canonical_json(value: Mapping[str, Any] | str) -> str:
    """A JSON object in one spelling: order of keys kept, `", "` and `": "` between, no escapes of letters.

    ValueError for text that is no JSON object, names a key twice, holds a number that JSON has not (NaN, 1e999), half
    a surrogate pair, or is nested too deep: two programs would read those differently, or not at all.
    """
    try:
        found = _loads(value) if isinstance(value, str) else value
        if not isinstance(found, Mapping):
            raise _NotJSON("an object is wanted")
        if _too_deep(found):
            raise _NotJSON(DEEP)
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise _NotJSON(DEEP) from error
    except TypeError as error:
        raise _NotJSON(str(error)) from error
    if surrogate(text) is not None:
        raise _NotJSON("half a surrogate pair")
    return text


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)


def _too_deep(value: object) -> bool:
    """Whether objects and lists lie more than MAX_DEPTH deep; Python's own limit depends on who calls."""
    layer = [value]
    for _ in range(MAX_DEPTH + 1):
        layer = [
            child
            for holder in layer
            if isinstance(holder, Mapping | list)
            for child in (holder.values() if isinstance(holder, Mapping) else holder)
        ]
        if not layer:
            return False
    return True


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _NotJSON("a key is named twice")
    return found


def _no_constant(name: str) -> Any:
    raise _NotJSON(f"{name} is no JSON")


def surrogate(text: str) -> int | None:
    """Place of the first lone surrogate of a text, which no UTF-8 can hold; None where there is none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its name, and its arguments as the text of a JSON object (made canonical here).

    UserError where the arguments are no JSON object; `read_call` reads what a model wrote.
    """

    name: str
    arguments: str = "{}"

    def __post_init__(self) -> None:
        if not self.name:
            raise ChatError("empty", None, "tool call", "a call needs the name of a tool")
        try:
            object.__setattr__(self, "arguments", canonical_json(self.arguments))
        except ValueError as error:
            raise ChatError("json", None, f"arguments of a call of {self.name!r}", f"broken JSON ({error})") from error

    @property
    def text(self) -> str:
        """The JSON object between the call's tags, as the Hermes and Qwen convention writes it."""
        return f'{{"name": {json.dumps(self.name, ensure_ascii=False)}, "arguments": {self.arguments}}}'


def read_call(text: str) -> ToolCall:
    """The call that a text between tags spells; ValueError saying why where it spells none."""
    call = json.loads(canonical_json(text))
    if set(call) != {"name", "arguments"}:
        raise _NotJSON("an object with name and arguments, and nothing else, is wanted")
    if not isinstance(call["name"], str) or not call["name"] or not isinstance(call["arguments"], dict):
        raise _NotJSON("name must be text, and arguments an object")
    return ToolCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False))


@dataclass(frozen=True)
class Tool:
    """A tool that the assistant may call: its definition as OpenAI's interface writes it, canonical JSON.

    >>> Tool('{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}').name
    'add'
    """

    definition: str

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "definition", canonical_json(self.definition))
        except ValueError as error:
            raise ChatError("json", None, "tool", f"broken JSON ({error})") from error
        function = json.loads(self.definition).get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ChatError("field", None, "tool", 'write {"type": "function", "function": {"name": ...}}')

    @property
    def name(self) -> str:
        """What calls name."""
        name: str = json.loads(self.definition)["function"]["name"]
        return name


@dataclass(frozen=True)
class Message:
    """One turn. `thinking` is the assistant's only: None (no tags) differs from "" (empty tags).

    `ids` are the tokens of a generated assistant turn, all that stands between `<|assistant|>` and `<|end|>`; where
    they are given they are rendered verbatim, and content, thinking and calls are only for reading. A "tool" turn
    holds one result; results answer the calls before them in order.
    """

    role: str
    content: str
    thinking: str | None = None
    ids: tuple[int, ...] | None = None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Conversation:
    """Messages, and the tools that were offered before them."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()


def check_conversation(messages: Sequence[Message]) -> None:
    """ChatError for a message that cannot be or cannot stand where it stands."""
    previous, open_calls = "start", 0
    for place, message in enumerate(messages):
        _check_order(place, message.role, previous, open_calls)
        _check_message(place, message)
        if message.role != "tool":
            open_calls = len(message.tool_calls)
        else:
            open_calls -= 1
        previous = message.role


def check_prompt(messages: Sequence[Message]) -> None:
    """ChatError where the assistant cannot be asked to go on: only after a user's turn or a tool's result."""
    if not messages or messages[-1].role not in ("user", "tool"):
        what = f"after a {messages[-1].role} turn" if messages else "without a turn"
        raise ChatError("order", len(messages), "role", f"the assistant cannot be asked to answer {what}")


FOLLOWS = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant", "user"),
}
"""Roles that may come after a role."""


def _check_order(place: int, role: str, previous: str, open_calls: int) -> None:
    if role not in ROLES:
        raise ChatError("role", place, "role", f"unknown role {role!r}: use one of {', '.join(ROLES)}")
    if role == "system" and place:
        raise ChatError("order", place, "role", "a system message can only be the first message")
    if role not in FOLLOWS[previous]:
        where = "cannot come first" if previous == "start" else f"cannot follow a {previous} turn"
        mend = "; join the two" if role == previous else ""
        raise ChatError("order", place, "role", f"a {role} turn {where}{mend}")
    if role == "tool" and open_calls < 1:
        raise ChatError("order", place, "role", "a tool's result without a call that it answers")


def _check_message(place: int, message: Message) -> None:
    """Fields that the role may have, texts that are texts, and something said at all."""
    if message.role != "assistant":
        if message.thinking is not None or message.ids is not None or message.tool_calls:
            what = f"a {message.role} turn cannot carry thinking, calls or generated ids: only the assistant's can"
            raise ChatError("field", place, "role", what)
        if not message.content and message.role != "tool":
            raise ChatError("empty", place, "content", f"a {message.role} turn must say something")
    elif not (message.content or message.tool_calls) and message.thinking is None and message.ids is None:
        raise ChatError("empty", place, "content", "an assistant turn needs content, thinking or a call")
    _check_text(place, "content", message.content)
    if message.thinking is not None:
        _check_text(place, "thinking", message.thinking)
    for number, call in enumerate(message.tool_calls):
        _check_text(place, f"tool_calls[{number}].name", call.name)


def _check_text(place: int, part: str, text: str) -> None:
    if not isinstance(text, str):
        raise ChatError("field", place, part, f"text is wanted, not {type(text).__name__}")
    at = surrogate(text)
    if at is not None:
        raise ChatError("surrogate", place, part, f"half a surrogate pair (U+{ord(text[at]):04X}) is no text", at)
