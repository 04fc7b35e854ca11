"""A tokenizer, and strategies of conversations that tests of chats draw from."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from turbos.text.messages import Conversation, Message, Tool, ToolCall
from turbos.text.tokenizer import CHAT_TOKENS, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog 1234567890.\n\ndef f(x):\n    return x",
    "天地玄黄，宇宙洪荒。",
    '{"name": "add", "arguments": {"a": 1, "b": [true, null]}}',
] * 20
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=400)
SPELLED = [*CHAT_TOKENS, "<think>1</think>", "a<|end|>b", "<tool_call>\n{}\n</tool_call>", "<|spare_3|>"]
PLAIN = [
    "\0",
    "1" * 50,
    " \n\t ",
    "é\u0301",
    "日本",
    "<",
    "<|",
    "|>",
    "<thin",
    "😀",
    "\u2028",
    "hi /think",
    "/no_think\n",
]

tame = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(PLAIN)
"""Texts that hypothesis hardly ever makes spell a special token; `spells` says whether one does."""
wild = tame | st.sampled_from(SPELLED)
"""Any texts."""

numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)


def json_objects(texts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    """JSON objects with any values inside."""
    leaves = st.none() | st.booleans() | numbers | texts
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
    return st.dictionaries(texts, values, max_size=3)


def tool_calls(texts: st.SearchStrategy[str]) -> st.SearchStrategy[ToolCall]:
    """Calls of any tool."""
    arguments = json_objects(texts).map(json.dumps)
    return st.builds(ToolCall, texts.filter(bool), arguments)


def tools(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Tool]:
    """Definitions of tools."""
    functions = st.fixed_dictionaries({"name": texts.filter(bool), "parameters": json_objects(texts)})
    return functions.map(lambda function: Tool(json.dumps({"type": "function", "function": function})))


@st.composite
def conversations(draw: st.DrawFn, texts: st.SearchStrategy[str] = wild, max_turns: int = 6) -> Conversation:
    """Conversations that may be: tools, a system message, then turns in an order that is allowed."""
    messages = []
    if draw(st.booleans()):
        messages.append(Message("system", draw(texts.filter(bool))))
    previous, open_calls = "system", 0
    for _ in range(draw(st.integers(0, max_turns))):
        role = draw(st.sampled_from(_may_follow(previous, open_calls)))
        if role == "assistant":
            messages.append(draw(assistants(texts)))
            open_calls = len(messages[-1].tool_calls)
        else:
            messages.append(Message(role, draw(texts if role == "tool" else texts.filter(bool))))
            open_calls -= role == "tool"
        previous = role
    return Conversation(tuple(messages), tuple(draw(st.lists(tools(texts), max_size=2))))


def _may_follow(previous: str, open_calls: int) -> list[str]:
    if previous == "system":
        return ["user"]
    if previous == "user":
        return ["assistant"]
    return (["tool"] if open_calls > 0 else []) + (["assistant"] if previous == "tool" else []) + ["user"]


def assistants(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Message]:
    """Turns of the assistant that say something."""
    turns = st.builds(
        Message,
        st.just("assistant"),
        texts,
        st.none() | texts,
        tool_calls=st.lists(tool_calls(texts), max_size=3).map(tuple),
    )
    return turns.filter(lambda turn: bool(turn.content or turn.tool_calls or turn.thinking is not None))


def spells(conversation: Conversation) -> bool:
    """Whether any text of a conversation spells a special token of the tokenizer."""
    names = [TOKENIZER.decode([id]) for id in TOKENIZER.special_ids]
    texts = [tool.definition for tool in conversation.tools]
    for message in conversation.messages:
        texts += [message.content, message.thinking or "", *(call.text for call in message.tool_calls)]
    return any(name in text for name in names for text in texts)


def special(*names: str) -> list[int]:
    """Ids of special tokens."""
    return [TOKENIZER.special(name) for name in names]


def drawn_ids(max_size: int = 24) -> st.SearchStrategy[list[int]]:
    """Tokens that a bad model may write: many tags, bytes that make no character, halves of calls."""
    tags = st.sampled_from(special(*CHAT_TOKENS[6:])).map(lambda id: [id])
    pieces = st.sampled_from(
        ["ok", " ", "\n", "日本", "😀", '\n{"name": "add", "arguments": {"a": 1}}\n', '{"name": "add"', "{}", "[" * 99]
    ).map(TOKENIZER.encode)
    calls = pieces.map(lambda ids: [*special("<tool_call>"), *ids, *special("</tool_call>")])
    anything = st.integers(0, TOKENIZER.vocab_size - 1).map(lambda id: [id])
    parts = st.lists(tags | pieces | calls | anything, max_size=max_size)
    return parts.map(lambda found: [id for part in found for id in part])


REQUESTS = [
    ([], {}, "auto"),
    (["hi"], {"enable_thinking": True}, "on"),
    (["hi"], {"enable_thinking": False}, "off"),
    (["hi /no_think"], {}, "off"),
    (["hi /no_think"], {"enable_thinking": True}, "off"),
    (["hi /no_think", "so\n/think", "hi"], {}, "on"),
    (["hi /think"], {"enable_thinking": False}, "off"),
    (["see src/think", "/think of it"], {}, "auto"),
    (["/think"], {"reasoning_effort": "none"}, "off"),
    ([], {"reasoning_effort": "low", "enable_thinking": False}, "budget 1024"),
    ([], {"thinking": "auto", "reasoning_effort": "high", "enable_thinking": True}, "auto"),
    ([], {"thinking": True}, "on"),
    ([], {"thinking": False}, "off"),
]
"""Texts of users' turns, what a request says of thinking, and the mode that this means."""
