"""Tools and formats over HTTP: what a grammar promises, and how calls and their results go to and fro."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from serve_cases import Server, serving
from serve_chats import ADD, ASK, NOP, OFF, TAGS, TOKENIZER, TURNS, chat, chunks, finishes, schema_format
from turbos.text.chat import prompt_ids
from turbos.text.messages import Tool


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


# Tools


def test_tools_stand_in_the_prompt_as_they_are_rendered(server: Server) -> None:
    tools = [Tool(json.dumps(ADD))]
    usage = chat(server, tools=[ADD], tool_choice="none", max_tokens=1).usage
    assert usage.prompt_tokens == len(prompt_ids(TOKENIZER, TURNS, "off", tools))


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_a_call_that_its_schema_allows(server: Server, seed: int) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "tools": [ADD, NOP], "tool_choice": "required"}
    options |= {"max_tokens": 400}
    reply, parts = chat(server, **options).choices[0], chunks(server, **options)
    calls = reply.message.tool_calls
    assert reply.finish_reason == "tool_calls" and calls and reply.message.content is None
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "add":
            assert arguments["a"] in (12, 34) and arguments == {"a": arguments["a"], "b": 6}
        else:
            assert (call.function.name, arguments) == ("nop", {})
    streamed = [call for part in parts for choice in part.choices for call in choice.delta.tool_calls or ()]
    assert [(one.index, one.function.name, one.function.arguments) for one in streamed] == [
        (index, call.function.name, call.function.arguments) for index, call in enumerate(calls)
    ]
    assert len({call.id for call in calls}) == len(calls) and finishes(parts) == {0: "tool_calls"}


def test_parallel_calls_are_several_unless_that_is_off(server: Server) -> None:
    # A model that goes on with another call whenever it may.
    eager: dict[str, Any] = {"logit_bias": {str(TAGS.call): 1000.0}, "max_tokens": 100, "tool_choice": "required"}
    assert len(chat(server, tools=[NOP], **eager).choices[0].message.tool_calls) == 2
    reply = chat(server, tools=[NOP], parallel_tool_calls=False, **eager).choices[0]
    assert len(reply.message.tool_calls) == 1 and reply.finish_reason == "tool_calls"


@pytest.mark.parametrize("thinking", [{"thinking": "off"}, {"thinking_budget": 4}])
def test_a_named_tool_is_called_once(server: Server, thinking: dict[str, Any]) -> None:
    choice = {"type": "function", "function": {"name": "add"}}
    reply = chat(server, tools=[NOP, ADD], tool_choice=choice, max_tokens=200, extra_body=thinking).choices[0]
    assert [call.function.name for call in reply.message.tool_calls or ()] == ["add"]
    assert ("reasoning" in reply.message.model_dump()) and reply.finish_reason == "tool_calls"


def test_no_call_comes_where_none_may(server: Server) -> None:
    bias = {str(TAGS.call): 1000.0}
    assert chat(server, tools=[ADD], logit_bias=bias, max_tokens=1, logprobs=True).choices[0].logprobs.content == []
    reply = chat(server, tools=[ADD], tool_choice="none", logit_bias=bias, max_tokens=3, logprobs=True)
    assert reply.choices[0].message.tool_calls is None and len(reply.choices[0].logprobs.content) == 3


def test_a_result_goes_on_from_the_call(server: Server) -> None:
    options: dict[str, Any] = {"tools": [ADD], "tool_choice": "required", "parallel_tool_calls": False}
    first = chat(server, max_tokens=200, **options)
    call = first.choices[0].message.tool_calls[0]
    told = {"role": "tool", "tool_call_id": call.id, "content": "18"}
    history = [*ASK, first.choices[0].message.model_dump(exclude_none=True), told]
    second = chat(server, history, tools=[ADD], max_tokens=2)
    read = first.usage.prompt_tokens + first.usage.completion_tokens
    assert second.usage.prompt_tokens_details.cached_tokens >= read - 1
    assert second.usage.prompt_tokens > read


# Formats


@pytest.mark.parametrize("thinking", [{"thinking": "off"}, {"thinking_budget": 3}])
def test_a_structured_answer_keeps_to_its_schema(server: Server, thinking: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"gcd": {"enum": [2, 3, 6]}, "word": {"enum": ["six", "two"]}},
        "required": ["gcd", "word"],
        "additionalProperties": False,
    }
    for seed in range(3):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 200, "extra_body": thinking}
        reply = chat(server, response_format=schema_format(schema), **options).choices[0]
        found = json.loads(reply.message.content or "")
        assert set(found) == {"gcd", "word"} and found["gcd"] in (2, 3, 6) and found["word"] in ("six", "two")
        assert reply.finish_reason == "stop"


def test_the_clients_own_parser_takes_a_structured_answer(server: Server) -> None:
    class Verdict(BaseModel):
        """One of two words."""

        right: bool

    reply = server.client().chat.completions.parse(
        model="tiny", messages=ASK, response_format=Verdict, max_tokens=200, temperature=0.0, extra_body=OFF
    )
    assert isinstance(reply.choices[0].message.parsed, Verdict)


def test_a_json_object_is_one_as_far_as_it_goes(server: Server) -> None:
    bias = {str(TOKENIZER.encode("}")[0]): 100.0}
    reply = chat(server, response_format={"type": "json_object"}, logit_bias=bias, max_tokens=64)
    assert json.loads(reply.choices[0].message.content or "") == {}
