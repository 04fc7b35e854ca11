"""Two readings of the same text side by side: how far apart, and where the first difference arises.

Errors are the largest difference over the largest value, of the logits to decide and of each tensor to find the place.
Rounding may flip a router's choice between two experts of equal score; a token where that happens, and what follows it
in its document, is set aside and reported. A flip between experts that are not equal is never excused. Rows where the
model's own equations amplify rounding beyond the tolerance are set aside by whoever compares (`subject.judge`).

>>> relative_error(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 2.5]]))
0.2
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from turbos.model.config import ModelConfig
from turbos.verify.readings import GATES, LOGITS, ROUTER, Names, Place, Reading, row_ranges

LEAST_KEPT = 0.5
"""Share of rows that must remain once router ties are set aside; fewer prove nothing."""


@dataclass(frozen=True)
class Outcome:
    """Result of a comparison; `where` is empty unless rows had to be named, `note` tells of router ties."""

    ok: bool
    error: float
    kept_T: Tensor
    where: str
    note: str


@dataclass(frozen=True)
class Routers:
    """What decides between experts: scores from router logits, and each sublayer's selection bias (sigmoid)."""

    config: ModelConfig
    biases: Mapping[int, Tensor]

    def scores(self, sublayer: int, logits_TE: Tensor) -> Tensor:
        """What the top-k is taken of, float64."""
        if self.config.router == "softmax":
            return logits_TE.double()
        scores_TE = torch.sigmoid(logits_TE.double())
        return scores_TE if self.config.bias_update == "off" else scores_TE + self.biases[sublayer].double()

    def chosen(self, reading: Reading, sublayer: int) -> Tensor:
        """Which experts each token went to, `[T, E]` bool: by its gates where they were seen, else by its logits."""
        gates = Place(sublayer, GATES)
        if gates in reading.places:
            return reading.rows(gates) != 0
        scores_TE = self.scores(sublayer, reading.rows(Place(sublayer, ROUTER)))
        chosen_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        return chosen_TE.scatter_(1, scores_TE.topk(self.config.top_k, 1).indices, True)

    def margin(self, sublayer: int, logits_TE: Tensor) -> tuple[Tensor, float]:
        """Score of the last expert chosen above the first not chosen, `[T]`, and the largest score."""
        scores_TE = self.scores(sublayer, logits_TE)
        if self.config.top_k == self.config.num_experts:
            return torch.full_like(scores_TE[:, 0], float("inf")), float(scores_TE.abs().max())
        top_TK = scores_TE.topk(self.config.top_k + 1, 1).values
        return top_TK[:, -2] - top_TK[:, -1], float(scores_TE.abs().max())


@dataclass(frozen=True)
class Tie:
    """A router's choice that rounding flipped."""

    sublayer: int
    row: int
    margin: float


def relative_error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value of `want`; NaN where either holds NaN."""
    if want.numel() == 0:
        return 0.0
    scale = want.double().abs().max().clamp_min(1e-300)
    return float((got.double() - want.double()).abs().max() / scale)


def row_errors(got: Tensor, want: Tensor, kept_T: Tensor) -> Tensor:
    """Largest difference of each row over the largest value of `want` in the kept rows, `[T]`."""
    scale = want[kept_T].double().abs().max().clamp_min(1e-300)
    return (got.double() - want.double()).abs().amax(1) / scale


def router_ties(got: Reading, want: Reading, routers: Routers, tolerance: float) -> list[Tie]:
    """First flips that a margin within rounding explains: twice the tolerance, relative to the largest score."""
    ties = []
    pending_T = torch.ones(sum(want.lengths), dtype=torch.bool)
    for place in want.places:
        # Gates alone tell the choice, too.
        if place.tensor != ROUTER or not {place, Place(place.sublayer, GATES)} & set(got.places):
            continue
        differ_T = (routers.chosen(got, place.sublayer) != routers.chosen(want, place.sublayer)).any(1) & pending_T
        if not differ_T.any():
            continue
        margins_T, largest = routers.margin(place.sublayer, want.rows(place))
        for row in torch.nonzero(differ_T & (margins_T <= 2 * tolerance * largest))[:, 0].tolist():
            ties.append(Tie(place.sublayer, row, float(margins_T[row])))
            for rows in row_ranges(want.starts):
                if row in rows:
                    pending_T[row : rows.stop] = False
    return ties


def compare(
    got: Reading, want: Reading, routers: Routers, tolerance: float, unsteady_T: Tensor | None = None
) -> Outcome:
    """Logits of two readings of the same documents, rows set aside where `unsteady_T` says that rounding decides."""
    if got.lengths != want.lengths:
        raise ValueError(f"documents of {got.lengths} and {want.lengths} tokens cannot be compared")
    ties = router_ties(got, want, routers, tolerance)
    kept_T = torch.ones(sum(want.lengths), dtype=torch.bool)
    for tie in ties:
        stop = next(rows.stop for rows in row_ranges(want.starts) if tie.row in rows)
        kept_T[tie.row : stop] = False
    note = tie_note(ties, int((~kept_T).sum()), len(kept_T))
    if unsteady_T is not None and unsteady_T.any():
        kept_T &= ~unsteady_T
        words = f"{int(unsteady_T.sum())} of {len(kept_T)} rows set aside: plain fp32 misses float64 there too"
        note = "; ".join(filter(None, (note, words)))
    if kept_T.float().mean() < LEAST_KEPT:
        return Outcome(False, float("nan"), kept_T, f"too few rows are left to judge: {note}", "")
    error = relative_error(got.rows(LOGITS)[kept_T], want.rows(LOGITS)[kept_T])
    return Outcome(error <= tolerance, error, kept_T, "", note)


def tie_note(ties: list[Tie], rows: int, total: int) -> str:
    """One line about ties, empty without any."""
    if not ties:
        return ""
    closest = max(ties, key=lambda tie: tie.margin)
    places = ", ".join(sorted({f"sublayers.{tie.sublayer}" for tie in ties}))
    return (
        f"{rows} of {total} rows set aside: rounding flipped {len(ties)} router ties in {places} "
        f"(margin at most {closest.margin:.1e})"
    )


def differences(got: Reading, want: Reading, kept_T: Tensor) -> Iterator[tuple[Place, Tensor]]:
    """Each place that both saw, in the model's order, with the error of every row (0 where set aside)."""
    for place in want.places:
        if place not in got.places:
            continue
        ours, theirs = got.rows(place), want.rows(place)
        if ours.shape != theirs.shape:
            yield place, torch.full((len(kept_T),), float("inf"))
            continue
        yield place, row_errors(ours, theirs, kept_T).masked_fill(~kept_T, 0.0)


def amount(error: float) -> str:
    """A relative error of a tensor in words."""
    if math.isnan(error):
        return "is not finite"
    return "has another shape" if math.isinf(error) else f"differs by {error:.1e} of its largest value"


def first_difference(got: Reading, want: Reading, kept_T: Tensor, tolerance: float, names: Names) -> str:
    """The first place whose rows differ by more than the tolerance, by how much, and in which token first."""
    for place, errors_T in differences(got, want, kept_T):
        # Written so that NaN counts as beyond.
        beyond_T = ~(errors_T <= tolerance)
        if beyond_T.any():
            row = int(torch.nonzero(beyond_T)[0, 0])
            size = float(errors_T.max())
            return f"{names.of_place(place)} {amount(size)}, first in {want.where(row)}"
    return "nothing but the logits differs by more than the tolerance"
