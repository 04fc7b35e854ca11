"""The tokenizer: text stays text, and its files say the same to other programs."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from turbos.common.errors import UserError
from turbos.text.tokenizer import SPECIALS, TAGS, Tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog 1234567890.\n\ndef f(x):\n    return x",
    "天地玄黄，宇宙洪荒。",
] * 20
TOKENIZER = Tokenizer.train(TEXTS, vocab_size=400)
WILD = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.sampled_from(
    [*SPECIALS[:13], "<think>1</think>", "a<|end|>b", "\0", "", "1" * 50, " \n\t ", "é\u0301", "日本"]
)


@given(WILD)
def test_any_text_comes_back_and_holds_no_special_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not set(ids) & TOKENIZER.special_ids
    assert TOKENIZER.encode_batch([text, text]) == [ids, ids]


def test_digits_are_single_and_sizes_are_round() -> None:
    assert len(TOKENIZER.encode("98765")) == 5
    assert TOKENIZER.vocab_size % 8 == 0 and TOKENIZER.vocab_size <= 400
    assert [TOKENIZER.special(name) for name in SPECIALS] == list(range(len(SPECIALS)))


def test_saved_tokenizer_is_the_same(tmp_path) -> None:
    TOKENIZER.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == TOKENIZER.fingerprint
    assert again.encode("fox <think> 12") == TOKENIZER.encode("fox <think> 12")
    assert again.fingerprint != Tokenizer.train(TEXTS, vocab_size=320).fingerprint


def test_transformers_reads_it(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS[:2], " x  y\n\n", "12 34"):
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
    assert len(theirs) == TOKENIZER.vocab_size
    tags = [TOKENIZER.special(tag) for tag in TAGS]
    assert theirs.decode([*tags, TOKENIZER.special("<|end|>")], skip_special_tokens=True) == "".join(TAGS)


def test_old_files_that_mark_tags_as_special_are_read_alike(tmp_path) -> None:
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert sorted(token["content"] for token in content["added_tokens"] if not token["special"]) == sorted(TAGS)
    for token in content["added_tokens"]:
        token["special"] = True
    path.write_text(json.dumps(content), encoding="utf-8")
    assert Tokenizer.load(tmp_path).fingerprint == TOKENIZER.fingerprint


def test_a_foreign_tokenizer_is_written_back_as_it_was_read(tmp_path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.add_special_tokens(["<|im_end|>"])
    files = {"tokenizer.json": backend.to_str(pretty=True), "tokenizer_config.json": '{"chat_template": "x"}'}
    (tmp_path / "theirs").mkdir()
    for name, text in files.items():
        (tmp_path / "theirs" / name).write_text(text, encoding="utf-8")
    foreign = Tokenizer.load(tmp_path / "theirs")
    assert not foreign.speaks_chat and TOKENIZER.speaks_chat
    foreign.save(tmp_path / "ours")
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "ours").iterdir()} == files


@given(st.lists(st.integers(0, TOKENIZER.vocab_size + 3), max_size=12))
def test_token_bytes_add_up_to_the_decoded_text(ids: list[int]) -> None:
    assert b"".join(map(TOKENIZER.token_bytes, ids)).decode(errors="replace") == TOKENIZER.decode(ids)


def test_user_mistakes_are_named(tmp_path) -> None:
    with pytest.raises(UserError, match="multiple of 8"):
        Tokenizer.train(TEXTS, vocab_size=401)
    with pytest.raises(UserError, match="empty corpus"):
        Tokenizer.train([], vocab_size=400)
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot read tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no special token"):
        TOKENIZER.special("<|nope|>")
