"""llama-server's own parsers read our text: its template engine renders our twin, its parser reads a scripted answer.

The model is a GPT-2 of one layer whose output depends on the position alone, so that it says exactly what a test wrote
down; the server around it is llama.cpp's, through the xllamacpp wheel.
"""

from __future__ import annotations

import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chats import TOKENIZER
from turbos.text.chat import prompt_ids, render
from turbos.text.messages import Message, Tool, ToolCall

gguf = pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")

TOOL = Tool(
    json.dumps(
        {
            "type": "function",
            "function": {
                "name": "add",
                "description": "Add <b>é</b>.",
                "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            },
        }
    )
)
TURNS = (
    Message("system", "be"),
    Message("user", "add é"),
    Message("assistant", "so", "hm", tool_calls=(ToolCall("add", '{"a": 1}'),)),
    Message("tool", "3"),
)
# Answers, and what is asked of thinking before them.
ANSWERS = {
    "auto": Message("assistant", "dog 1"),
    "auto thinks": Message("assistant", "dog 1", "fox", tool_calls=(ToolCall("add", '{"a": 5}'),)),
    "all": Message("assistant", "so 1", "hm 2", tool_calls=(ToolCall("add", '{"a": 12}'), ToolCall("add", '{"a": 3}'))),
    "content": Message("assistant", "dog 日本", "fox\n\n"),
    "off": Message("assistant", "dog", ""),
    "call": Message("assistant", "", "", tool_calls=(ToolCall("add", '{"a": 4}'),)),
}
POSITIONS = 512


def write_model(path: Path, prompt: list[int], whole: list[int]) -> None:
    """A GGUF file whose model goes on from `prompt` as `whole` does, by position."""
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(POSITIONS)
    writer.add_feed_forward_length(32)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.add_layer_norm_eps(1e-5)
    write_tokenizer(writer)
    size = TOKENIZER.vocab_size
    output = np.zeros((size, POSITIONS), np.float32)
    for position in range(len(prompt) - 1, len(whole) - 1):
        output[whole[position + 1], position] = 10.0
    shapes = {"attn_qkv": (3 * POSITIONS, POSITIONS), "attn_output": (POSITIONS, POSITIONS)}
    shapes |= {"ffn_up": (32, POSITIONS), "ffn_down": (POSITIONS, 32)}
    tensors = {"token_embd.weight": np.zeros((size, POSITIONS)), "position_embd.weight": np.eye(POSITIONS)}
    for name, shape in shapes.items():
        tensors |= {f"blk.0.{name}.weight": np.zeros(shape), f"blk.0.{name}.bias": np.zeros(shape[0])}
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        tensors |= {f"{name}.weight": np.ones(POSITIONS), f"{name}.bias": np.zeros(POSITIONS)}
    for name, tensor in {**tensors, "output.weight": output}.items():
        writer.add_tensor(name, tensor.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: Any) -> None:
    """The tokenizer and its chat template, from what it saves."""
    with tempfile.TemporaryDirectory() as directory:
        TOKENIZER.save(directory)
        content = json.loads(Path(directory, "tokenizer.json").read_text(encoding="utf-8"))
    names = {id: name for name, id in content["model"]["vocab"].items()}
    types = dict.fromkeys(names, gguf.TokenType.NORMAL)
    for token in content["added_tokens"]:
        names[token["id"]] = token["content"]
        types[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([names[id] for id in sorted(names)])
    writer.add_token_types([types[id] for id in sorted(names)])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_eos_token_id(TOKENIZER.special("<|end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TOKENIZER.chat_template)


def request_of(turns: tuple[Message, ...]) -> list[dict[str, Any]]:
    """Turns as OpenAI's interface writes them; arguments are text there."""
    messages = []
    for turn in turns:
        found: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.thinking is not None:
            found["reasoning_content"] = turn.thinking
        if turn.tool_calls:
            calls = [{"name": call.name, "arguments": call.arguments} for call in turn.tool_calls]
            found["tool_calls"] = [{"id": "c", "type": "function", "function": call} for call in calls]
        messages.append(found)
    return messages


class Server:
    """llama-server with a scripted model."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = POSITIONS, 1, 1
        params.use_jinja, params.warmup = True, False
        self._server = xllamacpp.Server(params)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The answer to a request, JSON or the text of a stream; an error's text where it failed."""
        data = json.dumps(body).encode()
        address = self._server.listening_address + path
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.read().decode()
        return text if body.get("stream") else json.loads(text)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tmp_path_factory.mktemp("llama") / "model.gguf"
    write_model(path, [0], [0])
    yield Server(path)


MODES = [
    ({}, "on"),
    ({"enable_thinking": False}, "off"),
    ({"thinking": "auto"}, "auto"),
    ({"thinking": "budget 12"}, "on"),
    ({"reasoning_effort": "none"}, "off"),
]


@pytest.mark.parametrize(("asked", "mode"), MODES)
def test_its_engine_renders_our_twin_and_its_tokenizer_gives_our_tokens(server: Server, asked, mode) -> None:
    body = {"messages": request_of(TURNS), "tools": [json.loads(TOOL.definition)], "chat_template_kwargs": asked}
    prompt = server.post("/apply-template", body)["prompt"]
    ours = prompt_ids(TOKENIZER, TURNS, mode, [TOOL])
    assert prompt == TOKENIZER.decode(ours)
    tokens = server.post("/tokenize", {"content": prompt, "add_special": False, "parse_special": True})["tokens"]
    assert tokens == ours


def test_it_refuses_text_that_spells_special_tokens(server: Server) -> None:
    answer = server.post("/apply-template", {"messages": [{"role": "user", "content": "a<|end|>"}]})
    assert "spells the special token <|end|>" in answer


@pytest.mark.parametrize("name", list(ANSWERS))
@pytest.mark.parametrize("stream", [False, True])
def test_its_parser_reads_our_answers(tmp_path: Path, name: str, stream: bool) -> None:
    answer, turns = ANSWERS[name], TURNS[:2]
    mode = "auto" if name.startswith("auto") else "on" if answer.thinking else "off"
    prompt = prompt_ids(TOKENIZER, turns, mode, [TOOL])
    whole = list(render(TOKENIZER, (*turns, answer), [TOOL]).ids)
    assert whole[: len(prompt)] == prompt
    write_model(tmp_path / "model.gguf", prompt, whole)
    body = {
        "messages": request_of(turns),
        "tools": [json.loads(TOOL.definition)],
        "parallel_tool_calls": True,
        "chat_template_kwargs": {"thinking": mode},
        "temperature": 0,
        "max_tokens": 200,
        "stream": stream,
    }
    found = Server(tmp_path / "model.gguf").post("/v1/chat/completions", body)
    message = joined(found) if stream else found["choices"][0]["message"]
    assert (message.get("content") or "") == answer.content
    assert (message.get("reasoning_content") or "") == (answer.thinking or "")
    calls = [call["function"] for call in message.get("tool_calls") or []]
    assert [ToolCall(call["name"], call["arguments"]) for call in calls] == list(answer.tool_calls)


def joined(events: str) -> dict[str, Any]:
    """The message that a stream of server-sent events adds up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for line in events.splitlines():
        if not line.startswith("data: {"):
            continue
        delta = json.loads(line.removeprefix("data: "))["choices"][0]["delta"]
        for field in ("content", "reasoning_content"):
            message[field] += delta.get(field) or ""
        for part in delta.get("tool_calls") or []:
            calls = message["tool_calls"]
            while len(calls) <= part["index"]:
                calls.append({"function": {"name": "", "arguments": ""}})
            for field, text in part["function"].items():
                calls[part["index"]]["function"][field] += text
    return message
