"""Answers that must be the same to the last bit, side by side.

>>> one = Completion(prompt_ids=(1,), ids=(5, 6), logprobs=(-0.5, -1.0), finish="length")
>>> two = Completion(prompt_ids=(1,), ids=(5, 7), logprobs=(-0.5, -1.0), finish="length")
>>> difference(Pair("answer 0", one, two), "alone", "in the crowd")
(1.0, 'answer 0, token 1 first: 6 alone, 7 in the crowd')
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from turbos.common.records import Completion
from turbos.verify.report import Check


@dataclass(frozen=True)
class Pair:
    """One answer, written in two ways."""

    name: str
    got: Completion
    want: Completion


def first_unlike(pairs: Sequence[Pair], here: str, there: str, why: str, note: str) -> Check:
    """Whether all pairs are the same; `here` and `there` are words for both ways.

    The error is the largest difference of log-probabilities where an answer first differs, 1 where its token does.
    """
    found = [(error, words) for error, words in (difference(pair, here, there) for pair in pairs) if words]
    if not found:
        return Check(True, 0.0, 0.0, "", why, note)
    worst = max((error for error, _ in found), key=lambda error: math.inf if math.isnan(error) else error)
    return Check(False, worst, 0.0, f"{found[0][1]} ({len(found)} of {len(pairs)} answers differ)", why, note)


def difference(pair: Pair, here: str, there: str) -> tuple[float, str]:
    """How far two answers lie apart at the first token that differs, and that in words; empty where none does."""
    got, want = pair.got, pair.want
    for step, (token, other) in enumerate(zip(got.ids, want.ids, strict=False)):
        mine, theirs = got.logprobs[step], want.logprobs[step]
        if token != other:
            return 1.0, f"{pair.name}, token {step} first: {token} {here}, {other} {there}"
        # NaN is no match, not even for itself.
        if mine != theirs:
            apart = abs(mine - theirs)
            words = f"log-probability {mine:.5f} {here}, {theirs:.5f} {there} ({apart:.1e} apart)"
            return apart, f"{pair.name}, token {step} first: {words}"
    if len(got.ids) != len(want.ids):
        return 1.0, f"{pair.name}: {len(got.ids)} tokens {here}, {len(want.ids)} {there}"
    return 0.0, ""
