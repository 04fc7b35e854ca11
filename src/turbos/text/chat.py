"""The one renderer of chats, for training, reinforcement and generation: the conversation only grows.

`<|user|>text<|end|><|assistant|><think>steps</think>answer<|end|>`: each part is encoded by itself, so the rendering of
the first k turns is always a prefix of that of k + 1. Thinking None gives no tags, "" an empty pair. The tokens of
a generated turn are kept and rendered verbatim. This file knows nothing of tools or of sampling.

>>> tokenizer = Tokenizer.train(["what is 2 plus 2? it is 4"] * 3, vocab_size=320)
>>> turns = [Message("user", "2 plus 2?"), Message("assistant", "4", thinking="2+2=4")]
>>> tokenizer.decode(render(tokenizer, turns).ids)
'<|user|>2 plus 2?<|end|><|assistant|><think>2+2=4</think>4<|end|>'
>>> tokenizer.decode(prompt_ids(tokenizer, turns[:1], thinking="off"))
'<|user|>2 plus 2?<|end|><|assistant|><think></think>'
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from turbos.common.errors import UserError
from turbos.text.tokenizer import END, END_OF_TEXT, Tokenizer

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Message:
    """One turn. `thinking` is the assistant's only: None (no tags) differs from "" (empty tags).

    `ids` are the tokens of a generated assistant turn, all that stands between `<|assistant|>` and `<|end|>`; where
    they are given they are rendered verbatim, and content and thinking are only for reading.
    """

    role: str
    content: str
    thinking: str | None = None
    ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Rendered:
    """Tokens of a conversation, and for each the weight of the loss on predicting it (0 outside answers)."""

    ids: tuple[int, ...]
    loss_weights: tuple[float, ...]


def _body(tokenizer: Tokenizer, message: Message) -> list[int]:
    """Tokens between a turn's role token and its end token; UserError for a turn that cannot be."""
    if message.role not in ROLES:
        raise UserError(f"unknown role {message.role!r} in a conversation: use one of {', '.join(ROLES)}")
    if message.role != "assistant" and (message.thinking is not None or message.ids is not None):
        raise UserError(f"a {message.role} turn cannot carry thinking or generated ids: only the assistant's can")
    if message.ids is not None:
        return list(message.ids)
    content = tokenizer.encode(message.content)
    if message.thinking is None:
        return content
    opening, closing = tokenizer.special("<think>"), tokenizer.special("</think>")
    return [opening, *tokenizer.encode(message.thinking), closing, *content]


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """All turns as tokens; weight 1 on what the assistant writes, its `<|end|>` included, and 0 elsewhere."""
    ids: list[int] = []
    weights: list[float] = []
    for message in messages:
        body = [*_body(tokenizer, message), tokenizer.special(END)]
        weight = 1.0 if message.role == "assistant" else 0.0
        ids += [tokenizer.special(f"<|{message.role}|>"), *body]
        weights += [0.0, *[weight] * len(body)]
    return Rendered(tuple(ids), tuple(weights))


def prompt_ids(
    tokenizer: Tokenizer, messages: Sequence[Message], thinking: Literal["auto", "on", "off"] = "auto"
) -> list[int]:
    """Tokens up to where the assistant goes on writing.

    "auto" leaves it to the model whether to think, "on" opens its thinking, "off" closes it at once.
    """
    opened = {"auto": [], "on": ["<think>"], "off": ["<think>", "</think>"]}
    if thinking not in opened:
        raise UserError(f"thinking must be auto, on or off, not {thinking!r}")
    ends = [tokenizer.special(name) for name in ("<|assistant|>", *opened[thinking])]
    return [*render(tokenizer, messages).ids, *ends]


def parse(tokenizer: Tokenizer, ids: Sequence[int]) -> Message:
    """The assistant's turn from the tokens after `<|assistant|>` (an opened `<think>` of the prompt included).

    Never raises: what follows the first end token is dropped, thinking that is not closed is all there is, and
    thinking closed without having been opened still is thinking. The message carries the ids.
    """
    stops = {tokenizer.special(END), tokenizer.special(END_OF_TEXT)}
    opening, closing = tokenizer.special("<think>"), tokenizer.special("</think>")
    end = next((place for place, id in enumerate(ids) if id in stops), len(ids))
    kept = tuple(ids[:end])
    inner = kept[1:] if kept[:1] == (opening,) else kept
    if closing in inner:
        cut = inner.index(closing)
        thinking, content = tokenizer.decode(inner[:cut]), tokenizer.decode(inner[cut + 1 :])
        return Message("assistant", content, thinking, kept)
    if inner is not kept:
        return Message("assistant", "", tokenizer.decode(inner), kept)
    return Message("assistant", tokenizer.decode(kept), None, kept)
