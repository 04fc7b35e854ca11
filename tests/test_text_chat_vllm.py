"""vLLM's own parsers read our text, where vLLM is installed: reasoning first, then calls, as its server runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chats import TOKENIZER
from turbos.text.chat import prompt_ids, render
from turbos.text.messages import Message, ToolCall

pytest.importorskip("vllm")
transformers = pytest.importorskip("transformers")
reasoning = pytest.importorskip("vllm.reasoning")
tool_parsers = pytest.importorskip("vllm.tool_parsers")
protocol = pytest.importorskip("vllm.entrypoints.openai.chat_completion.protocol")

USER = Message("user", "fox?")
CALLS = (ToolCall("add", '{"a": 12}'), ToolCall("add", '{"a": 3, "s": "</b> é"}'))
ANSWERS = {
    "all": Message("assistant", "so 1", "hm 2\n\n", tool_calls=CALLS),
    "call": Message("assistant", "", "x", tool_calls=CALLS[:1]),
    "content": Message("assistant", "dog 日本", "fox"),
}


@pytest.mark.parametrize("parser", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("name", list(ANSWERS))
def test_its_parsers_read_our_answers(tmp_path: Path, parser: str, mode, name: str) -> None:
    answer = ANSWERS[name]
    prompt = prompt_ids(TOKENIZER, [USER], mode)
    ids = render(TOKENIZER, [USER, answer]).ids[len(prompt) :]
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    request = protocol.ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "fox?"}], tools=[tool])
    text = theirs.decode(ids, skip_special_tokens=True)
    reader = reasoning.ReasoningParserManager.get_reasoning_parser(parser)(theirs)
    thinking, rest = reader.extract_reasoning(text, request)
    found = tool_parsers.ToolParserManager.get_tool_parser("hermes")(theirs).extract_tool_calls(rest or "", request)
    assert (thinking, found.content or "") == (answer.thinking, answer.content)
    calls = [ToolCall(call.function.name, json.dumps(json.loads(call.function.arguments))) for call in found.tool_calls]
    assert calls == list(answer.tool_calls)
