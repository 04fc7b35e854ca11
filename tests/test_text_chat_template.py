"""The Jinja twin, rendered by transformers as a user of the checkpoint would: the same tokens, or an exception."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NoReturn

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chats import REQUESTS, SPELLED, TOKENIZER, conversations, spells, tame
from turbos.common.errors import UserError
from turbos.text.chat import prompt_ids, render
from turbos.text.messages import Conversation, Message, Tool, ToolCall
from turbos.text.template import chat_template
from turbos.text.thinking import EFFORTS, Thinking, requested_thinking

transformers = pytest.importorskip("transformers")
jinja2 = pytest.importorskip("jinja2")
pytest.importorskip("jinja2.sandbox")

USER = Message("user", "fox?")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("checkpoint")
    TOKENIZER.save(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == (directory / "chat_template.jinja").read_text(encoding="utf-8")
    return transformers.AutoTokenizer.from_pretrained(directory)


def request_of(conversation: Conversation, field: str = "reasoning_content") -> dict[str, Any]:
    """A conversation as OpenAI's interface writes it."""
    messages = []
    for message in conversation.messages:
        found: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.thinking is not None:
            found[field] = message.thinking
        if message.tool_calls:
            calls = [{"name": call.name, "arguments": json.loads(call.arguments)} for call in message.tool_calls]
            found["tool_calls"] = [{"id": "c", "type": "function", "function": call} for call in calls]
        messages.append(found)
    return {"conversation": messages, "tools": [json.loads(tool.definition) for tool in conversation.tools] or None}


def theirs_ids(
    theirs: Any, conversation: Conversation, field: str = "reasoning_content", **asked: Any
) -> tuple[int, ...]:
    return tuple(
        theirs.apply_chat_template(**request_of(conversation, field), tokenize=True, return_dict=False, **asked)
    )


@settings(max_examples=300, deadline=None)
@given(conversations(tame), st.sampled_from(["reasoning_content", "thinking", "reasoning"]))
def test_twin_renders_the_same_tokens(theirs: Any, conversation: Conversation, field: str) -> None:
    # transformers refuses a conversation without messages before any template is asked.
    assume(conversation.messages and not spells(conversation))
    ours = render(TOKENIZER, conversation.messages, conversation.tools).ids
    assert theirs_ids(theirs, conversation, field) == ours


asked = st.fixed_dictionaries(
    {},
    optional={
        "thinking": st.sampled_from(
            ["auto", "on", "off", "budget 5", "budget 0", "budget 05", "budget x", "?", True, False]
        ),
        "enable_thinking": st.booleans(),
        "reasoning_effort": st.sampled_from([*EFFORTS, "huge"]),
    },
)


@settings(max_examples=300, deadline=None)
@given(conversations(tame), asked)
def test_twin_prompts_in_the_mode_that_is_asked_for(theirs: Any, conversation: Conversation, asked: dict) -> None:
    assume(conversation.messages and not spells(conversation))
    texts = [turn.content for turn in conversation.messages if turn.role in ("system", "user")]
    try:
        mode = requested_thinking(*texts, **asked)
        ours = prompt_ids(TOKENIZER, conversation.messages, mode, conversation.tools)
    except UserError:
        with pytest.raises(jinja2.exceptions.TemplateError):
            theirs_ids(theirs, conversation, add_generation_prompt=True, **asked)
    else:
        assert theirs_ids(theirs, conversation, add_generation_prompt=True, **asked) == tuple(ours)


@pytest.mark.parametrize(("texts", "asked", "mode"), REQUESTS)
def test_twin_reads_requests_as_the_same_modes(theirs: Any, texts: list[str], asked: dict, mode: str) -> None:
    answer = Message("assistant", "dog")
    turns = [turn for text in texts or ["hi"] for turn in (Message("user", text), answer)][:-1]
    ours = prompt_ids(TOKENIZER, turns, Thinking.parse(mode))
    assert theirs_ids(theirs, Conversation(tuple(turns)), add_generation_prompt=True, **asked) == tuple(ours)


@pytest.mark.parametrize("place", ["system", "user", "content", "thinking", "name", "argument", "result", "tools"])
@pytest.mark.parametrize("spelling", SPELLED)
def test_twin_refuses_text_that_spells_special_tokens(theirs: Any, spelling: str, place: str) -> None:
    text = {place: f"a {spelling}"}.get
    call = ToolCall(text("name", "f"), json.dumps({"x": [text("argument", "y")]}))
    turns = (
        Message("system", text("system", "be")),
        Message("user", text("user", "hi")),
        Message("assistant", text("content", "so"), text("thinking", "hm"), tool_calls=(call,)),
        Message("tool", text("result", "3")),
    )
    definition = {"type": "function", "function": {"name": "f", "description": text("tools", "d")}}
    with pytest.raises(jinja2.exceptions.TemplateError, match="spells the special token"):
        theirs_ids(theirs, Conversation(turns, (Tool(json.dumps(definition)),)))


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "robot", "content": "x"}],
        [{"role": "assistant", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "user", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}, {"role": "tool", "content": "x"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}],
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        ],
        [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
            {"role": "tool", "content": "x"},
            {"role": "tool", "content": "x"},
        ],
    ],
)
def test_twin_refuses_what_the_renderer_refuses(theirs: Any, messages: list[dict]) -> None:
    with pytest.raises(jinja2.exceptions.TemplateError):
        theirs.apply_chat_template(messages, tokenize=True)


def test_content_may_be_left_out_beside_a_call(theirs: Any) -> None:
    turns = (USER, Message("assistant", "", tool_calls=(ToolCall("f"),)))
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tuple(ids) == render(TOKENIZER, turns).ids


@cache
def _plain() -> str:
    return TOKENIZER.chat_template


def test_twin_guards_every_special_token_of_its_tokenizer() -> None:
    names = [TOKENIZER.decode([id]) for id in TOKENIZER.special_ids]
    assert all(json.dumps(name) in _plain() for name in names)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.globals["raise_exception"] = _refuse
    twin = environment.from_string(chat_template([*names, "[cite]"]))
    assert twin.render(messages=[{"role": "user", "content": "cite"}]) == "<|user|>cite<|end|>"
    with pytest.raises(jinja2.TemplateError, match=r"\[cite\]"):
        twin.render(messages=[{"role": "user", "content": "as in [cite]"}])


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
