"""What a request asks of the sampler: numbers, stops, constraints. Records that check themselves, and nothing else.

Ids are checked against a vocabulary where a writer begins (`sampler.py`); here only what a value alone can say.

>>> SamplingParams(temperature=0.7, top_p=0.9).n
1
>>> SamplingParams(top_p=1.5)
Traceback (most recent call last):
turbos.common.errors.UserError: top_p must lie between 0 and 1, not 1.5
>>> Grammar.choice(["yes", "no"]).text
'["yes", "no"]'
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from turbos.common.errors import UserError

GrammarKind = Literal["json_schema", "regex", "lark", "json", "choice"]

LONGEST_GRAMMAR = 1 << 20
"""Characters of a grammar's text; compiling takes time that grows with it."""

RANGES = {
    "temperature": (0.0, 1e6),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-3, 1e3),
    "presence_penalty": (-1e3, 1e3),
    "frequency_penalty": (-1e3, 1e3),
}
"""Smallest and largest value of each real number of a request; wide, but no sum of them leaves fp32."""

WHOLE_RANGES = {
    "max_new_tokens": (1, None),
    "top_k": (0, None),
    "n": (1, 1024),
    "logprobs": (0, 1024),
    "thinking_budget": (0, None),
}
"""Smallest and largest value (None: no largest) of each whole number of a request."""

LARGEST_BIAS = 1e6


@dataclass(frozen=True)
class Grammar:
    """What an answer must look like from its first to its last character.

    `json_schema`: a schema as JSON; `json`: any JSON object, `text` is empty; `regex`: Rust's syntax, the whole answer
    matches (`\\d` is a digit of any script); `lark`: llguidance's dialect; `choice`: one of a JSON list of strings.
    `special_ids` are the special tokens that may stand inside (`<[7]>` in lark); they are never let in otherwise.
    """

    kind: GrammarKind
    text: str = ""
    special_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.kind not in get_args(GrammarKind):
            raise UserError(f"grammar kind must be one of {', '.join(get_args(GrammarKind))}, not {self.kind!r}")
        if not isinstance(self.text, str):
            raise UserError(f"grammar text must be a string, not {type(self.text).__name__}")
        if len(self.text) > LONGEST_GRAMMAR:
            raise UserError(f"grammar has {len(self.text)} characters, at most {LONGEST_GRAMMAR} are compiled")
        if self.kind == "json" and self.text:
            raise UserError("a json grammar takes no text: write json_schema to constrain the object")

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of some strings."""
        return cls("choice", json.dumps(list(choices)))


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt; raises UserError, naming the field, for a value that cannot be honoured.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 cut nothing, `top_p` 0 leaves the likeliest token
    only. `repetition_penalty` looks at prompt and answer, presence and frequency at the answer. `stop_ids` None means
    the engine's ends. `logprobs`: how many alternatives a token. `logit_bias` -inf bans a token. `thinking_budget`: the
    most tokens of thinking. Completion `k` of `n` samples with `seed + k`. `routes` asks for the experts of each token,
    `cache` whether the state cache may be read and written.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    grammar: Grammar | None = None
    thinking_budget: int | None = None
    routes: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            _check_real(name, getattr(self, name), low, high)
        for name, (least, most) in WHOLE_RANGES.items():
            _check_whole(name, getattr(self, name), least, most, optional=name in ("logprobs", "thinking_budget"))
        _check_whole("seed", self.seed, -(2**63), 2**63 - self.n)
        _check_switches(self)
        # Lists and sets of the caller are copied, so that nobody changes them under a running request.
        object.__setattr__(self, "stop", _strings(self.stop))
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", frozenset(_ids("stop_ids", self.stop_ids)))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        if self.stop and self.grammar is not None:
            raise UserError("stop strings would cut an answer that a grammar constrains: use one of the two")

    @property
    def truncates(self) -> bool:
        """Whether top-k, top-p or min-p may take tokens away."""
        return self.temperature > 0.0 and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)

    @property
    def penalises(self) -> bool:
        """Whether any of the three penalties changes logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _check_switches(params: SamplingParams) -> None:
    for name, value in (("routes", params.routes), ("cache", params.cache)):
        if not isinstance(value, bool):
            raise UserError(f"{name} must be true or false, not {value!r}")
    if params.grammar is not None and not isinstance(params.grammar, Grammar):
        raise UserError(f"grammar must be a Grammar, not {type(params.grammar).__name__}")


def _check_real(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name} must be a number, not {value!r}")
    if not low <= value <= high:
        raise UserError(f"{name} must lie between {low:g} and {high:g}, not {value}")


def _check_whole(name: str, value: object, least: int, most: int | None, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    if value < least or (most is not None and value > most):
        limit = f"at least {least}" if most is None else f"between {least} and {most}"
        raise UserError(f"{name} must be {limit}, not {value}")


def _strings(stop: object) -> tuple[str, ...]:
    if not isinstance(stop, list | tuple) or not all(isinstance(text, str) for text in stop):
        raise UserError(f"stop must be a tuple of strings, not {stop!r}")
    if "" in stop:
        raise UserError("stop holds an empty string: it would end every answer before it begins")
    if any("\ud800" <= letter <= "\udfff" for text in stop for letter in text):
        raise UserError("stop holds half a surrogate pair: no answer contains it")
    return tuple(stop)


def _ids(name: str, ids: object) -> list[int]:
    if not isinstance(ids, frozenset | set | list | tuple):
        raise UserError(f"{name} must be a set of token ids, not {ids!r}")
    for id in ids:
        _check_whole(name, id, 0, None)
    return list(ids)


def _biases(biases: object) -> dict[int, float]:
    if not isinstance(biases, Mapping):
        raise UserError(f"logit_bias must map token ids to numbers, not {biases!r}")
    _ids("logit_bias", list(biases))
    for bias in biases.values():
        if bias != -math.inf:
            _check_real("logit_bias", bias, -LARGEST_BIAS, LARGEST_BIAS)
    return {int(id): float(bias) for id, bias in biases.items()}


GREEDY = SamplingParams()
"""The likeliest token each time, with the engine's ends and limits."""
