"""Chat requests that cannot be honoured: each a 400 in OpenAI's shape that names the option."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from serve_cases import Server, serving
from serve_chats import ADD, ASK, OFF, TOKENIZER, chat, schema_format


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def refusal(server: Server, **options: Any) -> dict[str, Any]:
    """The error of a request that is a 400."""
    settings = {"model": "tiny", "messages": ASK, "max_tokens": 4, **options}
    with pytest.raises(openai.BadRequestError) as refused:
        server.client().chat.completions.create(**settings)
    assert refused.value.status_code == 400
    error: dict[str, Any] = refused.value.body  # type: ignore[assignment]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    return error


# Refusals


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logit_bias": {"x": 1.0}}, "logit_bias"),
        ({"logit_bias": {"100000": 1.0}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [ADD, ADD]}, "tools"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": schema_format({"type": "nothing"})}, None),
        ({"response_format": schema_format({}), "stop": "x"}, None),
        ({"service_tier": "flex"}, "service_tier"),
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities[0]"),
        ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
        ({"functions": [{"name": "add"}]}, "functions"),
        ({"messages": [{"role": "assistant", "content": "6"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0]"),
        ({"messages": [*ASK, {"role": "system", "content": "late"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"extra_body": {"thinking": "hard"}}, None),
        ({"extra_body": {"reasoning_effort": "huge"}}, "reasoning_effort"),
        ({"extra_body": {"min_tokens": 5}}, "min_tokens"),
        ({"extra_body": {"thinking_budget": -1}}, "thinking_budget"),
        ({"extra_body": {"thinking_budget": 1, "thinking_token_budget": 2}}, "thinking_budget"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400_that_names_it(
    server: Server, options: dict[str, Any], param: str | None, stream: bool
) -> None:
    if stream and "stream_options" in options:
        return
    error = refusal(server, stream=stream, **options)
    if param is not None:
        assert error["param"] == param
        assert param.split("[")[0] in error["message"]


def test_a_count_in_each_chunk_needs_one_at_the_end(server: Server) -> None:
    error = refusal(server, stream=True, stream_options={"continuous_usage_stats": True})
    assert error["param"] == "stream_options.continuous_usage_stats"


def test_an_unknown_model_is_a_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        chat(server, model="gpt-4o")
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


def test_a_prompt_that_does_not_fit_is_refused_and_named(server: Server) -> None:
    longest = server.service.engine.longest
    assert longest is not None
    error = refusal(server, messages=[{"role": "user", "content": "ab" * longest}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(longest - 1) in error["message"]


def test_an_answer_that_cannot_go_on_says_so(server: Server) -> None:
    # JSON of nothing but a brace, which the bias forbids.
    options: dict[str, Any] = {"response_format": {"type": "json_object"}, "max_tokens": 3}
    options["logit_bias"] = {str(id): -math.inf for id in range(TOKENIZER.vocab_size)}
    body = json.dumps({"messages": ASK, **options, **OFF})
    for stream in ("false", "true"):
        content = body[:-1] + f', "stream": {stream}}}'
        reply = server.send("/v1/chat/completions", content.encode())
        error = json.loads(reply.text.split("data: ")[-1])["error"] if stream == "true" else reply.json()["error"]
        assert error["type"] == "invalid_request_error" and error["code"] == "no_token_allowed"
        assert reply.status_code == (200 if stream == "true" else 400)
