"""The one renderer of chats, for training, reinforcement, generation and serving: the conversation only grows.

    <|tool|>definitions<|end|><|system|>text<|end|>            at the start, both optional
    <|user|>text<|end|>
    <|assistant|><think>steps</think>text<tool_call>
    {"name": ..., "arguments": ...}
    </tool_call><|end|>                                        thinking, text and calls each optional
    <|tool|><tool_response>text</tool_response><|end|>         one for each result

Every free text stands between two special tokens, so parts and whole tokenise alike, and the rendering of the first k
turns is a prefix of that of k + 1. Thinking None gives no tags, "" an empty pair. The tokens of a generated turn are
kept and rendered verbatim. Text that spells a special token stays text. Calls follow the Hermes and Qwen convention;
`template.py` is the Jinja twin and says which programs' parsers read it. This file knows nothing of sampling.

>>> tokenizer = Tokenizer.train(["what is 2 plus 2? it is 4"] * 3, vocab_size=320)
>>> turns = [Message("user", "2 plus 2?"), Message("assistant", "4", thinking="2+2=4")]
>>> tokenizer.decode(render(tokenizer, turns).ids)
'<|user|>2 plus 2?<|end|><|assistant|><think>2+2=4</think>4<|end|>'
>>> tokenizer.decode(prompt_ids(tokenizer, turns[:1], thinking="off"))
'<|user|>2 plus 2?<|end|><|assistant|><think></think>'
>>> read(tokenizer, render(tokenizer, turns).ids).messages == tuple(turns)
True
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from turbos.text.messages import (
    ROLES,
    ChatError,
    Conversation,
    Message,
    Tool,
    ToolCall,
    check_conversation,
    check_prompt,
)
from turbos.text.parse import ChatTokens, chat_tokens, parse, parse_turn, split_turn
from turbos.text.thinking import OPENED, Thinking
from turbos.text.tokenizer import Tokenizer

__all__ = [
    "ROLES",
    "ChatError",
    "Conversation",
    "Message",
    "Rendered",
    "Span",
    "Thinking",
    "Tool",
    "ToolCall",
    "opening_ids",
    "parse",
    "prompt_ids",
    "read",
    "render",
    "render_all",
]

SpanKind = Literal["role", "tools", "thinking", "content", "tool_call", "tool_result", "end"]


class Span(NamedTuple):
    """Tokens `start` to `end` of a rendering, with the tags around a text; `message` is None in the list of tools."""

    kind: SpanKind
    message: int | None
    start: int
    end: int


@dataclass(frozen=True)
class Rendered:
    """Tokens of a conversation, and for each the weight of the loss on predicting it (0 outside answers).

    `spans` cover the tokens without gap, in order.
    """

    ids: tuple[int, ...]
    loss_weights: tuple[float, ...]
    spans: tuple[Span, ...] = ()


class _Piece(NamedTuple):
    """What becomes a span: fixed tokens, a text to encode, fixed tokens."""

    kind: SpanKind
    message: int | None
    weight: float
    before: tuple[int, ...]
    text: str = ""
    after: tuple[int, ...] = ()


def render(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> Rendered:
    """All turns as tokens; weight 1 on what the assistant writes, its `<|end|>` included, and 0 elsewhere.

    Raises ChatError, which says where, for a conversation that cannot be.
    """
    return render_all(tokenizer, [Conversation(tuple(messages), tuple(tools))])[0]


def render_all(tokenizer: Tokenizer, conversations: Sequence[Conversation]) -> list[Rendered]:
    """Many conversations at once, which is faster: all their texts are encoded in one call, on all cores."""
    plans = [_plan(tokenizer, conversation) for conversation in conversations]
    texts = [piece.text for plan in plans for piece in plan if piece.text]
    encoded = iter(tokenizer.encode_batch(texts))
    return [_assemble(plan, encoded) for plan in plans]


def _plan(tokenizer: Tokenizer, conversation: Conversation) -> list[_Piece]:
    check_conversation(conversation.messages)
    tokens = chat_tokens(tokenizer)
    end = (tokens.end,)
    plan = []
    if conversation.tools:
        plan.append(_Piece("role", None, 0.0, (tokens.roles["tool"],)))
        plan.append(_Piece("tools", None, 0.0, (), _definitions(conversation.tools)))
        plan.append(_Piece("end", None, 0.0, end))
    for place, message in enumerate(conversation.messages):
        plan.append(_Piece("role", place, 0.0, (tokens.roles[message.role],)))
        if message.role == "assistant":
            plan += _assistant(tokenizer, tokens, place, message)
            plan.append(_Piece("end", place, 1.0, end))
        else:
            if message.role == "tool":
                around = (tokens.response,), message.content, (tokens.response_end,)
                plan.append(_Piece("tool_result", place, 0.0, *around))
            else:
                plan.append(_Piece("content", place, 0.0, (), message.content))
            plan.append(_Piece("end", place, 0.0, end))
    return plan


def _assistant(tokenizer: Tokenizer, tokens: ChatTokens, place: int, message: Message) -> Iterator[_Piece]:
    """Pieces between an assistant's role token and its end token."""
    if message.ids is not None:
        _check_ids(tokenizer, tokens, place, message.ids)
        for piece in split_turn(tokens, message.ids):
            yield _Piece(piece.kind, place, 1.0, message.ids[piece.start : piece.end])
        return
    if message.thinking is not None:
        yield _Piece("thinking", place, 1.0, (tokens.think,), message.thinking, (tokens.think_end,))
    if message.content:
        yield _Piece("content", place, 1.0, (), message.content)
    for call in message.tool_calls:
        # The line breaks are what SGLang's qwen25 parser looks for.
        yield _Piece("tool_call", place, 1.0, (tokens.call,), f"\n{call.text}\n", (tokens.call_end,))


def _check_ids(tokenizer: Tokenizer, tokens: ChatTokens, place: int, ids: Sequence[int]) -> None:
    for at, id in enumerate(ids):
        if id in tokens.stops:
            raise ChatError("ids", place, "ids", f"{tokens.names[id]} inside a turn would end it", at)
        if not 0 <= id < tokenizer.vocab_size:
            raise ChatError("ids", place, "ids", f"the tokenizer has no token {id}", at)


def _assemble(plan: Sequence[_Piece], encoded: Iterator[list[int]]) -> Rendered:
    ids: list[int] = []
    weights: list[float] = []
    spans = []
    for kind, message, weight, before, text, after in plan:
        start = len(ids)
        ids += before
        if text:
            ids += next(encoded)
        ids += after
        weights += [weight] * (len(ids) - start)
        spans.append(Span(kind, message, start, len(ids)))
    return Rendered(tuple(ids), tuple(weights), tuple(spans))


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    thinking: Thinking | Literal["auto", "on", "off"] = "auto",
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Tokens up to where the assistant goes on writing.

    "auto" leaves it to the model whether to think, "on" opens its thinking, "off" closes it at once; a budget opens
    it, and who generates must close it in time.
    """
    mode = Thinking.parse(thinking) if isinstance(thinking, str) else thinking
    ids = list(render(tokenizer, messages, tools).ids)
    check_prompt(messages)
    return [*ids, *opening_ids(tokenizer, mode)]


def opening_ids(tokenizer: Tokenizer, thinking: Thinking) -> list[int]:
    """What stands in a prompt after its messages: the assistant's turn, begun as the mode of thinking wants it."""
    return [tokenizer.special(name) for name in ("<|assistant|>", *OPENED[thinking.mode])]


def read(tokenizer: Tokenizer, ids: Sequence[int]) -> Conversation:
    """The conversation that tokens render, exactly: rendering it again gives the same tokens.

    An assistant's turn carries its ids only where its text would be encoded otherwise. Raises ChatError, whose `at` is
    a token, for tokens that render no conversation: unclosed or nested tags, broken calls, texts in foreign tokens.
    """
    tokens = chat_tokens(tokenizer)
    role_of = {id: role for role, id in tokens.roles.items()}
    messages: list[Message] = []
    tools: tuple[Tool, ...] = ()
    start = 0
    while start < len(ids):
        place = len(messages)
        if ids[start] not in role_of:
            raise ChatError("tag", place, "role", "a turn begins with the token of a role", start)
        end = next((at for at in range(start, len(ids)) if ids[at] == tokens.end), None)
        if end is None:
            raise ChatError("tag", place, "content", "the turn is never closed", start)
        role, body = role_of[ids[start]], tuple(ids[start + 1 : end])
        if role == "tool" and start == 0:
            tools = _read_tools(_read_text(tokenizer, body, None, "tools", 1))
        elif role == "assistant":
            messages.append(_read_assistant(tokenizer, body, place, start + 1))
        else:
            messages.append(_read_other(tokenizer, role, body, place, start + 1))
        start = end + 1
    check_conversation(messages)
    return Conversation(tuple(messages), tools)


def _read_tools(text: str) -> tuple[Tool, ...]:
    tools = tuple(Tool(line) for line in text.split("\n"))
    if _definitions(tools) != text:
        raise ChatError("json", None, "tools", "definitions in another spelling than ours")
    return tools


def _definitions(tools: Sequence[Tool]) -> str:
    return "\n".join(tool.definition for tool in tools)


def _read_text(tokenizer: Tokenizer, body: Sequence[int], place: int | None, part: str, start: int) -> str:
    for at, id in enumerate(body, start):
        if id in tokenizer.special_ids:
            raise ChatError("tag", place, part, f"{tokenizer.decode([id])} stands inside a text", at)
    text = tokenizer.decode(body)
    if tokenizer.encode(text) != list(body):
        raise ChatError("ids", place, part, "these are not the tokens of any text", start)
    return text


def _read_other(tokenizer: Tokenizer, role: str, body: Sequence[int], place: int, start: int) -> Message:
    tokens = chat_tokens(tokenizer)
    if role != "tool":
        return Message(role, _read_text(tokenizer, body, place, "content", start))
    if len(body) < 2 or (body[0], body[-1]) != (tokens.response, tokens.response_end):
        raise ChatError("tag", place, "content", "a result stands between <tool_response> and </tool_response>", start)
    return Message(role, _read_text(tokenizer, body[1:-1], place, "content", start + 1))


def _read_assistant(tokenizer: Tokenizer, body: tuple[int, ...], place: int, start: int) -> Message:
    turn = parse_turn(tokenizer, body)
    if turn.flaws:
        flaw = turn.flaws[0]
        raise ChatError("json" if flaw.kind == "json" else "tag", place, "content", flaw.what, start + flaw.at)
    plain = replace(turn.message, ids=None)
    plan = list(_assistant(tokenizer, chat_tokens(tokenizer), place, plain))
    texts = [piece.text for piece in plan if piece.text]
    # An empty turn was generated: without its ids it would say nothing.
    if body and _assemble(plan, iter(tokenizer.encode_batch(texts))).ids == body:
        return plain
    return turn.message
