"""Requests of the sampler: a value that cannot be honoured is named in one line, the others are kept as they are."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest

from turbos.common.errors import UserError
from turbos.engine.sampling_params import Grammar, SamplingParams

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("max_new_tokens", [0, -1, 1.5, "3", True, None]),
        ("temperature", [-0.1, NAN, INF, "1", None, True, 1e7]),
        ("top_p", [-0.1, 1.0001, NAN, None]),
        ("min_p", [-1e-9, 1.5, NAN, INF]),
        ("top_k", [-1, 2.0, NAN, None, False]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF, 1e9]),
        ("presence_penalty", [NAN, INF, -INF, 1e9]),
        ("frequency_penalty", [NAN, INF, -INF, -1e9]),
        ("seed", [2**63, -(2**63) - 1, 1.0, None, True]),
        ("n", [0, -3, 1.0, 10**6, None]),
        ("stop", ["end", [""], [3], None, ("a", "")]),
        ("stop_ids", [3, [-1], ["a"], [1.0], [True]]),
        ("logprobs", [-1, 1.0, True, 10**6]),
        ("logit_bias", [[3], {-1: 0.0}, {"a": 0.0}, {3: NAN}, {3: INF}, {3: "x"}, {3: 1e9}, {3: None}]),
        ("grammar", ["json", {"kind": "json"}]),
        ("thinking_budget", [-1, 1.5, True]),
        ("routes", [1, None, "yes"]),
        ("cache", [0, None]),
    ],
)
def test_impossible_values_are_named(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(UserError, match=field.split("_ids")[0]) as caught:
            SamplingParams(**{field: value})
        assert "\n" not in str(caught.value)


def test_edges_are_allowed() -> None:
    SamplingParams(temperature=0, top_p=0.0, top_k=0, min_p=1.0, thinking_budget=0, logprobs=0, seed=-(2**63))
    SamplingParams(seed=2**63 - 1, top_k=10**12, max_new_tokens=10**9, temperature=1e-300)
    SamplingParams(logit_bias={0: -INF, 7: 1e6}, repetition_penalty=1e-3)


def test_the_seeds_of_all_siblings_fit_into_64_bits() -> None:
    SamplingParams(seed=2**63 - 4, n=4)
    with pytest.raises(UserError, match="seed"):
        SamplingParams(seed=2**63 - 4, n=5)


def test_nobody_changes_a_running_request() -> None:
    bias, stops = {1: 2.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stops, stop_ids={4})  # type: ignore[arg-type]
    bias[1], stops[0] = 5.0, "b"
    assert params.logit_bias == {1: 2.0} and params.stop == ("a",) and params.stop_ids == frozenset({4})
    assert hash(params) == hash(SamplingParams(logit_bias={1: 2.0}, stop=("a",), stop_ids=frozenset({4})))
    assert pickle.loads(pickle.dumps(params)) == params


def test_stop_strings_and_grammars_exclude_each_other() -> None:
    with pytest.raises(UserError, match="stop strings would cut"):
        SamplingParams(stop=("a",), grammar=Grammar("json"))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("xml", "", "kind must be one of"),
        ("regex", None, "text must be a string"),
        ("regex", "a" * (1 << 20) + "a", "characters"),
        ("json", "{}", "takes no text"),
    ],
)
def test_impossible_grammars_are_named(kind: Any, text: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Grammar(kind, text)
