"""A checkpoint whose chats are laid out by its own template, served: what works, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from serve_cases import Server, serving
from tiny import tiny_model
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.serve.service import Service
from turbos.text.messages import Message
from turbos.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = [{"role": "user", "content": "gcd of 12 and 18?"}]


def foreign_tokenizer(directory: Path) -> Tokenizer:
    """A tokenizer with ChatML's tokens and template."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["gcd of 12 and 18? user assistant"] * 3, trainer)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokenizer = foreign_tokenizer(tmp_path_factory.mktemp("foreign"))
    assert not tokenizer.speaks_chat
    config = EngineConfig(memory=1 << 26, precision="fp32", path="torch", threads=1)
    engine = Engine(tiny_model(), tokenizer, config, {tokenizer.special("<|im_end|>")})
    with serving(Service(engine, "theirs")) as running:
        yield running


def chat(server: Server, messages: list[Any], **options: Any) -> Any:
    settings = {"model": "theirs", "max_tokens": 16, "temperature": 1.0, "seed": 1, **options}
    return server.client().chat.completions.create(messages=messages, **settings)


def test_a_conversation_is_rendered_by_its_template_and_only_grows(server: Server) -> None:
    messages: list[Any] = list(ASK)
    read = 0
    for seed in range(3):
        reply = chat(server, messages, seed=seed)
        assert reply.usage.prompt_tokens_details.cached_tokens >= max(read - 1, 0)
        read = reply.usage.prompt_tokens + reply.usage.completion_tokens
        said = {"role": "assistant", "content": reply.choices[0].message.content}
        messages += [said, {"role": "user", "content": "and?"}]


def test_the_prompt_is_the_templates(server: Server) -> None:
    tokenizer = server.service.tokenizer
    expected = "<|im_start|>user\ngcd of 12 and 18?<|im_end|>\n<|im_start|>assistant\n"
    reply = chat(server, ASK, max_tokens=1)
    prompt = server.service.prompt([Message("user", "gcd of 12 and 18?")]).ids
    assert tokenizer.decode(prompt) == expected and reply.usage.prompt_tokens == len(prompt)


def test_streams_stops_and_formats_work(server: Server) -> None:
    whole = chat(server, ASK).choices[0].message.content
    parts = [part.choices[0].delta.content or "" for part in chat(server, ASK, stream=True)]
    assert "".join(parts) == whole and len(whole) > 4
    place = next(place for place in range(2, len(whole)) if whole[place] != "\ufffd")
    assert chat(server, ASK, stop=whole[place]).choices[0].message.content == whole[: whole.index(whole[place])]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    answer = json.loads(chat(server, ASK, response_format=form, max_tokens=100).choices[0].message.content)
    assert answer["a"] in (1, 2)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"thinking": "on"}, "thinking"),
        ({"enable_thinking": True}, "thinking"),
        ({"thinking_budget": 4}, "thinking"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, "messages"),
    ],
)
def test_what_its_template_cannot_say_is_refused(server: Server, options: dict[str, Any], param: str) -> None:
    reply = server.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 2, **options})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


def test_a_switch_in_the_text_is_only_text(server: Server) -> None:
    assert chat(server, [{"role": "user", "content": "gcd? /think"}]).choices[0].finish_reason in ("stop", "length")
