"""What an assistant's tokens say: thinking, content and calls, read whole; `stream.py` reads them as they come.

Model output is hostile, so nothing here raises. What is out of order is a `Flaw` that names its token, and no text
is lost: thinking that is not closed is all there is, thinking closed without having been opened still is thinking, a
call that is no JSON stays in the content with its tags. Text that spells a tag in letters is text.

>>> tokenizer = Tokenizer.train(['it is 4 {"name": "add", "arguments": {"a": 1}}'] * 3, vocab_size=320)
>>> call = [tokenizer.special("<tool_call>"), *tokenizer.encode('{"name": "add", "arguments": {}}')]
>>> turn = parse_turn(tokenizer, [*tokenizer.encode("it is"), *call, tokenizer.special("</tool_call>")])
>>> turn.message.content, turn.message.tool_calls, turn.flaws
('it is', (ToolCall(name='add', arguments='{}'),), ())
>>> parse_turn(tokenizer, call).flaws[0].what
'<tool_call> is never closed'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

from turbos.text.messages import ROLES, Message, ToolCall, read_call
from turbos.text.tokenizer import END, END_OF_TEXT, Tokenizer


@dataclass(frozen=True)
class ChatTokens:
    """Ids of the tokens that chats are made of, looked up once; `roles` from name to id.

    `stops` end a turn, and `names` are the spellings of all special tokens.
    """

    roles: dict[str, int]
    end: int
    think: int
    think_end: int
    call: int
    call_end: int
    response: int
    response_end: int
    stops: frozenset[int]
    names: dict[int, str]


@lru_cache(maxsize=8)
def chat_tokens(tokenizer: Tokenizer) -> ChatTokens:
    """The chat's tokens in a tokenizer; UserError where it has them not."""
    return ChatTokens(
        roles={role: tokenizer.special(f"<|{role}|>") for role in ROLES},
        end=tokenizer.special(END),
        think=tokenizer.special("<think>"),
        think_end=tokenizer.special("</think>"),
        call=tokenizer.special("<tool_call>"),
        call_end=tokenizer.special("</tool_call>"),
        response=tokenizer.special("<tool_response>"),
        response_end=tokenizer.special("</tool_response>"),
        stops=frozenset({tokenizer.special(END), tokenizer.special(END_OF_TEXT)}),
        names={id: tokenizer.decode([id]) for id in tokenizer.special_ids},
    )


@dataclass(frozen=True)
class Flaw:
    """Something out of order in a generated turn, at token `at` of it."""

    kind: Literal["unclosed", "unopened", "nested", "json", "late"]
    at: int
    what: str


@dataclass(frozen=True)
class Turn:
    """An assistant's turn that was read, and what was out of order in it."""

    message: Message
    flaws: tuple[Flaw, ...]


class Piece(NamedTuple):
    """Part of a turn's body, its tags included: tokens `start` to `end`."""

    kind: Literal["thinking", "content", "tool_call"]
    start: int
    end: int


def parse(tokenizer: Tokenizer, ids: Sequence[int]) -> Message:
    """The assistant's turn from the tokens after `<|assistant|>` (an opened `<think>` of the prompt included).

    Never raises: what follows the first end token is dropped, and `parse_turn` says what was out of order. The message
    carries the ids.
    """
    return parse_turn(tokenizer, ids).message


def parse_turn(tokenizer: Tokenizer, ids: Sequence[int]) -> Turn:
    """As `parse`, with the flaws of the turn in the order of their places."""
    tokens = chat_tokens(tokenizer)
    end = next((place for place, id in enumerate(ids) if id in tokens.stops), len(ids))
    body = tuple(ids[:end])
    thinking: str | None = None
    content: list[str] = []
    calls: list[ToolCall] = []
    flaws: list[Flaw] = []
    for piece in split_turn(tokens, body):
        inside = body[piece.start : piece.end]
        if piece.kind == "thinking":
            opened, closed = inside[0] == tokens.think, inside[-1] == tokens.think_end
            thinking = tokenizer.decode(inside[opened : len(inside) - closed])
            flaws += _thinking_flaws(tokens, inside, opened, closed)
        elif piece.kind == "tool_call":
            call = call_of(tokenizer, inside)
            if isinstance(call, ToolCall):
                calls.append(call)
            else:
                content.append(tokenizer.decode(inside))
                flaws.append(Flaw(call.kind, piece.start + call.at, call.what))
        else:
            text = tokenizer.decode(inside)
            if calls and text.isspace():
                continue
            content.append(text)
            flaws += _content_flaws(tokens, piece, inside, late=bool(calls))
    message = Message("assistant", "".join(content), thinking, body, tuple(calls))
    return Turn(message, tuple(flaws))


def split_turn(tokens: ChatTokens, body: Sequence[int]) -> list[Piece]:
    """Cut a turn's body at its tags, every token in one piece.

    A call that is never closed is content; so is any tag that opens or closes nothing.
    """
    pieces = []
    opened = len(body) > 0 and body[0] == tokens.think
    closing = _find(body, tokens.think_end, 0)
    start = 0
    if opened or closing < _find(body, tokens.call, 0):
        start = min(closing + 1, len(body))
        pieces.append(Piece("thinking", 0, start))
    while start < len(body):
        opening = _find(body, tokens.call, start)
        closing = _find(body, tokens.call_end, opening)
        if opening > start:
            pieces.append(Piece("content", start, opening))
        if closing < len(body):
            pieces.append(Piece("tool_call", opening, closing + 1))
        elif opening < len(body):
            pieces.append(Piece("content", opening, len(body)))
        start = closing + 1
    return pieces


def _find(body: Sequence[int], id: int, start: int) -> int:
    """Place of the first `id` from `start` on; the length of the body where there is none."""
    try:
        return body.index(id, start)
    except ValueError:
        return len(body)


def call_of(tokenizer: Tokenizer, tagged: Sequence[int]) -> ToolCall | Flaw:
    """The call between the two tags that `tagged` begins and ends with, or why it is none."""
    special = next((place for place, id in enumerate(tagged[1:-1], 1) if id in tokenizer.special_ids), None)
    if special is not None:
        return Flaw("nested", special, f"{tokenizer.decode([tagged[special]])} stands inside a call")
    try:
        return read_call(tokenizer.decode(tagged[1:-1]))
    except ValueError as error:
        return Flaw("json", 0, f"a call with broken JSON ({error})")


def _thinking_flaws(tokens: ChatTokens, inside: Sequence[int], opened: bool, closed: bool) -> list[Flaw]:
    flaws = [] if opened else [Flaw("unopened", len(inside) - 1, "</think> closes what was not opened")]
    inner = range(int(opened), len(inside) - closed)
    flaws += [_nested(tokens, place, inside[place], "the thinking") for place in inner if inside[place] in tokens.names]
    return flaws if closed else [Flaw("unclosed", 0, "<think> is never closed"), *flaws]


def _content_flaws(tokens: ChatTokens, piece: Piece, inside: Sequence[int], late: bool) -> list[Flaw]:
    flaws = [Flaw("late", piece.start, "text after a call")] if late else []
    for place, id in enumerate(inside, piece.start):
        if id == tokens.call:
            flaws.append(Flaw("unclosed", place, "<tool_call> is never closed"))
        elif id in (tokens.call_end, tokens.think_end):
            flaws.append(Flaw("unopened", place, f"{tokens.names[id]} closes what was not opened"))
        elif id in tokens.names:
            flaws.append(_nested(tokens, place, id, "the content"))
    return flaws


def _nested(tokens: ChatTokens, place: int, id: int, where: str) -> Flaw:
    return Flaw("nested", place, f"{tokens.names[id]} stands inside {where}")
