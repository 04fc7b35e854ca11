"""Conversations as training documents: read from JSON lines, rendered, and which of their tokens carry loss.

In a shard a conversation is a row of tokens like any text. Its special tokens say who speaks, so the loss weights need
not be stored: `ChatTargets.weights` finds the assistant's turns again, exactly as `text.chat.render` and
`data.problems.problem_sample` weigh them. Which conversations to train on is decided in `train.anneal`.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "thinking": "2+2=4"}]}
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from turbos.common.errors import UserError
from turbos.text.chat import Message, render
from turbos.text.messages import ChatError
from turbos.text.parse import chat_tokens
from turbos.text.tokenizer import Tokenizer

THINKING_FIELDS = ("thinking", "reasoning_content", "reasoning")
"""Where a turn keeps its thinking; the first that is there counts."""


@dataclass(frozen=True)
class ChatTargets:
    """Ids that say which tokens the assistant says: loss lies on those only."""

    assistant: int
    end: int
    think: int
    think_end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTargets:
        """Those of a tokenizer; UserError for one that does not speak chat."""
        tokens = chat_tokens(tokenizer)
        return cls(tokens.roles["assistant"], tokens.end, tokens.think, tokens.think_end)

    def weights(self, ids_T: np.ndarray) -> np.ndarray:
        """Whether predicting each token of one conversation carries loss, bool `[T]`.

        From behind `<|assistant|>` to its `<|end|>`, except a `</think>` that closes at once: the prompt of "thinking
        off" gives that, and a model whose thinking is opened for it must not learn to close it.
        """
        places_T = np.arange(len(ids_T))
        opened_T = np.maximum.accumulate(np.where(ids_T == self.assistant, places_T, -1))
        closed_T = np.maximum.accumulate(np.where(ids_T == self.end, places_T, -1))
        speaks_T = np.zeros(len(ids_T), dtype=bool)
        speaks_T[1:] = opened_T[:-1] > closed_T[:-1]
        speaks_T[1:] &= ~((ids_T[1:] == self.think_end) & (ids_T[:-1] == self.think))
        return speaks_T


def read_chats(path: Path) -> Iterator[tuple[Message, ...]]:
    """The conversations of a JSON-lines file; UserError, which names the line, for what is none.

    A conversation without an assistant's turn is refused: it would carry no loss.
    """
    if not path.is_file():
        raise UserError(f"no conversations at {path}: name a .jsonl file whose lines have messages")
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield _messages(json.loads(line))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}, after line {number}): convert it first") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path} line {number} is no conversation: {what}") from error


def _messages(row: Any) -> tuple[Message, ...]:
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError("an object with a list of messages is wanted")
    messages = tuple(_message(turn) for turn in row["messages"])
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("no turn of the assistant")
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise TypeError("a message is an object with role and content")
    role, content = turn["role"], turn["content"]
    thinking = next((turn[field] for field in THINKING_FIELDS if turn.get(field) is not None), None)
    if not all(isinstance(text, str) for text in (role, content, thinking or "")):
        raise TypeError("role, content and thinking are texts")
    return Message(role, content, thinking=thinking)


def rendered_chats(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    """Tokens of each conversation of a file; UserError, which names the conversation, where it cannot be rendered."""
    for number, messages in enumerate(read_chats(path), start=1):
        try:
            yield render(tokenizer, messages).ids
        except ChatError as error:
            raise UserError(f"{path}, conversation {number}: {error}") from error
