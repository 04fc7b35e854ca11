"""Text as it comes: every cut of a text gives the same in sum, whole characters, and nothing of a stop string."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from turbos.engine.stop_text import StopText

ALPHABET = "aaabbc é語🙂"


def truth(text: str, stops: list[str]) -> tuple[str, bool]:
    """Letter by letter: the first place where some stop string is complete; of several, the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@given(
    st.text(ALPHABET, max_size=24),
    st.lists(st.text(ALPHABET, min_size=1, max_size=5), max_size=4),
    st.lists(st.integers(0, 60), max_size=8),
)
@example("the end", ["end"], [4, 5, 6])
@example("aab", ["aaa", "ab"], [1, 2])
@example("abc", ["abc", "b"], [])
def test_every_cut_of_a_text_stops_at_the_same_place(text: str, stops: list[str], cuts: list[int]) -> None:
    content = text.encode()
    borders = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    reader, given_text = StopText(stops), ""
    want, stopped = truth(text, stops)
    for start, end in pairwise(borders):
        given_text += reader.feed(content[start:end])
        assert want.startswith(given_text), "a piece that was given is never taken back"
    assert given_text + reader.finish() == want
    assert reader.stopped == stopped


@given(st.lists(st.integers(0, tiny_tokenizer().vocab_size + 3), max_size=30))
def test_pieces_of_any_tokens_are_their_decoded_text(ids: list[int]) -> None:
    tokenizer, reader = tiny_tokenizer(), StopText()
    pieces = [reader.feed(tokenizer.token_bytes(id)) for id in ids]
    assert "".join(pieces) + reader.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("letter", ["é", "語", "🙂"])
def test_no_piece_holds_half_a_letter(letter: str) -> None:
    reader = StopText()
    pieces = [reader.feed(bytes([byte])) for byte in letter.encode()]
    assert pieces == [""] * (len(pieces) - 1) + [letter]
    cut = StopText()
    assert cut.feed(letter.encode()[:-1]) == "" and cut.finish() == "\N{REPLACEMENT CHARACTER}"


def test_text_is_not_held_longer_than_it_must_be() -> None:
    reader = StopText(("stop!",))
    assert [reader.feed(piece) for piece in (b"a st", b"op", b" stop", b"s", b"top!", b"more")] == [
        "a ",
        "",
        "stop ",
        "stop",
        "",
        "",
    ]
    assert reader.stopped and reader.finish() == ""


def test_a_replacement_character_at_the_end_may_complete_a_stop_string() -> None:
    reader = StopText(("x\N{REPLACEMENT CHARACTER}",))
    assert reader.feed(b"ax\xe8") == "a" and reader.finish() == "" and reader.stopped
