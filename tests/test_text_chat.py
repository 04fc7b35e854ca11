"""The chat renderer: conversations only grow, come back exactly, and what cannot be is refused with its place."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chats import PLAIN, REQUESTS, TOKENIZER, assistants, conversations, drawn_ids, special, wild
from turbos.common.errors import UserError
from turbos.text.chat import parse, prompt_ids, read, render, render_all
from turbos.text.messages import ChatError, Conversation, Message, Tool, ToolCall
from turbos.text.parse import parse_turn
from turbos.text.thinking import EFFORTS, Thinking, requested_thinking

USER = Message("user", "fox?")
CALL, HALF = ToolCall("add", '{"a": 1}'), ToolCall("a\ud800")
CALLING = Message("assistant", "", tool_calls=(CALL,))
TOOL = Tool('{"type": "function", "function": {"name": "add"}}')


def same(conversation: Conversation) -> Conversation:
    """A conversation without the ids of its turns."""
    return replace(conversation, messages=tuple(replace(message, ids=None) for message in conversation.messages))


@given(conversations())
def test_rendering_only_grows(conversation: Conversation) -> None:
    whole = render(TOKENIZER, conversation.messages, conversation.tools)
    for count in range(len(conversation.messages)):
        part = render(TOKENIZER, conversation.messages[:count], conversation.tools)
        assert whole.ids[: len(part.ids)] == part.ids
        assert whole.loss_weights[: len(part.ids)] == part.loss_weights
        assert whole.spans[: len(part.spans)] == part.spans


@given(conversations())
def test_what_was_rendered_is_read_back(conversation: Conversation) -> None:
    assert read(TOKENIZER, render(TOKENIZER, conversation.messages, conversation.tools).ids) == conversation


@given(st.lists(conversations(), max_size=3))
def test_many_at_once_are_each_alone(conversations: list[Conversation]) -> None:
    alone = [render(TOKENIZER, conversation.messages, conversation.tools) for conversation in conversations]
    assert render_all(TOKENIZER, conversations) == alone


@given(conversations())
def test_spans_cover_the_tokens_and_loss_lies_on_the_assistant(conversation: Conversation) -> None:
    rendered = render(TOKENIZER, conversation.messages, conversation.tools)
    borders = [0, *(span.end for span in rendered.spans)]
    assert [(span.start, span.end) for span in rendered.spans] == list(pairwise(borders))
    assert borders[-1] == len(rendered.ids) == len(rendered.loss_weights)
    for kind, place, start, end in rendered.spans:
        message = None if place is None else conversation.messages[place]
        weight = float(message is not None and message.role == "assistant" and kind != "role")
        assert rendered.loss_weights[start:end] == (weight,) * (end - start)
        text = TOKENIZER.decode(rendered.ids[start:end])
        if message is None or kind == "role":
            continue
        calls = [f"<tool_call>\n{call.text}\n</tool_call>" for call in message.tool_calls]
        said = {"content": [message.content], "thinking": [f"<think>{message.thinking}</think>"], "end": ["<|end|>"]}
        said |= {"tool_call": calls, "tool_result": [f"<tool_response>{message.content}</tool_response>"]}
        assert text in said[kind]


@given(conversations())
def test_free_text_holds_no_special_token_and_stands_between_two(conversation: Conversation) -> None:
    rendered = render(TOKENIZER, conversation.messages, conversation.tools)
    texts = [tool.definition for tool in conversation.tools]
    if texts:
        texts = ["\n".join(texts)]
    for message in conversation.messages:
        texts += [message.thinking or "", message.content, *(f"\n{call.text}\n" for call in message.tool_calls)]
    runs: list[list[int]] = [[]]
    for id in rendered.ids:
        if id in TOKENIZER.special_ids:
            runs.append([])
        else:
            runs[-1].append(id)
    assert not runs[0] and not runs[-1]
    assert [run for run in runs if run] == [TOKENIZER.encode(text) for text in texts if text]


def test_plain_turns_keep_their_layout() -> None:
    """A model trained before tools were known still reads its prompts: spelled out here, not by the renderer."""
    turns = [Message("system", "be"), USER, Message("assistant", "dog", thinking="12"), USER, Message("assistant", "x")]
    ids = [*special("<|system|>"), *TOKENIZER.encode("be"), *special("<|end|>", "<|user|>"), *TOKENIZER.encode("fox?")]
    ids += [*special("<|end|>", "<|assistant|>", "<think>"), *TOKENIZER.encode("12"), *special("</think>")]
    ids += [*TOKENIZER.encode("dog"), *special("<|end|>", "<|user|>"), *TOKENIZER.encode("fox?"), *special("<|end|>")]
    ids += [*special("<|assistant|>"), *TOKENIZER.encode("x"), *special("<|end|>")]
    assert list(render(TOKENIZER, turns).ids) == ids


def test_tools_and_results_are_written_in_the_hermes_convention() -> None:
    turns = [Message("system", "be"), USER, Message("assistant", "so", tool_calls=(CALL, CALL)), Message("tool", "3")]
    assert TOKENIZER.decode(render(TOKENIZER, turns, [TOOL, TOOL]).ids) == (
        '<|tool|>{"type": "function", "function": {"name": "add"}}\n'
        '{"type": "function", "function": {"name": "add"}}<|end|><|system|>be<|end|><|user|>fox?<|end|>'
        '<|assistant|>so<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|end|>'
        "<|tool|><tool_response>3</tool_response><|end|>"
    )


@given(assistants(wild), st.sampled_from(["auto", "on", "off"]))
def test_parse_undoes_render_and_generated_ids_are_verbatim(turn: Message, mode: str) -> None:
    ids = render(TOKENIZER, [USER, turn]).ids
    prompt = prompt_ids(TOKENIZER, [USER])
    assert list(ids[: len(prompt)]) == prompt
    found = parse_turn(TOKENIZER, ids[len(prompt) :])
    assert replace(found.message, ids=None) == turn and found.flaws == ()
    assert found.message.ids == ids[len(prompt) : -1] and parse(TOKENIZER, ids[len(prompt) :]) == found.message
    assert render(TOKENIZER, [USER, found.message]) == render(TOKENIZER, [USER, turn])


@settings(max_examples=300)
@given(drawn_ids())
def test_any_generated_turn_is_kept_verbatim(ids: list[int]) -> None:
    turn = parse(TOKENIZER, ids)
    assert turn.role == "assistant" and turn.ids == tuple(ids)[: len(turn.ids or ())]
    rendered = render(TOKENIZER, [USER, turn, USER])
    head = len(prompt_ids(TOKENIZER, [USER]))
    assert rendered.ids[head : head + len(turn.ids or ())] == turn.ids
    borders = [0, *(span.end for span in rendered.spans)]
    assert [(span.start, span.end) for span in rendered.spans] == list(pairwise(borders))


@settings(max_examples=300)
@given(drawn_ids())
def test_tokens_are_read_exactly_or_refused_with_their_place(ids: list[int]) -> None:
    body = parse(TOKENIZER, ids).ids or ()
    whole = (*prompt_ids(TOKENIZER, [USER]), *body, TOKENIZER.special("<|end|>"))
    try:
        found = read(TOKENIZER, whole)
    except ChatError as error:
        flaws = parse_turn(TOKENIZER, body).flaws
        assert flaws and error.message == 1 and error.at is not None
        assert whole[error.at] == body[flaws[0].at]
    else:
        assert render(TOKENIZER, found.messages).ids == whole


def test_ids_that_another_encoding_gave_come_back() -> None:
    ids = (*TOKENIZER.encode("d"), *TOKENIZER.encode("o"), *TOKENIZER.encode("g"))
    assert ids != tuple(TOKENIZER.encode("dog"))
    turn = parse(TOKENIZER, ids)
    assert turn == Message("assistant", "dog", None, ids)
    whole = render(TOKENIZER, [USER, turn]).ids
    assert read(TOKENIZER, whole).messages == (USER, turn)
    assert read(TOKENIZER, render(TOKENIZER, [USER, Message("assistant", "dog")]).ids).messages[1].ids is None


def test_modes_open_and_close_thinking() -> None:
    opening, closing = special("<think>", "</think>")
    auto = prompt_ids(TOKENIZER, [USER])
    assert prompt_ids(TOKENIZER, [USER], "on") == [*auto, opening]
    assert prompt_ids(TOKENIZER, [USER], Thinking("budget", 7)) == [*auto, opening]
    assert prompt_ids(TOKENIZER, [USER], "off") == [*auto, opening, closing]
    off = render(TOKENIZER, [USER, Message("assistant", "dog", "")]).ids
    assert list(off[: len(auto) + 2]) == [*auto, opening, closing]
    with pytest.raises(UserError, match="auto, on or off"):
        prompt_ids(TOKENIZER, [USER], "maybe")  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["auto", "on", "off", "budget 1", "budget 4096"])
def test_a_mode_is_text_and_back(text: str) -> None:
    assert str(Thinking.parse(text)) == text


@pytest.mark.parametrize("text", ["", "On", "budget", "budget 0", "budget -1", "budget 1.5", "budget 07", "budget  7"])
def test_other_words_are_no_mode(text: str) -> None:
    with pytest.raises(UserError, match="thinking must be"):
        Thinking.parse(text)


@pytest.mark.parametrize(("texts", "asked", "mode"), REQUESTS)
def test_requests_are_read_as_modes(texts: list[str], asked: dict, mode: str) -> None:
    assert str(requested_thinking(*texts, **asked)) == mode


def test_efforts_are_modes_and_others_are_refused() -> None:
    assert [str(requested_thinking(reasoning_effort=effort)) for effort in EFFORTS] == list(EFFORTS.values())
    with pytest.raises(UserError, match="reasoning_effort 'huge'"):
        requested_thinking(reasoning_effort="huge")


A, B, E, T = "<|assistant|>", "<tool_call>", "<|end|>", "</tool_call>"


@pytest.mark.parametrize(
    ("turns", "kind", "place"),
    [
        ([Message("robot", "x")], "role", "message 0, role"),
        ([Message("assistant", "x")], "order", "message 0, role"),
        ([Message("tool", "x")], "order", "message 0, role"),
        ([USER, USER], "order", "message 1, role"),
        ([USER, Message("system", "x")], "order", "message 1, role"),
        ([Message("system", "x"), Message("system", "x")], "order", "message 1, role"),
        ([USER, Message("assistant", "x"), Message("assistant", "x")], "order", "message 2, role"),
        ([USER, Message("assistant", "x"), Message("tool", "x")], "order", "message 2, role"),
        ([USER, CALLING, Message("tool", "x"), Message("tool", "x")], "order", "message 3, role"),
        ([Message("user", "")], "empty", "message 0, content"),
        ([Message("system", "")], "empty", "message 0, content"),
        ([USER, Message("assistant", "")], "empty", "message 1, content"),
        ([Message("user", "x", "y")], "field", "message 0, role"),
        ([Message("user", "x", None, (1,))], "field", "message 0, role"),
        ([Message("user", "x", None, None, (CALL,))], "field", "message 0, role"),
        ([Message("user", None)], "empty", "message 0, content"),
        ([Message("user", 3)], "field", "message 0, content"),
        ([Message("user", "ab\ud800c")], "surrogate", "message 0, content at 2"),
        ([USER, Message("assistant", "x", "\udfff")], "surrogate", "message 1, thinking at 0"),
        ([USER, replace(CALLING, tool_calls=(CALL, HALF))], "surrogate", "message 1, tool_calls[1].name at 1"),
        ([USER, Message("assistant", "x", None, (60, *special(E)))], "ids", "message 1, ids at 1"),
        ([USER, Message("assistant", "x", None, (-1,))], "ids", "message 1, ids at 0"),
        ([USER, Message("assistant", "x", None, (60, TOKENIZER.vocab_size))], "ids", "message 1, ids at 1"),
    ],
)  # fmt: skip
def test_impossible_conversations_are_refused_with_their_place(turns: list[Message], kind: str, place: str) -> None:
    with pytest.raises(ChatError) as caught:
        render(TOKENIZER, turns)
    assert caught.value.kind == kind and str(caught.value).startswith(f"{place}: ")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.at == caught.value.at


@pytest.mark.parametrize("turns", [[], [Message("system", "x")], [USER, Message("assistant", "x")]])
def test_the_assistant_answers_only_a_user_or_a_tool(turns: list[Message]) -> None:
    with pytest.raises(ChatError, match="cannot be asked to answer"):
        prompt_ids(TOKENIZER, turns)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"a": NaN}', '{"a": 1e999}', '{"a": 1, "a": 2}', '{"a": "\\ud800"}', "{'a': 1}"),
        *('{"a": 1}}', '{"a":' * 65 + "1" + "}" * 65, '{"a":' * 100_000, '{"a": ' + "1" * 5000 + "}"),
    ],
    ids=lambda text: text[:12],
)
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(ChatError, match="broken JSON"):
        ToolCall("add", text)
    call = [*special(B), *TOKENIZER.encode(f'{{"name": "add", "arguments": {text}}}'), *special(T)]
    turn = parse_turn(TOKENIZER, call)
    assert [flaw.kind for flaw in turn.flaws] == ["json"] and not turn.message.tool_calls
    assert turn.message.content == TOKENIZER.decode(call)
    with pytest.raises(ChatError) as caught:
        read(TOKENIZER, [*prompt_ids(TOKENIZER, [USER]), *call, *special(E)])
    assert (caught.value.kind, caught.value.message) == ("json", 1)


def test_json_is_made_canonical() -> None:
    assert ToolCall("f", ' {"b":"\\u00e9\\/",\n"a":[1.0,2]} ').arguments == '{"b": "é/", "a": [1.0, 2]}'
    assert ToolCall("f", '{"a":' * 64 + "1" + "}" * 64).arguments.count("{") == 64
    with pytest.raises(ChatError, match="needs the name"):
        ToolCall("", "{}")
    for broken in ("{}", '{"function": {}}', '{"function": {"name": ""}}'):
        with pytest.raises(ChatError, match="function"):
            Tool(broken)


@pytest.mark.parametrize(
    ("parts", "kind", "at"),
    [
        (["<think>", "fox"], "unclosed", 0),
        (["fox", "</think>", "dog"], "unopened", 1),
        (["<think>", "<think>", "x", "</think>"], "nested", 1),
        (["<think>", "<tool_call>", "</think>"], "nested", 1),
        (["<think>", "</think>", "<think>"], "nested", 2),
        (["<think>", "</think>", "</think>"], "unopened", 2),
        (["x", "<tool_call>", "{}"], "unclosed", 1),
        (["x", "</tool_call>"], "unopened", 1),
        (["<tool_call>", "<tool_call>", "</tool_call>"], "nested", 1),
        (["<tool_call>", "{}", "</tool_call>"], "json", 0),
        (["<|user|>"], "nested", 0),
        (["x", "<tool_response>"], "nested", 1),
    ],
)
def test_tags_out_of_order_are_flaws_with_their_place(parts: list[str], kind: str, at: int) -> None:
    ids = [TOKENIZER.special(part) if part in TOKENIZER._special_ids else TOKENIZER.encode(part) for part in parts]
    flat = [id for part in ids for id in (part if isinstance(part, list) else [part])]
    token = sum(len(part) if isinstance(part, list) else 1 for part in ids[:at])
    flaw = parse_turn(TOKENIZER, flat).flaws[0]
    assert (flaw.kind, flaw.at) == (kind, token)


def test_text_after_a_call_is_kept_and_blanks_between_calls_are_not() -> None:
    call = [*special(B), *TOKENIZER.encode(CALL.text), *special(T)]
    turn = parse_turn(TOKENIZER, [*call, *TOKENIZER.encode("\n"), *call])
    assert (turn.message.content, turn.message.tool_calls, turn.flaws) == ("", (CALL, CALL), ())
    late = parse_turn(TOKENIZER, [*call, *TOKENIZER.encode("dog")])
    assert (late.message.content, late.message.tool_calls, late.flaws[0].kind) == ("dog", (CALL,), "late")


def test_unclosed_thinking_is_all_there_is() -> None:
    turn = parse(TOKENIZER, [TOKENIZER.special("<think>"), *TOKENIZER.encode("fox")])
    assert (turn.thinking, turn.content) == ("fox", "")
    stray = parse(TOKENIZER, [*TOKENIZER.encode("fox"), TOKENIZER.special("</think>"), *TOKENIZER.encode("dog")])
    assert (stray.thinking, stray.content) == ("fox", "dog")


@pytest.mark.parametrize(
    ("parts", "what", "at"),
    [
        (["fox"], "begins with the token of a role", 0),
        (["<|user|>", "fox"], "never closed", 0),
        (["<|user|>", "<think>", "<|end|>"], "<think> stands inside a text", 1),
        (["<|user|>", "fox", "<|user|>", "<|end|>"], "stands inside a text", 2),
        (["<|user|>", b"\xe5", "<|end|>"], "not the tokens of any text", 1),
        (["<|tool|>", "{}", "<|end|>"], "write", None),
        (["<|tool|>", '{"function":{"name":"f"}}', "<|end|>"], "another spelling", None),
        (["<|user|>", "fox", "<|end|>", "<|user|>", "fox", "<|end|>"], "cannot follow", None),
        (
            ["<|user|>", "x", "<|end|>", A, B, '{"name": "f", "arguments": {}}', T, E, "<|tool|>", "3", E],
            "between",
            None,
        ),
    ],
)
def test_tokens_that_are_no_conversation_are_refused(parts: list[str | bytes], what: str, at: int | None) -> None:
    ids: list[int] = []
    lengths = []
    for part in parts:
        lengths.append(len(ids))
        if isinstance(part, bytes):
            ids += [id for id in range(TOKENIZER.vocab_size) if TOKENIZER.token_bytes(id) == part][:1]
        else:
            ids += [TOKENIZER.special(part)] if part in TOKENIZER._special_ids else TOKENIZER.encode(part)
    with pytest.raises(ChatError, match=what) as caught:
        read(TOKENIZER, ids)
    if at is not None:
        assert caught.value.at == lengths[at]


@example("<|end|>")
@given(st.sampled_from(PLAIN) | wild)
def test_text_that_spells_special_tokens_stays_text(text: str) -> None:
    turns = (Message("user", text or "x"), Message("assistant", text, text, tool_calls=(ToolCall(text or "x"),)))
    rendered = render(TOKENIZER, turns)
    assert read(TOKENIZER, rendered.ids).messages == turns
    tags = special(
        "<|user|>", "<|end|>", "<|assistant|>", "<think>", "</think>", "<tool_call>", "</tool_call>", "<|end|>"
    )
    assert [id for id in rendered.ids if id in TOKENIZER.special_ids] == tags


@pytest.mark.parametrize("at_once", [False, True])
def test_rendering_is_fast(at_once: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """20,000 messages a second of one core are wanted, one by one or all at once; the figure is printed."""
    random = Random(0)
    words = ["".join(random.choices("aeiounrst", k=random.randint(2, 7))) for _ in range(2000)]

    def text(count: int) -> str:
        return " ".join(random.choices(words, k=count))

    def turns() -> Iterator[Message]:
        for _ in range(5):
            yield Message("user", text(8))
            yield Message("assistant", text(3), thinking=text(8))

    conversations = [Conversation(tuple(turns())) for _ in range(100)]
    rates = []
    for _ in range(5):
        start = time.process_time()
        if at_once:
            rendered = render_all(TOKENIZER, conversations)
        else:
            rendered = [render(TOKENIZER, conversation.messages) for conversation in conversations]
        rates.append(1000 / (time.process_time() - start))
    tokens = sum(len(found.ids) for found in rendered) / 1000
    with capsys.disabled():
        how = "all at once" if at_once else "one by one"
        print(f"\nrendering {how}: {max(rates):,.0f} messages/s of a core, {tokens:.0f} tokens each")
    # Half of it, so that other work on the machine does not decide.
    assert max(rates) > 10_000
