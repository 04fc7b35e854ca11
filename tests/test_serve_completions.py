"""Completions over HTTP with OpenAI's own client: texts and tokens that are continued as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types import Completion as Reply

from serve_cases import Server, serving, tiny_engine
from tiny import tiny_tokenizer
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams

TOKENIZER = tiny_tokenizer()
TEXTS = ["gcd of 12", "add 12 and 34"]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def truth() -> Engine:
    return tiny_engine()


def complete(server: Server, prompt: Any, **options: Any) -> Reply:
    settings = {"model": "tiny", "temperature": 0.0, **options}
    reply: Reply = server.client().completions.create(prompt=prompt, **settings)
    return reply


def streamed(server: Server, prompt: Any, count: int, **options: Any) -> list[str]:
    """The text of each choice of a stream."""
    texts = [""] * count
    for part in complete(server, prompt, stream=True, **options):
        for choice in part.choices:
            texts[choice.index] += choice.text
    return texts


@pytest.mark.parametrize("as_ids", [False, True])
def test_prompts_are_continued_as_the_engine_does(server: Server, truth: Engine, as_ids: bool) -> None:
    ids = [TOKENIZER.encode(text) for text in TEXTS]
    params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3, n=2)
    expected = [one.text for one in truth.generate(ids, params)]
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "n": 2}
    prompt: Any = ids if as_ids else TEXTS
    reply = complete(server, prompt, **options)
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert streamed(server, prompt, 4, **options) == expected
    assert reply.usage.prompt_tokens == sum(map(len, ids)) and reply.usage.completion_tokens == 48


def test_one_prompt_of_either_kind(server: Server) -> None:
    text = complete(server, TEXTS[0], max_tokens=5).choices[0].text
    assert complete(server, TOKENIZER.encode(TEXTS[0]), max_tokens=5).choices[0].text == text


def test_sixteen_tokens_where_nothing_is_said(server: Server) -> None:
    reply = complete(server, TEXTS[0])
    assert reply.usage.completion_tokens == 16 and reply.choices[0].finish_reason == "length"


def test_an_echo_stands_in_front(server: Server) -> None:
    text = complete(server, TEXTS[0], max_tokens=5).choices[0].text
    assert complete(server, TEXTS[0], max_tokens=5, echo=True).choices[0].text == TEXTS[0] + text
    assert streamed(server, TEXTS[0], 1, max_tokens=5, echo=True) == [TEXTS[0] + text]


def test_a_stop_string_is_not_shown(server: Server) -> None:
    text = complete(server, TEXTS[0], max_tokens=30, temperature=1.0, seed=1).choices[0].text
    stop = next(text[place : place + 2] for place in range(4, 20) if "\ufffd" not in text[place : place + 2])
    options: dict[str, Any] = {"max_tokens": 30, "temperature": 1.0, "seed": 1, "stop": stop}
    reply = complete(server, TEXTS[0], **options).choices[0]
    assert (reply.text, reply.finish_reason) == (text[: text.index(stop)], "stop")
    assert streamed(server, TEXTS[0], 1, **options) == [reply.text]


def test_logprobs_are_the_models_own(server: Server, truth: Engine) -> None:
    expected = truth.generate([TOKENIZER.encode(TEXTS[0])], SamplingParams(max_new_tokens=6, logprobs=2))[0]
    found = complete(server, TEXTS[0], max_tokens=6, logprobs=2).choices[0].logprobs
    assert found.token_logprobs == pytest.approx(expected.logprobs, abs=1e-5)
    best = [max(tops.values()) for tops in found.top_logprobs]
    assert best == pytest.approx([tops[0][1] for tops in expected.top_logprobs], abs=1e-5)


def test_usage_of_a_stream_is_that_of_the_whole(server: Server) -> None:
    options: dict[str, Any] = {"max_tokens": 4, "n": 2}
    parts = list(complete(server, TEXTS, stream=True, stream_options={"include_usage": True}, **options))
    whole = complete(server, TEXTS, **options).usage
    assert parts[-1].usage.total_tokens == whole.total_tokens and parts[-1].choices == []
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    running = [
        part.usage.total_tokens for part in complete(server, TEXTS, stream=True, stream_options=wanted, **options)
    ]
    assert running == sorted(running) and running[0] < running[-1] == running[-2] == whole.total_tokens


def test_a_beginning_that_was_read_is_not_read_again(server: Server) -> None:
    text = "12 and 18 " * 30
    first = complete(server, text, max_tokens=4)
    longer = complete(server, TOKENIZER.encode(text) + TOKENIZER.encode("6"), max_tokens=4)
    assert longer.usage.prompt_tokens_details.cached_tokens == first.usage.prompt_tokens


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"prompt": ""}, None),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, None),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": [10**6]}, None),
        ({"prompt": [-1]}, None),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 10**8}, "max_tokens"),
        ({"prompt": "a", "extra_body": {"tools": []}}, "tools"),
        ({"prompt": "a\ud800"}, None),
    ],
)
def test_what_cannot_be_honoured_is_a_400(server: Server, options: dict[str, Any], param: str | None) -> None:
    if isinstance(options["prompt"], str) and "\ud800" in options["prompt"]:
        reply = server.send("/v1/completions", b'{"prompt": "a\\ud800"}')
        assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
        return
    with pytest.raises(openai.BadRequestError) as refused:
        complete(server, **options)
    assert param is None or refused.value.param == param
