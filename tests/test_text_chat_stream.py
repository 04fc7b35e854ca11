"""The streaming parser: however the tokens are cut, its deltas add up to what the whole parser reads."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chats import TOKENIZER, assistants, drawn_ids, special, wild
from turbos.text.chat import parse, prompt_ids, render
from turbos.text.messages import Message, ToolCall
from turbos.text.stream import ContentDelta, Delta, ReasoningDelta, RecastDelta, ToolCallDelta, TurnStream, fold

USER = Message("user", "fox?")
CALL = [*special("<tool_call>"), *TOKENIZER.encode('{"name": "add", "arguments": {}}'), *special("</tool_call>")]


def streamed(parts: list[list[int]], prompt: list[int] | None = None) -> tuple[list[Delta], Message]:
    """All deltas of a turn that came in parts, and its message."""
    stream = TurnStream(TOKENIZER, prompt or ())
    deltas = [delta for part in parts for delta in stream.feed(part)] + stream.finish()
    return deltas, stream.message()


@settings(max_examples=400, deadline=None)
@given(drawn_ids(max_size=14))
@example([*CALL, *TOKENIZER.encode("a \n"), *CALL, *TOKENIZER.encode("\n \n"), *CALL])
@example([*TOKENIZER.encode("a"), *special("</think>", "</think>"), *TOKENIZER.encode("b")])
def test_every_split_adds_up_to_the_whole(ids: list[int]) -> None:
    whole = parse(TOKENIZER, ids)
    one_by_one, message = streamed([[id] for id in ids])
    assert message == whole
    for cut in range(len(ids) + 1):
        deltas, message = streamed([ids[:cut], ids[cut:]])
        assert message == whole
        assert fold(deltas, whole.ids) == whole
        assert text_of(deltas) == text_of(one_by_one)


def text_of(deltas: list[Delta]) -> list[object]:
    """Deltas with neighbours of one kind joined."""
    found: list[object] = []
    for delta in deltas:
        same = isinstance(delta, ReasoningDelta | ContentDelta) and found and type(found[-1]) is type(delta)
        if same:
            found[-1] = type(delta)(found[-1].text + delta.text)  # type: ignore[attr-defined, union-attr]
        else:
            found.append(delta)
    return found


@settings(deadline=None)
@given(assistants(wild), st.integers(1, 9))
def test_rendered_turns_stream_back_exactly(turn: Message, size: int) -> None:
    head = len(prompt_ids(TOKENIZER, [USER]))
    ids = list(render(TOKENIZER, [USER, turn]).ids[head:])
    deltas, message = streamed([ids[start : start + size] for start in range(0, len(ids), size)])
    assert (message.thinking, message.content, message.tool_calls) == (turn.thinking, turn.content, turn.tool_calls)
    assert [delta.index for delta in deltas if isinstance(delta, ToolCallDelta)] == list(range(len(turn.tool_calls)))
    assert not any(isinstance(delta, RecastDelta) for delta in deltas)


def test_text_is_given_as_soon_as_it_is_whole() -> None:
    stream = TurnStream(TOKENIZER)
    assert stream.feed(special("<think>")) == [ReasoningDelta("")]
    assert [stream.feed([id]) for id in TOKENIZER.encode("é")][-1] == [ReasoningDelta("é")]
    assert stream.feed(special("</think>")) == []
    assert stream.feed(TOKENIZER.encode("fox")) == [ContentDelta("fox")]
    assert stream.feed(CALL[:-1]) == []
    assert stream.feed(CALL[-1:]) == [ToolCallDelta(0, ToolCall("add"))]
    assert stream.feed([*special("<|end|>"), *TOKENIZER.encode("fox")]) == [] and stream.ended
    assert stream.finish() == [] and stream.feed(TOKENIZER.encode("fox")) == []


def test_a_character_in_several_tokens_is_held_back() -> None:
    ids = TOKENIZER.encode("😀")
    assert len(ids) > 1
    stream = TurnStream(TOKENIZER)
    assert [stream.feed([id]) for id in ids] == [[]] * (len(ids) - 1) + [[ContentDelta("😀")]]
    broken = TurnStream(TOKENIZER)
    assert broken.feed(ids[:-1]) == [] and broken.finish() == [ContentDelta(TOKENIZER.decode(ids[:-1]))]


@pytest.mark.parametrize(("mode", "thinking"), [("on", "fox"), ("off", ""), ("auto", None)])
def test_the_prompt_says_whether_thinking_is_open(mode, thinking: str | None) -> None:
    prompt = prompt_ids(TOKENIZER, [USER, Message("assistant", "x", "y"), USER], mode)
    deltas, message = streamed([TOKENIZER.encode("fox")], prompt)
    assert message.thinking == thinking
    assert message.content == ("" if mode == "on" else "fox")
    assert message.ids == (
        *prompt[len(prompt_ids(TOKENIZER, [USER, Message("assistant", "x", "y"), USER])) :],
        *TOKENIZER.encode("fox"),
    )
    assert deltas[-1] == (ReasoningDelta if mode == "on" else ContentDelta)("fox")


def test_thinking_closed_without_having_been_opened_is_recast() -> None:
    deltas, message = streamed([TOKENIZER.encode("fox"), special("</think>"), TOKENIZER.encode("dog")])
    assert deltas == [ContentDelta("fox"), RecastDelta(), ContentDelta("dog")]
    assert (message.thinking, message.content) == ("fox", "dog")


def test_a_broken_call_is_content() -> None:
    text = '<tool_call>{"name": </tool_call>'
    broken = [*special("<tool_call>"), *TOKENIZER.encode('{"name": '), *special("</tool_call>")]
    assert streamed([broken])[0] == [ContentDelta(text)]
    assert streamed([broken[:-1]])[0] == [ContentDelta(text.removesuffix("</tool_call>"))]
