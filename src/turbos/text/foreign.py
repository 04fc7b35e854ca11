"""Prompts for checkpoints whose chats are laid out by their own Jinja template, such as SmolLM2's.

The template runs in a sandbox, as in transformers, and gives one text whose special tokens are then found by spelling.
So a message that spells one is refused: the text alone could not say which are meant. Our own checkpoints are
rendered by `chat.py`, which has no such limit; nothing is parsed or trained in a foreign layout.

    ids = foreign_prompt_ids(tokenizer, [Message("user", "What is the capital of France?")])
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from turbos.common.errors import UserError
from turbos.text.messages import Message
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
    added = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for place, message in enumerate(messages):
        spelt = next((name for name in sorted(added) if name in message.content), None)
        if spelt is not None:
            raise UserError(
                f"message {place}: the text spells {spelt}, which this checkpoint's chats cannot keep apart"
            )
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return list(backend.encode(_rendered(template, turns, settings), add_special_tokens=False).ids)


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
