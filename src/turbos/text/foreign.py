"""Prompts for checkpoints whose chats are laid out by their own Jinja template, such as SmolLM2's.

The template runs in a sandbox, as in transformers, and gives one text whose special tokens are then found by spelling.
So a message that spells one is refused: the text alone could not say which are meant. Our own checkpoints are
rendered by `chat.py`, which has no such limit; nothing is parsed or trained in a foreign layout.

A generated turn carries its ids, and they are rendered verbatim wherever the template takes the turn as it is: so the
conversation only grows here too.

    ids = foreign_prompt_ids(tokenizer, [Message("user", "What is the capital of France?")])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import NoReturn

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from turbos.common.errors import UserError
from turbos.text.messages import Message, surrogate
from turbos.text.tokenizer import Tokenizer


def foreign_prompt_ids(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Tokens up to where the assistant goes on writing; UserError for what the template or the tokens cannot carry."""
    files = tokenizer.foreign_files
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    template = (
        files["chat_template.jinja"].decode() if "chat_template.jinja" in files else settings.get("chat_template")
    )
    if not isinstance(template, str):
        raise UserError("this checkpoint has no chat template: continue a text instead of a conversation")
    backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    backend.encode_special_tokens = False
    marks = _marks(messages)
    _check_texts(backend, ["" if place in marks else message.content for place, message in enumerate(messages)])
    text = _rendered(template, _turns(messages, marks), settings)
    if any(text.count(mark) != 1 for mark in marks.values()):
        # The template rewrites or drops a generated turn: its text counts, as for any other.
        marks = {}
        _check_texts(backend, [message.content for message in messages])
        text = _rendered(template, _turns(messages, marks), settings)
    return _encoded(backend, text, {mark: messages[place].ids or () for place, mark in marks.items()})


def _marks(messages: Sequence[Message]) -> dict[int, str]:
    """What stands for the ids of each generated turn, by the message's place, while the template runs."""
    said = "".join(message.content for message in messages)
    # Private letters, which no template looks for; whoever uses them himself gets turns as texts.
    if "\ue000" in said:
        return {}
    return {place: f"\ue000{place}\ue001" for place, message in enumerate(messages) if message.ids is not None}


def _turns(messages: Sequence[Message], marks: Mapping[int, str]) -> list[dict[str, str]]:
    return [{"role": one.role, "content": marks.get(place, one.content)} for place, one in enumerate(messages)]


def _check_texts(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> None:
    """UserError for a text that spells a special token, or that is none."""
    added = sorted(token.content for token in backend.get_added_tokens_decoder().values() if token.special)
    for place, text in enumerate(texts):
        if surrogate(text) is not None:
            raise UserError(f"message {place}: half a surrogate pair is no text")
        spelt = next((name for name in added if name in text), None)
        if spelt is not None:
            raise UserError(
                f"message {place}: the text spells {spelt}, which this checkpoint's chats cannot keep apart"
            )


def _encoded(backend: tokenizers.Tokenizer, text: str, generated: Mapping[str, Sequence[int]]) -> list[int]:
    """Tokens of a text in which marks stand for ids."""
    ids: list[int] = []
    for mark, verbatim in generated.items():
        before, _, text = text.partition(mark)
        ids += [*backend.encode(before, add_special_tokens=False).ids, *verbatim]
    return [*ids, *backend.encode(text, add_special_tokens=False).ids]


def _rendered(template: str, turns: list[dict[str, str]], settings: dict[str, object]) -> str:
    """The template's text, ending where the assistant begins."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    names = {name: settings[name] for name in ("bos_token", "eos_token", "unk_token", "pad_token") if name in settings}
    try:
        return environment.from_string(template).render(messages=turns, add_generation_prompt=True, tools=None, **names)
    except TemplateError as error:
        raise UserError(f"this checkpoint's chat template refuses the conversation: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
