"""The thinking budget: no stream of tokens that obeys the rules can exceed it, however the prompt leaves thinking."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from turbos.engine.thinking import STRONGEST_PUSH, Rule, Tags, ThinkingSpan, thinking_tags
from turbos.text.chat import Message, prompt_ids
from turbos.text.parse import chat_tokens, split_turn

OPEN, CLOSE, ASSISTANT = 7, 8, 4
OURS, FOREIGN = Tags(OPEN, CLOSE, ASSISTANT), Tags(OPEN, CLOSE, None)


def obey(rule: Rule, wanted: int) -> int:
    """What a hostile model gets: what it wants, unless the rule says otherwise."""
    if rule.forced is not None:
        return rule.forced
    return 50 if wanted in rule.banned else wanted


def thought(body: Sequence[int]) -> int:
    """Tokens inside all spans of thinking together."""
    total, inside = 0, False
    for token in body:
        if inside and token != CLOSE:
            total += 1
        inside = token != CLOSE if inside else token == OPEN
    return total


@settings(max_examples=400)
@given(
    budget=st.integers(0, 40),
    opening=st.sampled_from([[], [OPEN], [OPEN, CLOSE], [50], [OPEN, 50, 51], [OPEN, 50, CLOSE, 51]]),
    wanted=st.lists(st.sampled_from([OPEN, CLOSE, 50, 51, 52]), max_size=80),
)
@example(budget=0, opening=[], wanted=[OPEN, OPEN, CLOSE])
@example(budget=0, opening=[OPEN], wanted=[50, CLOSE])
@example(budget=3, opening=[], wanted=[50, 50, 50, 50, CLOSE])
def test_the_budget_is_never_exceeded(budget: int, opening: list[int], wanted: list[int]) -> None:
    span = ThinkingSpan(OURS, [3, 60, ASSISTANT, *opening], budget)
    body = list(opening)
    for token in wanted:
        body.append(obey(span.rule(), token))
        span.accept(body[-1])
    # What the prompt has thought already cannot be taken back.
    assert thought(body) <= max(budget, thought(opening))


@settings(max_examples=200, deadline=None)
@given(budget=st.integers(0, 12), opened=st.booleans(), wanted=st.lists(st.sampled_from("<>./ab"), max_size=40))
@example(budget=2, opened=False, wanted=["a"] * 9 + [">"])
def test_readers_find_no_more_thinking_than_the_budget(budget: int, opened: bool, wanted: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    tags = thinking_tags(tokenizer)
    assert tags is not None
    special = {"<": tags.open, ">": tags.close}
    prompt = prompt_ids(tokenizer, [Message("user", "gcd")], "on" if opened else "auto")
    span, body = ThinkingSpan(tags, prompt, budget), [tags.open] if opened else []
    for letter in wanted:
        rule = span.rule()
        token = special.get(letter, tokenizer.encode(letter)[0])
        body.append(rule.forced if rule.forced is not None else token if token not in rule.banned else 60)
        span.accept(body[-1])
    pieces = [piece for piece in split_turn(chat_tokens(tokenizer), body) if piece.kind == "thinking"]
    for piece in pieces:
        inside = body[piece.start : piece.end]
        assert inside[0] == tags.open and len(inside) - 1 - (inside[-1] == tags.close) <= budget


@pytest.mark.parametrize("budget", [0, 1, 9, 10, 100, 640, 2000])
def test_a_model_that_would_think_for_ever_thinks_exactly_the_budget(budget: int) -> None:
    span = ThinkingSpan(OURS, [ASSISTANT, OPEN], budget)
    pushes = []
    for _ in range(budget):
        rule = span.rule()
        assert rule.forced is None and rule.banned == ()
        pushes.append(0.0 if rule.bias is None else rule.bias[1])
        span.accept(50)
    assert span.rule() == Rule(forced=CLOSE)
    window = min(budget // 10, 64)
    assert [push > 0 for push in pushes] == [place >= budget - window for place in range(budget)]
    assert pushes == sorted(pushes) and (window == 0 or pushes[-1] == STRONGEST_PUSH)
    span.accept(CLOSE)
    assert span.place == "answer" and set(span.rule().banned) == {OPEN, CLOSE}


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_prompts_of_the_renderer_are_understood(mode: str) -> None:
    tokenizer = tiny_tokenizer()
    tags = thinking_tags(tokenizer)
    assert tags is not None and tags.assistant is not None
    turns = [Message("user", "gcd"), Message("assistant", "6", "12-6"), Message("user", "add")]
    span = ThinkingSpan(tags, prompt_ids(tokenizer, turns, mode), 5)
    assert span.place == {"auto": "start", "on": "thinking", "off": "answer"}[mode] and span.used == 0
    assert span.may_open == (tags.open if mode == "auto" else None)


@pytest.mark.parametrize(
    ("tags", "prompt", "place", "used"),
    [
        (OURS, [50, 51], "answer", 0),
        (OURS, [], "answer", 0),
        (OURS, [50, OPEN, 51], "thinking", 1),
        (OURS, [ASSISTANT], "start", 0),
        (OURS, [ASSISTANT, OPEN, 50, CLOSE, ASSISTANT], "start", 0),
        (OURS, [ASSISTANT, OPEN, 50, 51], "thinking", 2),
        (OURS, [ASSISTANT, OPEN, 50, CLOSE, 51], "answer", 1),
        (FOREIGN, [50, 51], "start", 0),
        (FOREIGN, [50, OPEN], "thinking", 0),
        (FOREIGN, [50, OPEN, 60], "thinking", 1),
        (FOREIGN, [50, OPEN, 60, CLOSE, 60], "answer", 0),
        (FOREIGN, [OPEN, 50, CLOSE, 51, 52, 53, 54, 55], "start", 0),
    ],
)
def test_where_a_prompt_leaves_thinking(tags: Tags, prompt: list[int], place: str, used: int) -> None:
    span = ThinkingSpan(tags, prompt, 5)
    assert (span.place, span.used) == (place, used)


def test_budget_zero_bans_opening_and_no_budget_rules_nothing() -> None:
    assert ThinkingSpan(OURS, [ASSISTANT], 0).may_open is None
    assert set(ThinkingSpan(OURS, [ASSISTANT], 0).rule().banned) == {OPEN, CLOSE}
    free = ThinkingSpan(OURS, [ASSISTANT], None)
    assert free.may_open == OPEN and free.rule() == Rule()
    free.accept(OPEN)
    for _ in range(1000):
        free.accept(50)
    assert free.rule() == Rule() and free.place == "thinking"
