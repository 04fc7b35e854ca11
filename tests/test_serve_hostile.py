"""Requests that would cost a server far more than they cost their sender, and small print that clients rely on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from serve_cases import PATIENCE, Server, serving
from serve_chats import ASK, TAGS, TOKENIZER, chat
from turbos.serve.conversation import turns_of
from turbos.serve.limits import ServeOptions
from turbos.serve.schema import ChatMessage, ChatRequest, CompletionRequest
from turbos.text.messages import Message

CHAT = "/v1/chat/completions"
MANY = 50_000
EOS = TOKENIZER.special("<|end|>")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [0] * MANY}),
        (ChatRequest, {"messages": ASK, **{f"a{place}": 0 for place in range(MANY)}}),
        (ChatRequest, {"messages": ASK, "metadata": {str(place): 0 for place in range(MANY)}}),
        (ChatRequest, {"messages": ASK, "logit_bias": {str(place): "x" for place in range(MANY)}}),
        (ChatRequest, {"messages": ASK, "stop": [0] * MANY}),
        (ChatRequest, {"messages": ASK, "modalities": [0] * MANY}),
        (ChatRequest, {"messages": [{"role": "user", "content": [0] * MANY}]}),
        (ChatRequest, {"messages": ASK, "tools": [0] * MANY}),
        (CompletionRequest, {"prompt": ["a", *[0] * MANY]}),
        (CompletionRequest, {"prompt": [[0.5] * MANY]}),
    ],
)
def test_a_body_of_mistakes_is_complained_of_a_few_times_only(
    kind: type[ChatRequest] | type[CompletionRequest], body: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    assert found.value.error_count() < 10


def test_a_mistake_behind_many_good_entries_is_still_named(server: Server) -> None:
    reply = server.post(CHAT, {"messages": [*ASK, {"role": "king", "content": "x"}, 0]})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "messages[1].role"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_many_messages_in_a_row_are_joined_in_linear_time() -> None:
    messages = [ChatMessage.model_validate({"role": "user", "content": "ab" * 200})] * 8000
    assert turns_of(messages) == (Message("user", "\n\n".join(["ab" * 200] * 8000)),)
    few = min(seconds(lambda: turns_of(messages[:1000])) for _ in range(3))
    # A copy of all before for each of them took over 300 times as long.
    assert min(seconds(lambda: turns_of(messages)) for _ in range(3)) < 60 * few


@pytest.mark.parametrize(
    "body",
    [
        {"messages": ASK, "tools": [{"type": "function", "function": {"name": "f", "description": "gcd " * 9000}}]},
        {
            "messages": [
                *ASK,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": json.dumps({"a": "b " * 9000})}}],
                },
                {"role": "tool", "tool_call_id": "a", "content": "6"},
            ]
        },
        {"messages": [*ASK, {"role": "assistant", "content": "6", "reasoning": "gcd " * 9000}, *ASK]},
    ],
)
def test_no_part_of_a_prompt_that_is_far_too_long_is_encoded_to_its_end(body: dict[str, Any]) -> None:
    with serving(options=ServeOptions(max_prompt_tokens=200)) as small:
        error = small.post(CHAT, body).json()["error"]
    assert error["code"] == "context_length_exceeded" and "the prompt has more than" in error["message"]


def test_more_prompts_than_may_be_open_are_no_matter_of_waiting() -> None:
    with serving(options=ServeOptions(max_open=2)) as small:
        reply = small.post("/v1/completions", {"prompt": ["a", "b", "c"], "max_tokens": 1})
        assert reply.status_code == 400 and "between 1 and 2 answers" in reply.json()["error"]["message"]
        assert small.post("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 1}).status_code == 200


def test_a_client_that_hangs_up_leaves_no_trace_in_the_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": ASK, "max_tokens": 900, "ignore_eos": True}
    with caplog.at_level(logging.INFO):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}{CHAT}", json=body, timeout=0.2)
        assert server.wait_idle(PATIENCE)
        time.sleep(0.2)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert 'status="0"' in httpx.get(f"{server.url}/metrics").text


def test_the_servers_own_fault_is_counted_as_one(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(server.service.turns, "recall", fails)
    assert server.post(CHAT, {"messages": ASK}).status_code == 500
    monkeypatch.undo()
    line = f'turbos_requests_total{{method="POST",route="{CHAT}",status="500"}} 1'
    assert line in httpx.get(f"{server.url}/metrics").text


def test_tokens_of_thinking_that_was_recast_are_not_the_contents(server: Server) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "logit_bias": {str(TAGS.think_end): 6.0}, "extra_body": {}}
    for seed in range(20):
        choice = chat(server, seed=seed, logprobs=True, **options).choices[0]
        if choice.message.model_dump().get("reasoning"):
            break
    shown = b"".join(bytes(token.bytes or ()) for token in choice.logprobs.content)
    assert choice.message.model_dump()["reasoning"] and shown.decode(errors="replace") == choice.message.content


@pytest.mark.parametrize("seed", range(4))
def test_offsets_of_tokens_are_places_in_the_text(server: Server, seed: int) -> None:
    body = {"prompt": "gcd of", "max_tokens": 40, "logprobs": 0, "temperature": 1.0, "seed": seed, "ignore_eos": True}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    for offset, token in zip(offsets, tokens, strict=True):
        assert token.startswith("bytes:") or choice["text"][offset : offset + len(token)] == token
    streamed: list[int] = []
    for line in server.post("/v1/completions", {**body, "stream": True}).text.splitlines():
        if line.startswith("data: {"):
            (part,) = json.loads(line.removeprefix("data: "))["choices"]
            streamed += part["logprobs"]["text_offset"] if part["logprobs"] else []
    assert streamed == offsets == sorted(offsets)


def test_an_answer_does_not_end_in_thinking_while_its_format_is_owed(server: Server) -> None:
    # The model would end at once, but for the format.
    bias = {str(EOS): 1000.0}
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [6]}}}
    extra = {"thinking_budget": 5}
    message = chat(server, response_format=schema, logit_bias=bias, extra_body=extra).choices[0].message
    assert message.content == "6"
    free = chat(server, logit_bias=bias, extra_body=extra).choices[0]
    assert free.message.content == "" and free.finish_reason == "stop"


def test_a_conversation_of_too_many_messages_is_refused_at_once(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": "a"}] * 200_000}
    refused = server.post("/v1/chat/completions", body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "messages"
    assert "20000" in refused.json()["error"]["message"]
