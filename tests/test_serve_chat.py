"""Chats over HTTP with OpenAI's own client against a real server, and against what the engine says without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import openai
import pytest

from serve_cases import Server, serving, tiny_engine
from serve_chats import ASK, OFF, TAGS, TOKENIZER, TURNS, chat, chunks, finishes, summed
from turbos.common.records import Completion
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.text.chat import parse, prompt_ids, render
from turbos.text.messages import Message


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def truth() -> Engine:
    """An engine of the same model that no server drives."""
    return tiny_engine()


def answers(truth: Engine, thinking: str, params: SamplingParams, turns: Sequence[Message] = TURNS) -> list[Completion]:
    return truth.generate([prompt_ids(TOKENIZER, turns, thinking)], params)  # type: ignore[arg-type]


def body_of(completion: Completion, thinking: str) -> Message:
    """The turn that ids spell, with what the prompt had opened of it."""
    opened = {"off": [TAGS.think, TAGS.think_end], "on": [TAGS.think], "auto": []}[thinking]
    return parse(TOKENIZER, [*opened, *completion.ids])


# Plain answers


@pytest.mark.parametrize("thinking", ["off", "on", "auto"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_is_the_engines_own(server: Server, truth: Engine, thinking: str, temperature: float) -> None:
    params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=7)
    expected = body_of(answers(truth, thinking, params)[0], thinking)
    reply = chat(server, temperature=temperature, seed=7, extra_body={"thinking": thinking}).choices[0].message
    fields = reply.model_dump()
    assert (reply.content, fields.get("reasoning")) == (expected.content, expected.thinking)
    assert fields.get("reasoning_content") == fields.get("reasoning")


@pytest.mark.parametrize("thinking", ["off", "on"])
def test_a_stream_adds_up_to_the_whole_answer(server: Server, thinking: str) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "extra_body": {"thinking": thinking}}
    whole, parts = chat(server, **options), chunks(server, **options)
    message = whole.choices[0].message
    assert summed(parts, "content") == message.content
    assert (
        summed(parts, "reasoning")
        == summed(parts, "reasoning_content")
        == (message.model_dump().get("reasoning") or "")
    )
    assert finishes(parts) == {0: whole.choices[0].finish_reason}
    assert parts[0].choices[0].delta.role == "assistant"
    assert len({part.id for part in parts}) == 1 and all(part.usage is None for part in parts)


def test_thinking_that_was_never_opened_is_recast(server: Server) -> None:
    bias = {str(TAGS.think_end): 6.0}
    options: dict[str, Any] = {"temperature": 1.0, "logit_bias": bias, "extra_body": {}}
    for seed in range(20):
        message = chat(server, seed=seed, **options).choices[0].message
        if message.model_dump().get("reasoning"):
            break
    parts = chunks(server, seed=seed, **options)
    marks = [part.choices[0].delta.model_dump().get("recast") is True for part in parts]
    place = marks.index(True)
    assert summed(parts[:place], "content") == message.model_dump()["reasoning"]
    assert summed(parts[place:], "content") == message.content and sum(marks) == 1


def test_thinking_comes_before_content(server: Server) -> None:
    extra = {"thinking_budget": 6}
    parts = chunks(server, temperature=1.0, seed=1, max_tokens=30, extra_body=extra)
    kinds = [
        "reasoning" if choice.delta.model_dump().get("reasoning") else "content"
        for part in parts
        for choice in part.choices
        if choice.delta.content or choice.delta.model_dump().get("reasoning")
    ]
    assert kinds == sorted(kinds, reverse=True) and set(kinds) == {"reasoning", "content"}


def test_usage_counts_prompt_answer_and_thinking(server: Server) -> None:
    usage = chat(server, extra_body={"thinking_budget": 6}, max_tokens=30, temperature=1.0, seed=1).usage
    assert usage is not None and usage.completion_tokens_details is not None
    assert usage.prompt_tokens == len(prompt_ids(TOKENIZER, TURNS, "on"))
    assert usage.completion_tokens == 30 and usage.total_tokens == usage.prompt_tokens + 30
    assert usage.completion_tokens_details.reasoning_tokens == 6


def test_a_streams_usage_comes_last_where_it_is_asked_for(server: Server) -> None:
    parts = chunks(server, stream_options={"include_usage": True})
    assert [part.usage is not None for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].choices == [] and parts[-1].usage == chat(server).usage.model_copy(
        update={"prompt_tokens_details": parts[-1].usage.prompt_tokens_details}
    )


def test_each_chunk_counts_where_that_is_asked_for(server: Server) -> None:
    options: dict[str, Any] = {"n": 2, "max_tokens": 9, "temperature": 1.0, "seed": 1}
    wanted = {"include_usage": True, "continuous_usage_stats": True}
    parts = chunks(server, stream_options=wanted, extra_body={"ignore_eos": True, "thinking_budget": 3}, **options)
    counts = [part.usage.completion_tokens for part in parts]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == counts[-2] == 18 and len(set(counts)) > 5
    assert {part.usage.prompt_tokens for part in parts} == {len(prompt_ids(TOKENIZER, TURNS, "on"))}


def test_several_answers_are_as_if_each_were_alone(server: Server, truth: Engine) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=5, n=3)
    expected = [body_of(one, "off").content for one in answers(truth, "off", params)]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 5, "n": 3, "max_tokens": 12}
    reply, parts = chat(server, **options), chunks(server, **options)
    assert [choice.message.content for choice in reply.choices] == expected and len(set(expected)) == 3
    assert [summed(parts, "content", index) for index in range(3)] == expected
    assert reply.usage.completion_tokens == sum(len(one.ids) for one in answers(truth, "off", params))
    assert reply.usage.prompt_tokens == len(prompt_ids(TOKENIZER, TURNS, "off"))


def test_a_seed_repeats_and_no_seed_does_not(server: Server) -> None:
    def texts(**options: Any) -> set[str | None]:
        return {chat(server, temperature=1.0, max_tokens=16, **options).choices[0].message.content for _ in range(3)}

    assert len(texts(seed=11)) == 1 and len(texts()) == 3


def test_temperature_is_one_where_nothing_is_said(server: Server) -> None:
    client = server.client()
    settings: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 16, "seed": 2, "extra_body": OFF}
    said = client.chat.completions.create(**settings).choices[0].message.content
    assert said == client.chat.completions.create(temperature=1.0, **settings).choices[0].message.content
    assert said != client.chat.completions.create(temperature=0.0, **settings).choices[0].message.content


def test_logprobs_are_the_models_own(server: Server, truth: Engine) -> None:
    params = SamplingParams(max_new_tokens=10, temperature=0.7, seed=4, logprobs=3)
    expected = answers(truth, "off", params)[0]
    options: dict[str, Any] = {"temperature": 0.7, "seed": 4, "max_tokens": 10, "logprobs": True, "top_logprobs": 3}
    reply, parts = chat(server, **options), chunks(server, **options)
    streamed = [one for part in parts for choice in part.choices if choice.logprobs for one in choice.logprobs.content]
    whole = reply.choices[0].logprobs.content
    for found in (whole, streamed):
        assert [one.logprob for one in found] == pytest.approx(expected.logprobs, abs=1e-5)
        tops = [[top.logprob for top in one.top_logprobs] for one in found]
        assert tops == [pytest.approx([logprob for _, logprob in top], abs=1e-5) for top in expected.top_logprobs]
        assert bytes(byte for one in found for byte in one.bytes) == b"".join(map(TOKENIZER.token_bytes, expected.ids))


def test_a_stop_string_ends_an_answer_in_its_place(server: Server) -> None:
    text = chat(server, temperature=1.0, seed=8).choices[0].message.content or ""
    stop = next(text[place : place + 2] for place in range(5, 20) if "\ufffd" not in text[place : place + 2])
    options: dict[str, Any] = {"temperature": 1.0, "seed": 8, "stop": [stop, "never to be seen"]}
    reply, parts = chat(server, **options), chunks(server, **options)
    assert reply.choices[0].message.content == summed(parts, "content") == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop" and finishes(parts) == {0: "stop"}


def test_a_stop_string_does_not_end_thinking(server: Server) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "extra_body": {"thinking": "on"}}
    thought = chat(server, **options).choices[0].message.model_dump()["reasoning"]
    letter = next(letter for letter in thought if letter.isascii())
    assert chat(server, stop=letter, **options).choices[0].message.model_dump()["reasoning"] == thought


def test_a_banned_token_never_comes(server: Server) -> None:
    def first(**options: Any) -> str:
        reply = chat(server, max_tokens=1, logprobs=True, **options)
        return reply.choices[0].logprobs.content[0].token

    likeliest = TOKENIZER.encode(first())
    if len(likeliest) == 1:
        assert first(logit_bias={str(likeliest[0]): -1000.0}) != TOKENIZER.decode(likeliest)


# Thinking


@pytest.mark.parametrize(
    ("extra", "opened"),
    [
        ({}, []),
        ({"enable_thinking": True}, [TAGS.think]),
        ({"enable_thinking": False}, [TAGS.think, TAGS.think_end]),
        ({"reasoning_effort": "none"}, [TAGS.think, TAGS.think_end]),
        ({"reasoning_effort": "high"}, [TAGS.think]),
        ({"chat_template_kwargs": {"enable_thinking": False}}, [TAGS.think, TAGS.think_end]),
        ({"thinking_token_budget": 3}, [TAGS.think]),
    ],
)
def test_who_decides_on_thinking_shows_in_the_prompt(server: Server, extra: dict[str, Any], opened: list[int]) -> None:
    plain = len(render(TOKENIZER, TURNS).ids) + 1
    assert chat(server, extra_body=extra, max_tokens=1).usage.prompt_tokens == plain + len(opened)


@pytest.mark.parametrize(("switch", "count"), [("/think", 1), ("/no_think", 2)])
def test_a_soft_switch_is_understood(server: Server, switch: str, count: int) -> None:
    asked = f"gcd of 12 and 18? {switch}"
    expected = len(render(TOKENIZER, [Message("user", asked)]).ids) + 1 + count
    reply = chat(server, [{"role": "user", "content": asked}], extra_body={}, max_tokens=1)
    assert reply.usage.prompt_tokens == expected


def test_a_budget_of_thinking_is_kept(server: Server) -> None:
    for budget in (1, 5):
        details = chat(server, extra_body={"thinking_budget": budget}, max_tokens=40).usage.completion_tokens_details
        assert details.reasoning_tokens <= budget


# What the cache holds


@pytest.mark.parametrize("thinking", [{"thinking": "off"}, {"thinking_budget": 8}, {}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_text_that_was_sent_back_is_not_read_again(server: Server, thinking: dict[str, Any], stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": f"add 12 and 34 {thinking} {stream}"}]
    read = 0
    for seed in range(4):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "extra_body": thinking, "max_tokens": 20}
        if stream:
            parts = chunks(server, messages, stream_options={"include_usage": True}, **options)
            text, usage = summed(parts, "content"), parts[-1].usage
        else:
            reply = chat(server, messages, **options)
            text, usage = reply.choices[0].message.content or "", reply.usage
        # All but the last token of what was there: that one no step has read yet.
        assert usage.prompt_tokens_details.cached_tokens >= max(read - 1, 0)
        assert usage.prompt_tokens > usage.prompt_tokens_details.cached_tokens
        read = usage.prompt_tokens + usage.completion_tokens
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"and {seed}?"}]


def test_thinking_that_is_not_sent_back_stays_in_the_prompt(server: Server) -> None:
    first = chat(server, extra_body={"thinking_budget": 8}, max_tokens=20, temperature=1.0, seed=9)
    said = {"role": "assistant", "content": first.choices[0].message.content}
    second = chat(server, [*ASK, said, {"role": "user", "content": "and?"}], max_tokens=1, extra_body={})
    after = len(render(TOKENIZER, [Message("user", "and?")]).ids) + 1
    # The token that ends the turn, unless the model wrote it.
    ended = int(first.choices[0].finish_reason == "length")
    assert second.usage.prompt_tokens == first.usage.total_tokens + ended + after


def test_a_text_that_was_changed_is_read_as_it_is(server: Server) -> None:
    first = chat(server, max_tokens=20, temperature=1.0, seed=10)
    changed = "6 " + (first.choices[0].message.content or "")
    turns = [*TURNS, Message("assistant", changed), Message("user", "and?")]
    history = [*ASK, {"role": "assistant", "content": changed}, {"role": "user", "content": "and?"}]
    reply = chat(server, history, max_tokens=1)
    assert reply.usage.prompt_tokens == len(prompt_ids(TOKENIZER, turns, "off"))


def test_an_edited_conversation_reads_only_what_is_new(server: Server) -> None:
    long = "gcd of 12 and 18? " * 40
    history: list[Any] = [{"role": "system", "content": long}, {"role": "user", "content": "one"}]
    first = chat(server, history, max_tokens=8)
    system = len(render(TOKENIZER, [Message("system", long), Message("user", "x")]).ids) - 3
    edited = chat(server, [history[0], {"role": "user", "content": "two"}], max_tokens=8)
    assert first.usage.prompt_tokens > system
    assert edited.usage.prompt_tokens_details.cached_tokens == system


# Models


def test_models_and_health(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")
