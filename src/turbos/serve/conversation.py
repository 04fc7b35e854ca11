"""From a request's messages and tools to the records of a conversation, in the one order that chats here have.

What clients write more freely is brought into that order where nothing is lost: system and developer messages at the
beginning are joined, so are user messages in a row, and results of tools are put in the order of their calls. What has
no place (a system message later on, a result without its call, pictures) is a 400 that names the message.

>>> from turbos.serve.schema import ChatMessage
>>> turns_of([ChatMessage(role="user", content="2 plus 2?"), ChatMessage(role="user", content="quick!")])
(Message(role='user', content='2 plus 2?\\n\\nquick!', thinking=None, ids=None, tool_calls=()),)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from turbos.serve.errors import ApiError, of_chat_error
from turbos.serve.schema import ChatMessage, SentCall, ToolDefinition
from turbos.text.messages import ChatError, Message, Tool, ToolCall, check_conversation, check_prompt

BETWEEN = "\n\n"
"""What stands between messages that are joined."""


def turns_of(messages: Sequence[ChatMessage]) -> tuple[Message, ...]:
    """The turns that messages say; ApiError, naming the message, for what cannot be one."""
    turns: list[_Placed] = []
    results: list[tuple[int, ChatMessage]] = []
    calls: Sequence[SentCall] = ()
    for place, message in enumerate(messages):
        _check_fields(place, message)
        if message.role == "tool":
            results.append((place, message))
            continue
        turns += _results(results, calls)
        results, calls = [], message.tool_calls or ()
        turns.append(_Placed(place, _turn(place, message)))
    turns = _joined([*turns, *_results(results, calls)])
    found = tuple(turn.turn for turn in turns)
    try:
        check_conversation(found)
        check_prompt(found)
    except ChatError as error:
        at = error.message
        place = turns[at].place if at is not None and at < len(turns) else len(messages) - 1
        raise of_chat_error(error, place) from error
    return found


class _Placed(NamedTuple):
    """A turn, and the number of the message that it begins with."""

    place: int
    turn: Message


def tools_of(definitions: Sequence[ToolDefinition]) -> tuple[Tool, ...]:
    """The tools of a request. ApiError for two of one name."""
    names = [definition.function.name for definition in definitions]
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ApiError(400, f"tools: two are named {twice!r}", param="tools")
    plain = [definition.model_dump(exclude_none=True, exclude={"function": {"strict"}}) for definition in definitions]
    return tuple(_tool(place, one) for place, one in enumerate(plain))


def _tool(place: int, definition: dict[str, Any]) -> Tool:
    try:
        return Tool(json.dumps(definition, ensure_ascii=False))
    except (ChatError, RecursionError) as error:
        what = error.what if isinstance(error, ChatError) else "nested too deep"
        raise ApiError(400, f"tools[{place}]: {what}", param=f"tools[{place}]") from error


def _joined(turns: Sequence[_Placed]) -> list[_Placed]:
    """Turns of the user's, or of the system's, that go on with the one before as one."""
    found: list[_Placed] = []
    for role, neighbours in groupby(turns, key=lambda one: one.turn.role):
        alike = list(neighbours)
        if role in ("system", "user") and len(alike) > 1:
            joined = BETWEEN.join(text for _, turn in alike if (text := turn.content))
            alike = [_Placed(alike[0].place, Message(role, joined))]
        found += alike
    return found


def _turn(place: int, message: ChatMessage) -> Message:
    content = _text(message)
    if message.role != "assistant":
        return Message("system" if message.role == "developer" else message.role, content)
    thinking = message.reasoning if message.reasoning is not None else message.reasoning_content
    calls = tuple(_call(place, number, call) for number, call in enumerate(message.tool_calls or ()))
    # A turn that says nothing at all is what a model wrote that ended at once.
    empty = not content and not calls and thinking is None
    return Message("assistant", content, "" if empty else thinking, None, calls)


def _text(message: ChatMessage) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    return "".join(part.text for part in message.content)


def _call(place: int, number: int, call: SentCall) -> ToolCall:
    param = f"messages[{place}].tool_calls[{number}].function.arguments"
    try:
        return ToolCall(call.function.name, call.function.arguments or "{}")
    except ChatError as error:
        raise ApiError(400, f"{param}: {error.what}", param=param) from error


def _check_fields(place: int, message: ChatMessage) -> None:
    """ApiError for a field that the role has not; silence would lose what it says."""
    only = {
        "tool_calls": "assistant",
        "reasoning": "assistant",
        "reasoning_content": "assistant",
        "tool_call_id": "tool",
    }
    given = {
        "tool_calls": message.tool_calls,
        "reasoning": message.reasoning,
        "reasoning_content": message.reasoning_content,
        "tool_call_id": message.tool_call_id,
    }
    for name, role in only.items():
        if given[name] and message.role != role:
            param = f"messages[{place}].{name}"
            raise ApiError(400, f"{param}: only a message of the {role} has it", param=param)
    if message.role == "tool" and not message.tool_call_id:
        param = f"messages[{place}].tool_call_id"
        raise ApiError(400, f"{param}: name the call that this result answers", param=param)


def _results(results: Sequence[tuple[int, ChatMessage]], calls: Sequence[SentCall]) -> list[_Placed]:
    """Results in the order of their calls."""
    ids = [call.id for call in calls]
    found: dict[int, _Placed] = {}
    for place, message in results:
        at = next((at for at, id in enumerate(ids) if id == message.tool_call_id and at not in found), None)
        if at is None:
            param = f"messages[{place}].tool_call_id"
            raise ApiError(400, f"{param}: no call before it has this id, or it was answered", param=param)
        found[at] = _Placed(place, Message("tool", _text(message)))
    missing = next((at for at in range(len(found)) if at not in found), None)
    if missing is not None:
        param = f"messages[{results[0][0]}]"
        raise ApiError(400, f"{param}: call {ids[missing]!r} was not answered, but a later one was", param=param)
    return [found[at] for at in sorted(found)]
