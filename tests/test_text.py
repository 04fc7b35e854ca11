"""The tokenizer and the chat renderer: text stays text, and conversations only grow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbos.common.errors import UserError
from turbos.text.chat import Message, parse, prompt_ids, render
from turbos.text.tokenizer import SPECIALS, Tokenizer

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
    turns = [{"role": "user", "content": "fox?"}, {"role": "assistant", "content": "dog", "thinking": "x"}]
    ours = render(TOKENIZER, [Message("user", "fox?"), Message("assistant", "dog", "x")]).ids
    assert theirs.decode(theirs.apply_chat_template(turns, tokenize=True, return_dict=False)) == TOKENIZER.decode(ours)
    assert len(theirs) == TOKENIZER.vocab_size


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


TURNS = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "tool"]), WILD)
    | st.builds(Message, st.just("assistant"), WILD, st.none() | WILD),
    max_size=5,
)


@given(TURNS)
def test_rendering_only_grows_and_weights_only_the_assistant(turns: list[Message]) -> None:
    whole = render(TOKENIZER, turns)
    for count in range(len(turns)):
        part = render(TOKENIZER, turns[:count])
        assert whole.ids[: len(part.ids)] == part.ids and whole.loss_weights[: len(part.ids)] == part.loss_weights
    assistant, end = TOKENIZER.special("<|assistant|>"), TOKENIZER.special("<|end|>")
    weight = 0.0
    for id, given_weight in zip(whole.ids, whole.loss_weights, strict=True):
        assert given_weight == weight
        weight = 1.0 if id == assistant else 0.0 if id == end else weight


@given(WILD, st.none() | WILD)
def test_parse_undoes_render_and_generated_ids_are_verbatim(content: str, thinking: str | None) -> None:
    question = Message("user", "fox?")
    ids = render(TOKENIZER, [question, Message("assistant", content, thinking)]).ids
    prompt = prompt_ids(TOKENIZER, [question])
    assert list(ids[: len(prompt)]) == prompt
    turn = parse(TOKENIZER, ids[len(prompt) :])
    assert (turn.role, turn.content, turn.thinking) == ("assistant", content, thinking)
    assert render(TOKENIZER, [question, turn]).ids == ids


def test_modes_open_and_close_thinking() -> None:
    question = [Message("user", "fox?")]
    opening, closing = TOKENIZER.special("<think>"), TOKENIZER.special("</think>")
    auto = prompt_ids(TOKENIZER, question)
    assert prompt_ids(TOKENIZER, question, "on") == [*auto, opening]
    assert prompt_ids(TOKENIZER, question, "off") == [*auto, opening, closing]
    off = render(TOKENIZER, [*question, Message("assistant", "dog", "")]).ids
    assert list(off[: len(auto) + 2]) == [*auto, opening, closing]
    with pytest.raises(UserError, match="auto, on or off"):
        prompt_ids(TOKENIZER, question, "maybe")  # type: ignore[arg-type]


@settings(max_examples=200)
@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1) | st.integers(0, 12), max_size=20))
def test_parse_takes_any_ids(ids: list[int]) -> None:
    turn = parse(TOKENIZER, ids)
    assert turn.role == "assistant" and turn.ids == tuple(ids)[: len(turn.ids or ())]


def test_unclosed_thinking_is_all_there_is() -> None:
    turn = parse(TOKENIZER, [TOKENIZER.special("<think>"), *TOKENIZER.encode("fox")])
    assert (turn.thinking, turn.content) == ("fox", "")
    stray = parse(TOKENIZER, [*TOKENIZER.encode("fox"), TOKENIZER.special("</think>"), *TOKENIZER.encode("dog")])
    assert (stray.thinking, stray.content) == ("fox", "dog")


@pytest.mark.parametrize(
    ("turn", "said"), [(Message("robot", "x"), "unknown role"), (Message("user", "x", "y"), "cannot carry thinking")]
)
def test_impossible_turns_are_refused(turn: Message, said: str) -> None:
    with pytest.raises(UserError, match=said):
        render(TOKENIZER, [turn])
