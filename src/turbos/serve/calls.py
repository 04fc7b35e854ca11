"""Calls of tools by grammar: what an answer must look like where a call is required, and where a tool is strict.

A call is `<tool_call>`, a line of JSON, `</tool_call>` (`text/chat.py`), the arguments after the tool's own schema, in
the spelling in which they will be rendered again. The grammar is llguidance's dialect of Lark. Thinking comes before
it and is free.

>>> tool = CallableTool("add", {"type": "object", "properties": {"a": {"type": "integer"}}})
>>> print(call_grammar([tool], opening=9, closing=10, parallel=True).text.splitlines()[0])
start: call+
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from turbos.engine.sampling_params import Grammar
from turbos.serve.errors import ApiError
from turbos.serve.schema import ToolDefinition

SPELLING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Of JSON as `text.messages.canonical_json` writes it."""

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""The arguments of a tool that names none."""


@dataclass(frozen=True)
class CallableTool:
    """A tool's name and the JSON schema of its arguments."""

    name: str
    parameters: dict[str, Any]


def callable_of(place: int, definition: ToolDefinition) -> CallableTool:
    """A tool as the grammar needs it; ApiError where its arguments are no object."""
    schema = definition.function.parameters
    schema = NOTHING if schema is None else {"type": "object", **schema}
    if schema["type"] != "object":
        param = f"tools[{place}].function.parameters"
        raise ApiError(400, f"{param}: arguments are an object, the schema's type must be 'object'", param=param)
    return CallableTool(definition.function.name, {**schema, "x-guidance": SPELLING})


def call_grammar(
    tools: Sequence[CallableTool],
    opening: int,
    closing: int,
    parallel: bool,
    *,
    text: bool = False,
    answer: dict[str, Any] | None = None,
) -> Grammar:
    """Calls of these tools and nothing else, several if `parallel`; `opening` and `closing` are the tags' ids.

    `text`: an answer may be text, with calls or none after it. `answer`: it may be JSON of that schema instead.
    """
    calls = "call+" if parallel else "call"
    start = calls
    if answer is not None:
        start = f"answer | {calls}"
    elif text:
        start = f"TEXT ({calls})?"
    lines = [f"start: {start}", f'call: <[{opening}]> "\\n" body "\\n" <[{closing}]>']
    lines.append("body: " + " | ".join(f"body_{place}" for place in range(len(tools))))
    for place, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, "arguments": ')
        lines += [f'body_{place}: {head} args_{place} "}}"', f"args_{place}: %json {_schema(tool.parameters)}"]
    if answer is not None:
        lines.append(f"answer: %json {_schema(answer)}")
    if text:
        lines.append("TEXT: /(.|\\n)*/")
    return Grammar("lark", "\n".join(lines), frozenset({opening, closing}))


def _schema(schema: dict[str, Any]) -> str:
    """One line of JSON in ASCII: half a surrogate pair must not meet the grammar's reader."""
    try:
        return json.dumps(schema, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"tools: a schema that is no JSON ({error})", param="tools") from error
