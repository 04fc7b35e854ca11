"""Conversations as documents: loss where the renderer puts it, read from JSON lines, never cut, refused in one line."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from tiny import tiny_tokenizer
from turbos.common.errors import UserError
from turbos.common.records import IGNORED
from turbos.data.chats import ChatTargets, read_chats, rendered_chats
from turbos.data.loader import Loader, Part, Waiting, batches_once
from turbos.data.problems import families, make_problem, problem_sample
from turbos.data.shards import ShardReader, write_rendered, write_shard
from turbos.text.chat import Message, ToolCall, render

TARGETS = ChatTargets.of(tiny_tokenizer())


@pytest.mark.parametrize("mode", ["think", "short"])
def test_weights_of_problems_are_those_of_fine_tuning(mode: str) -> None:
    for family, seed in itertools.product(families(), range(3)):
        sample = problem_sample(tiny_tokenizer(), make_problem(family, seed), mode)  # type: ignore[arg-type]
        assert TARGETS.weights(np.array(sample.ids)).tolist() == [weight > 0 for weight in sample.loss_weights]


def test_weights_of_conversations_are_those_of_the_renderer() -> None:
    messages = [
        Message("system", "be brief <|assistant|>"),
        Message("user", "add 12 and 34"),
        Message("assistant", "", thinking="12+34", tool_calls=(ToolCall("add", '{"a": 12}'),)),
        Message("tool", "46"),
        Message("assistant", "46"),
        Message("user", "again?"),
        Message("assistant", "46 <|end|> 46", thinking="6 6"),
    ]
    rendered = render(tiny_tokenizer(), messages)
    assert TARGETS.weights(np.array(rendered.ids)).tolist() == [weight > 0 for weight in rendered.loss_weights]
    assert 0 < sum(rendered.loss_weights) < len(rendered.ids)


def chat_file(path: Path, turns: list[tuple[str, str]]) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_files_are_read_with_thinking_under_any_of_its_names(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turn = {"role": "assistant", "content": "6", "reasoning_content": "18-12=6"}
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "gcd"}, turn], "id": 3}) + "\n\n")
    (messages,) = read_chats(path)
    assert messages == (Message("user", "gcd"), Message("assistant", "6", thinking="18-12=6"))
    assert list(rendered_chats(path, tiny_tokenizer())) == [render(tiny_tokenizer(), messages).ids]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is no conversation"),
        ("[1]", "line 2 is no conversation: an object with a list of messages"),
        ('{"messages": [{"role": "user"}]}', "line 2 is no conversation: lacks 'content'"),
        ('{"messages": [{"role": "user", "content": 3}]}', "line 2 is no conversation: role, content"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2 is no conversation: no turn of the assistant"),
        ('{"messages": ["x"]}', "line 2 is no conversation: a message is an object"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "conversation 2: message 0, role"),
        ("[" * 100_000, "line 2 is no conversation"),
        ("\x00\ufffd", "line 2 is no conversation"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = chat_file(tmp_path / "a.jsonl", [("a", "b")])
    path.write_text(path.read_text() + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=said) as error:
        list(rendered_chats(path, tiny_tokenizer()))
    assert "\n" not in str(error.value)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no conversations at"):
        list(read_chats(tmp_path / "none.jsonl"))
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_chats(tmp_path / "b.jsonl"))


def chat_part(folder: Path, lengths: list[int]) -> tuple[Part, list[tuple[int, ...]]]:
    """A source of conversations with answers of so many `x`, and their tokens."""
    turns = [(f"number {number}", "x" * length) for number, length in enumerate(lengths)]
    ids = list(rendered_chats(chat_file(folder / "chats.jsonl", turns), tiny_tokenizer()))
    write_rendered(folder / "chats.shard", ids, tiny_tokenizer())
    return Part("chats", (ShardReader(folder / "chats.shard", tiny_tokenizer()),), 1.0, TARGETS), ids


def test_conversations_are_never_cut_and_long_ones_wait(tmp_path: Path) -> None:
    part, ids = chat_part(tmp_path, [3, 200, 5, 90, 2, 300])
    loader = Loader([part], 128, seed=0, longest_document=64)
    long = [number for number, tokens in enumerate(ids) if len(tokens) > 64]
    assert long == [1, 3, 5]
    assert loader.waiting == [Waiting("chats", "chats.shard", number, len(ids[number])) for number in long]
    seen = set()
    for step in range(2 * loader.slots_in_epoch("chats")):
        batch = loader.batch(step)
        tokens = batch.tokens_T.tolist()
        seen |= {tuple(tokens[start:end]) for start, end in itertools.pairwise(batch.documents.borders)}
    assert seen == {ids[number] for number in (0, 2, 4)}


def test_loss_lies_on_the_assistant_only_beside_texts_with_loss_everywhere(tmp_path: Path) -> None:
    part, _ = chat_part(tmp_path, [3, 9, 5, 4])
    texts = ["some text of its own"] * 1 + [f"text {number}" for number in range(20)]
    write_shard(tmp_path / "texts.shard", texts, tiny_tokenizer())
    text_part = Part("texts", (ShardReader(tmp_path / "texts.shard", tiny_tokenizer()),))
    loader = Loader([text_part, part], 128, seed=0, longest_document=64)
    kinds = set()
    for step in range(6):
        batch = loader.batch(step)
        for start, end in itertools.pairwise(batch.documents.borders):
            ids = batch.tokens_T[start:end].numpy()
            weights = TARGETS.weights(ids)[1:]
            is_chat = TARGETS.assistant in ids
            kinds.add(is_chat)
            expected = np.where(weights, ids[1:], IGNORED) if is_chat else ids[1:]
            assert batch.targets_T[start : end - 1].tolist() == expected.tolist()
            assert int(batch.targets_T[end - 1]) == IGNORED
        assert batch.loss_weights_T.tolist() == (batch.targets_T != IGNORED).float().tolist()
    assert kinds == {False, True}
    held = list(batches_once(part.readers[0], 64, TARGETS))
    assert sum(int((batch.targets_T != IGNORED).sum()) for batch in held) == sum(
        int(TARGETS.weights(document).sum()) for document in part.readers[0].documents()
    )


def test_a_source_whose_every_conversation_is_too_long_is_refused(tmp_path: Path) -> None:
    part, _ = chat_part(tmp_path, [200, 300])
    with pytest.raises(UserError, match="all 2 conversations of 'chats' are longer than 64 tokens"):
        Loader([part], 64)
