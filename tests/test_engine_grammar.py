"""Constrained output under random logits: what ends by itself always parses; grammars of strangers break nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from turbos.common.errors import UserError
from turbos.engine.grammar import KEPT_GRAMMARS, GrammarCompiler
from turbos.engine.sampler import NOTHING, Choice, Sampler
from turbos.engine.sampling_params import Grammar, SamplingParams
from turbos.engine.writer import Writer

PADDED = 384
"""The model's vocabulary: more ids than the tokenizer has."""

OPEN, CLOSE, ASSISTANT, END = (
    tiny_tokenizer().special(name) for name in ("<think>", "</think>", "<|assistant|>", "<|end|>")
)
EOS = frozenset({END, 0})

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None, 2.5]}, "maxItems": 3},
        "inner": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@cache
def sampler() -> Sampler:
    """One for all tests: its grammars are kept."""
    return Sampler(PADDED, tiny_tokenizer())


def run(writers: Sequence[Writer], seed: int, scale: float = 3.0) -> None:
    """Drive writers by random logits until each has ended."""
    generator = torch.Generator().manual_seed(seed)
    while running := [writer for writer in writers if writer.finish is None]:
        logits_BV = torch.randn(len(running), PADDED, generator=generator) * scale
        for writer, choice in zip(running, sampler().sample(logits_BV, running), strict=True):
            assert isinstance(choice, Choice)
            writer.accept(choice.token, choice.logprob)


def answers(
    grammar: Grammar, count: int, limit: int = 400, temperature: float = 1.0, prompt: Sequence[int] = (60,)
) -> list[Writer]:
    """Answers of random logits under a grammar."""
    params = SamplingParams(temperature=temperature, grammar=grammar, max_new_tokens=limit, n=count)
    writers = [sampler().writer(params, prompt, place, EOS) for place in range(count)]
    run(writers, seed=count)
    for writer in writers:
        assert writer.finish in ("stop", "length") and writer.text == tiny_tokenizer().decode(without_end(writer.ids))
        inside = without_end(writer.ids)
        assert all(id < tiny_tokenizer().vocab_size and id not in tiny_tokenizer().special_ids for id in inside)
    return writers


def without_end(ids: list[int]) -> list[int]:
    """An answer's tokens less the one that ended it."""
    return ids[:-1] if ids and ids[-1] in EOS else ids


def ended(writers: list[Writer]) -> list[str]:
    """Texts of the answers that were not cut off, most of them at least."""
    texts = [writer.text or "" for writer in writers if writer.finish == "stop"]
    assert len(texts) > len(writers) / 4
    return texts


def check_person(person: dict[str, object]) -> None:
    """A hand-written reading of the schema."""
    assert {"name", "age", "tags"} <= set(person) <= set(PERSON["properties"])  # type: ignore[call-overload]
    assert isinstance(person["name"], str) and len(person["name"]) <= 8
    assert type(person["age"]) is int and 0 <= person["age"] <= 150
    assert isinstance(person["tags"], list) and len(person["tags"]) <= 3
    assert all(tag in ("a", "b", None, 2.5) for tag in person["tags"])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_schemas_always_parse(temperature: float) -> None:
    for text in ended(answers(Grammar("json_schema", json.dumps(PERSON)), 24, temperature=temperature)):
        check_person(json.loads(text))


def test_json_is_an_object() -> None:
    texts = [writer.text or "" for writer in answers(Grammar("json"), 60) if writer.finish == "stop"]
    assert len(texts) >= 5 and all(isinstance(json.loads(text), dict) for text in texts)


@pytest.mark.parametrize(
    "pattern", ["[0-9]{3,20}", "(yes|no|maybe)( [a-c]{2}){0,3}", r"[0-9]+\.[0-9]+", "é(語|🙂){1,3}x", "."]
)
def test_expressions_match_to_the_last_letter(pattern: str) -> None:
    for text in ended(answers(Grammar("regex", pattern), 40, limit=100)):
        assert re.fullmatch(pattern, text), text


def test_choices_are_given_as_they_are() -> None:
    choices = ["yes", "no", 'a "quoted" \\ one', "line\nbreak", "語🙂", "yes and no", "  "]
    texts = ended(answers(Grammar.choice(choices), 80, limit=60))
    assert set(texts) <= set(choices) and len(set(texts)) >= 4


def test_lark_grammars_are_followed() -> None:
    grammar = Grammar("lark", 'start: sum\nsum: NUMBER (" + " NUMBER)*\nNUMBER: /[1-9][0-9]{0,3}/')
    for text in ended(answers(grammar, 40, limit=80)):
        assert re.fullmatch(r"[1-9]\d{0,3}( \+ [1-9]\d{0,3})*", text)


def test_an_answer_ends_where_nothing_can_follow_even_without_end_tokens() -> None:
    writer = sampler().writer(SamplingParams(grammar=Grammar.choice(["yes"])), [60])
    run([writer], seed=0)
    assert writer.text == "yes" and writer.finish == "stop" and not set(writer.ids) & EOS


def test_end_tokens_are_for_whole_answers_only() -> None:
    # The model wants nothing but to stop.
    logits_1V = torch.zeros(1, PADDED)
    logits_1V[0, END] = 50.0
    writer = sampler().writer(SamplingParams(grammar=Grammar("regex", "[0-9]{2,9}")), [60], 0, EOS)
    while writer.finish is None:
        (choice,) = sampler().sample(logits_1V, [writer])
        assert isinstance(choice, Choice)
        writer.accept(choice.token, choice.logprob)
    assert writer.finish == "stop" and writer.ids[-1] == END and re.fullmatch("[0-9]{2}", writer.text or "")


def test_an_ordinary_stop_token_is_for_whole_answers_only() -> None:
    stop = tiny_tokenizer().encode("7")[0]
    params = SamplingParams(grammar=Grammar("regex", "[0-9]{2,9}"), stop_ids=frozenset({stop}))
    logits_1V = torch.zeros(1, PADDED)
    logits_1V[0, stop] = 50.0
    writer = sampler().writer(params, [60])
    for _ in range(3):
        (choice,) = sampler().sample(logits_1V, [writer])
        assert isinstance(choice, Choice)
        writer.accept(choice.token, choice.logprob)
    assert writer.finish == "stop" and re.fullmatch("[0-68-9]{2}", writer.text or "")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("likely", range(tiny_tokenizer().vocab_size, PADDED, 16))
def test_padding_ids_are_never_produced_under_a_grammar(likely: int, temperature: float) -> None:
    logits_1V = torch.zeros(1, PADDED)
    logits_1V[0, likely] = 1000.0
    writer = sampler().writer(SamplingParams(temperature=temperature, grammar=Grammar("regex", ".{4}")), [60], 0, EOS)
    for _ in range(3):
        (choice,) = sampler().sample(logits_1V, [writer])
        assert isinstance(choice, Choice) and choice.token < tiny_tokenizer().vocab_size
        writer.accept(choice.token, choice.logprob)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "[0-9", "unclosed character class|invalid regex"),
        ("regex", "", "cannot be met"),
        ("regex", "(?=a)b", "cannot be compiled"),
        ("lark", "start: nobody", 'unknown name: "nobody"'),
        ("lark", "", "cannot be compiled"),
        ("lark", "start: X\nX: /a/ & /b/", "cannot be met"),
        ("lark", 'start: <think> "a"', "cannot be met"),
        ("json_schema", "{", "is not JSON"),
        ("json_schema", "[" * 100_000, "is not JSON"),
        ("json_schema", "3", "must be a JSON object"),
        ("json_schema", "[]", "must be a JSON object"),
        ("json_schema", "false", "must be a JSON object"),
        ("json_schema", '{"enum": []}', "Unsatisfiable"),
        ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 3}', "Unsatisfiable"),
        ("json_schema", '{"type": "nothing"}', "Invalid type"),
        ("json_schema", '{"$ref": "#/nowhere"}', "does not exist"),
        ("json_schema", '{"type": "string", "pattern": "["}', "cannot be compiled"),
        ("json_schema", '{} }, { "lark_grammar": "start: /a/"', "is not JSON"),
        ("json_schema", '{"const": NaN}', "cannot be compiled"),
        ("choice", "[]", "at least one string"),
        ("choice", '"yes"', "at least one string"),
        ("choice", "[1]", "at least one string"),
        ("choice", '[""]', "cannot be met"),
        ("choice", "yes", "is not JSON"),
        ("regex", "\ud800", "half a surrogate pair"),
        ("choice", '["\\ud800"]', "surrogate"),
    ],
)
def test_grammars_that_cannot_be_are_named_in_one_line(kind: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sampler().writer(SamplingParams(grammar=Grammar(kind, text)), [60])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["json_schema", "regex", "lark", "choice"]),
    text=st.text(st.sampled_from('start: "a" /b/ [](){}|*+?\\^$.\n\x00é"'), max_size=30),
)
@example(kind="regex", text="(((a{1,9999}){1,9999}){1,9999})")
@example(kind="regex", text="(.*a){40}")
@example(kind="lark", text='start: a\na: b "x"\nb: a "y"')
@example(kind="json_schema", text='{"type": "array", "minItems": 1000000}')
@example(kind="json_schema", text='{"$ref": "#"}')
@example(kind="json_schema", text='{"type": "string", "pattern": "^(a|b)*c{3}$", "x-guidance": {"nonsense": 1}}')
def test_any_text_is_a_grammar_or_a_user_error(kind: str, text: str) -> None:
    params = SamplingParams(temperature=1.0, grammar=Grammar(kind, text), max_new_tokens=5)  # type: ignore[arg-type]
    try:
        writer = sampler().writer(params, [60], 0, EOS)
    except UserError as error:
        assert "\n" not in str(error)
        return
    while writer.finish is None:
        (choice,) = sampler().sample(torch.randn(1, PADDED), [writer])
        written = (
            writer.accept(choice.token, choice.logprob) if isinstance(choice, Choice) else writer.fail(choice.reason)
        )
        assert (written.finish is None) == (writer.finish is None)


def test_an_answer_that_meets_a_dead_end_fails_alone() -> None:
    # Nothing may follow the first letter but what the bias bans.
    banned = {id: -math.inf for id in range(tiny_tokenizer().vocab_size) if b"b" in tiny_tokenizer().token_bytes(id)}
    params = SamplingParams(grammar=Grammar("regex", "ab"), logit_bias=banned)
    stuck, other = sampler().writer(params, [60]), sampler().writer(SamplingParams(), [60])
    stuck.accept(tiny_tokenizer().encode("a")[0], 0.0)
    first, second = sampler().sample(torch.randn(2, PADDED), [stuck, other])
    assert first is NOTHING and isinstance(second, Choice)
    assert stuck.fail(first.reason).finish == "error" and stuck.reason == NOTHING.reason


def test_a_token_that_the_grammar_has_not_ends_the_answer_as_an_error() -> None:
    for token in (tiny_tokenizer().encode("x")[0], OPEN, PADDED - 1, tiny_tokenizer().vocab_size):
        writer = sampler().writer(SamplingParams(grammar=Grammar("regex", "ab")), [60], 0, EOS)
        assert writer.accept(token, 0.0).finish == "error" and f"no token {token}" in writer.reason
        assert writer.constraint is not None and not writer.constraint.may_end
        assert token >= tiny_tokenizer().vocab_size or not writer.constraint.allowed().any()


@pytest.mark.parametrize(
    ("prompt", "budget", "places"),
    [
        ([ASSISTANT], None, {"thinking", "answer"}),
        ([ASSISTANT], 6, {"thinking", "answer"}),
        ([ASSISTANT], 0, {"answer"}),
        ([ASSISTANT, OPEN], 6, {"thinking"}),
        ([ASSISTANT, OPEN], 0, {"thinking"}),
        ([ASSISTANT, OPEN, CLOSE], 6, {"answer"}),
        ([60, 61], 6, {"answer"}),
        ([60, 61], None, {"answer"}),
    ],
)
def test_the_grammar_begins_where_thinking_is_over(prompt: list[int], budget: int | None, places: set[str]) -> None:
    params = SamplingParams(
        temperature=1.0,
        grammar=Grammar("regex", "[0-9]{2,5}"),
        thinking_budget=budget,
        max_new_tokens=200,
        n=40,
        # Thinking that nobody closes is not what this is about.
        logit_bias={OPEN: 6.0, CLOSE: 6.0, END: -math.inf, 0: -math.inf},
    )
    writers = [sampler().writer(params, prompt, place, EOS) for place in range(params.n)]
    run(writers, seed=5)
    seen = set()
    for writer in writers:
        body = [*prompt[1:], *writer.ids] if prompt[0] == ASSISTANT else writer.ids
        thinking = body[: body.index(CLOSE) + 1] if CLOSE in body else []
        seen.add("thinking" if thinking and prompt[-1] != CLOSE else "answer")
        assert not thinking or (thinking[0] == OPEN and (budget is None or len(thinking) - 2 <= budget))
        assert writer.finish == "stop"
        assert re.fullmatch("[0-9]{2,5}", tiny_tokenizer().decode(without_end(body[len(thinking) :])))
    assert seen == places


def test_compiled_grammars_are_kept_but_not_without_limit() -> None:
    compiler = GrammarCompiler(tiny_tokenizer())
    for number in range(3 * KEPT_GRAMMARS):
        compiler.constraint(Grammar("regex", f"a{{{number + 1}}}"))
    assert len(compiler._compiled) == KEPT_GRAMMARS
    assert compiler.constraint(Grammar("regex", "a{1}")).accept(tiny_tokenizer().encode("a")[0])


def test_answers_with_one_grammar_go_their_own_ways() -> None:
    grammar = Grammar.choice(["ab", "cd"])
    one, two = (sampler().writer(SamplingParams(grammar=grammar), [60]) for _ in range(2))
    a, c = tiny_tokenizer().encode("a")[0], tiny_tokenizer().encode("c")[0]
    one.accept(a, 0.0)
    two.accept(c, 0.0)
    assert one.finish is None and two.finish is None
    first, second = sampler().sample(torch.zeros(2, PADDED), [one, two])
    assert isinstance(first, Choice) and isinstance(second, Choice)
    assert tiny_tokenizer().decode([first.token, second.token]) == "bd"
