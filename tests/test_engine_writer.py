"""Answers as they are written: ends, texts, log-probabilities, and budgets that hold under any logits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from turbos.engine.sampler import Choice, Sampler
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.writer import Writer, Written

VOCABULARY = tiny_tokenizer().vocab_size
OPEN, CLOSE, ASSISTANT, END = (
    tiny_tokenizer().special(name) for name in ("<think>", "</think>", "<|assistant|>", "<|end|>")
)


def writer_of(
    params: SamplingParams, eos: frozenset[int] = frozenset({END}), prompt: tuple[int, ...] = (60,)
) -> Writer:
    """A writer with the tiny tokenizer."""
    return Sampler(VOCABULARY, tiny_tokenizer()).writer(params, prompt, 0, eos)


def write(writer: Writer, ids: list[int]) -> list[Written]:
    """What each token adds, until the answer ends."""
    found: list[Written] = []
    for number, id in enumerate(ids):
        if writer.finish is not None:
            break
        found.append(writer.accept(id, -float(number), ((id, -float(number)),)))
    return found


def test_a_stop_id_is_kept_as_an_id_but_is_no_text() -> None:
    ids = [*tiny_tokenizer().encode("gcd 6"), END]
    writer = writer_of(SamplingParams(logprobs=1))
    pieces = write(writer, [*ids, 60])
    assert writer.ids == ids and writer.text == "gcd 6" and writer.finish == "stop" == pieces[-1].finish
    assert "".join(piece.text for piece in pieces) == "gcd 6"
    assert writer.logprobs == [-float(number) for number in range(len(ids))] and len(writer.tops) == len(ids)


def test_stop_ids_of_a_request_replace_the_engines() -> None:
    ids = tiny_tokenizer().encode("add")
    writer = writer_of(SamplingParams(stop_ids=frozenset({ids[-1]}), max_new_tokens=50))
    write(writer, [END, *ids])
    assert writer.ids == [END, *ids] and writer.finish == "stop"
    nothing = writer_of(SamplingParams(stop_ids=frozenset(), max_new_tokens=3))
    write(nothing, [END, 0, END, 60])
    assert nothing.ids == [END, 0, END] and nothing.finish == "length"


@pytest.mark.parametrize(("limit", "finish"), [(2, "length"), (3, "stop"), (4, "stop")])
def test_a_stop_as_the_last_token_is_a_stop(limit: int, finish: str) -> None:
    for params, ids in (
        (SamplingParams(max_new_tokens=limit), [60, 61, END]),
        (SamplingParams(max_new_tokens=limit, stop=("2",)), [60, 61, *tiny_tokenizer().encode("2")]),
    ):
        writer = writer_of(params)
        write(writer, ids)
        assert writer.finish == finish and len(writer.ids) == min(limit, 3)


def test_an_answer_that_has_ended_takes_no_more() -> None:
    writer = writer_of(SamplingParams(max_new_tokens=1))
    write(writer, [60])
    with pytest.raises(ValueError, match="has ended"):
        writer.accept(61, 0.0)


def test_what_was_held_back_is_given_at_every_end() -> None:
    half, st_ = "é".encode()[:1], tiny_tokenizer().encode("st")
    (broken,) = [id for id in range(VOCABULARY) if tiny_tokenizer().token_bytes(id) == half]
    for end in ("stop", "length", "error"):
        writer = writer_of(SamplingParams(max_new_tokens=len(st_) + 1 + (end != "length"), stop=("stx",)))
        pieces = write(writer, [*st_, broken, *([END] if end == "stop" else [])])
        if end == "error":
            pieces.append(writer.fail("because"))
        assert writer.finish == end == pieces[-1].finish
        assert writer.text == "".join(piece.text for piece in pieces) == "st\N{REPLACEMENT CHARACTER}"
    assert writer.reason == "because"


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.sampled_from(range(VOCABULARY)), max_size=40),
    stops=st.lists(st.text("gcd 16é", min_size=1, max_size=3), max_size=2),
)
def test_pieces_are_the_text_and_the_text_is_decoded(ids: list[int], stops: list[str]) -> None:
    writer = writer_of(SamplingParams(max_new_tokens=30, stop=tuple(stops)))
    pieces = write(writer, ids)
    if writer.finish is None:
        pieces.append(writer.fail("over"))
    assert "".join(piece.text for piece in pieces) == writer.text
    whole = tiny_tokenizer().decode(writer.ids[:-1] if writer.ids[-1:] == [END] else writer.ids)
    assert writer.text is not None and whole.startswith(writer.text)
    assert writer.text == whole or any(whole[len(writer.text) :].startswith(stop) for stop in stops)
    assert not any(stop in writer.text for stop in stops)


@settings(max_examples=60, deadline=None)
@given(
    budget=st.integers(0, 30),
    opening=st.sampled_from([(), (OPEN,), (OPEN, CLOSE), (OPEN, 60)]),
    temperature=st.sampled_from([0.0, 1.0]),
    likely=st.sampled_from([OPEN, CLOSE, 60, END]),
    seed=st.integers(0, 1000),
)
def test_no_logits_think_longer_than_the_budget(
    budget: int, opening: tuple[int, ...], temperature: float, likely: int, seed: int
) -> None:
    sampler = Sampler(VOCABULARY, tiny_tokenizer())
    params = SamplingParams(temperature=temperature, thinking_budget=budget, max_new_tokens=60, seed=seed)
    writer = sampler.writer(params, (3, 60, ASSISTANT, *opening), 0, {END})
    generator = torch.Generator().manual_seed(seed)
    while writer.finish is None:
        logits_1V = torch.randn(1, VOCABULARY, generator=generator)
        logits_1V[0, likely] += 6
        (choice,) = sampler.sample(logits_1V, [writer])
        assert isinstance(choice, Choice)
        assert choice.logprob == pytest.approx(float(torch.log_softmax(logits_1V[0], -1)[choice.token]), abs=1e-4)
        writer.accept(choice.token, choice.logprob)
    body = [*opening, *writer.ids]
    thinking = body[1 : body.index(CLOSE)] if CLOSE in body else body[1:]
    if body[0] == OPEN:
        assert len([id for id in thinking if id != END]) <= max(budget, len(opening) - 1)
        assert CLOSE in body or writer.finish == "stop" or budget >= 60
    assert OPEN not in body[1:] or (body[0] == OPEN and body.index(OPEN, 1) < body.index(CLOSE))
    assert CLOSE not in body or body[0] == OPEN
