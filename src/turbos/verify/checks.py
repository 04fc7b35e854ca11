"""Checks of one implementation against itself and against the float64 truth: however a text is read, the same numbers.

Each takes a `Subject` and returns a `Check`, or None where the model has nothing to check (chunks without Mamba).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from turbos.model.weight_files import open_weights
from turbos.verify.compare import amount, row_errors
from turbos.verify.explain import explanation
from turbos.verify.readings import EMBEDDING, GATES, RESIDUAL, ROUTER, Place, Reading, Rows
from turbos.verify.report import Check
from turbos.verify.subject import ROUNDING, Subject, in_pieces, judge, packed, separate
from turbos.verify.training import gradients_are_separate, gradients_are_true, parameters_are_trained

UNLIKE = (2, 5), (4, 1), (1, 3)
"""Segments of three documents in one batch: the second call continues after other lengths, by other lengths."""


def packed_is_separate(subject: Subject, packing: str) -> Check:
    """Documents packed into one call, borders said in one of the implementation's ways, against each alone."""
    texts = subject.texts(subject.plan.packed, seed=1)
    together = packed(subject.implementation.packed_by(packing), texts)
    why = "the same sums; only the shape of shared matrix products changes their order"
    return judge(subject, together, separate(subject.implementation, texts), subject.rounding, why)


def batch_is_single(subject: Subject) -> Check:
    """Prompts of unlike lengths read and continued together against each alone."""
    steps, prompts = subject.plan.steps, subject.plan.prompts
    texts = subject.texts([length + steps for length in prompts], seed=2)
    model = subject.implementation

    def together(everything: bool) -> Reading:
        reading, which = Reading(len(texts)), range(len(texts))
        state = model.start(len(texts), max(len(text) for text in texts))
        pieces = [text[:length] for text, length in zip(texts, prompts, strict=True)]
        reading.add(which, prompts, model.read(pieces, state, everything))
        for step in range(steps):
            pieces = [text[length + step, None] for text, length in zip(texts, prompts, strict=True)]
            reading.add(which, [1] * len(texts), model.read(pieces, state, everything))
        return reading

    alone = in_pieces(model, texts, [[length] for length in prompts])
    why = "the same sums in matrix products of another height"
    return judge(subject, together, alone, subject.rounding, why)


def chunk_size_is_unseen(subject: Subject) -> Check | None:
    """The scan in chunks of other sizes against the configured one."""
    if not subject.config.scans:
        return None
    texts, model = subject.texts(subject.plan.packed[:1], seed=3) * len(subject.plan.chunks), subject.implementation

    def other(everything: bool) -> Reading:
        reading = Reading(len(texts))
        for number, size in enumerate(subject.plan.chunks):
            with model.chunk_sized(size):
                rows = model.read(texts[:1], None, everything)
            reading.add([number], [len(texts[0])], rows)
        return reading

    sizes = ", ".join(map(str, subject.plan.chunks))
    why = f"decay sums restart at other tokens (chunks of {sizes} against {subject.config.chunk_size})"
    return judge(subject, other, separate(model, texts), subject.rounding, why)


def future_is_unseen(subject: Subject) -> Check:
    """Tokens after a cut changed or left out; what comes before must not move."""
    (text,) = subject.texts(subject.plan.packed[:1], seed=4)
    model = subject.implementation
    cuts = sorted({1, len(text) // 3 or 1, len(text) - 1 or 1})

    def changed(everything: bool) -> Reading:
        reading = Reading(2 * len(cuts))
        for number, cut in enumerate(cuts):
            other = torch.cat([text[:cut], (text[cut:] + 1) % subject.config.vocab_size])
            for document, variant in ((2 * number, other), (2 * number + 1, text[:cut])):
                reading.add([document], [cut], _first(cut, model.read([variant], None, everything)))
        return reading

    def unchanged(everything: bool) -> Reading:
        rows, reading = model.read([text], None, everything), Reading(2 * len(cuts))
        for number, cut in enumerate(cuts):
            for document in (2 * number, 2 * number + 1):
                reading.add([document], [cut], _first(cut, rows))
        return reading

    why = "a changed or missing future may change the shape of a matrix product, nothing else"
    return judge(subject, changed, unchanged, subject.rounding, why)


def _first(rows: int, tensors: Rows) -> Rows:
    return {place: tensor[:rows] for place, tensor in tensors.items()}


def decode_is_prefill(subject: Subject) -> Check:
    """A prompt and then token by token, and token by token from the start, against the whole in one call."""
    steps, (prompt, *_) = subject.plan.steps, subject.plan.prompts
    texts, model = subject.texts([prompt + steps, 2 + steps], seed=5), subject.implementation
    why = "the one-token form sums in token order, the chunked form by chunks"
    stepwise, whole = in_pieces(model, texts, [[prompt], []]), separate(model, texts)
    return judge(subject, stepwise, whole, subject.rounding, why)


def segments_are_whole(subject: Subject) -> Check:
    """A document in segments with a carried state, and three in one batch that continue unlike, against whole ones."""
    cuts, model = subject.plan.segments, subject.implementation
    alone, *batch = subject.texts([sum(cuts), *(map(sum, UNLIKE) if model.continues_unlike else ())], seed=6)

    def pieces(everything: bool) -> Reading:
        reading, state = Reading(1 + len(batch)), model.start(1, len(alone))
        for piece in alone.split(list(cuts)):
            reading.add([0], [len(piece)], model.read([piece], state, everything))
        if not batch:
            return reading
        state = model.start(len(batch), max(map(len, batch)))
        parts = [text.split(list(cut)) for text, cut in zip(batch, UNLIKE, strict=True)]
        for segment in zip(*parts, strict=True):
            reading.add([1, 2, 3], [len(piece) for piece in segment], model.read(segment, state, everything))
        return reading

    unlike = "; documents 1 to 3 in one batch, in unlike ones" if batch else ""
    why = f"chunks begin at other tokens (segments of {', '.join(map(str, cuts))}{unlike})"
    return judge(subject, pieces, separate(model, [alone, *batch]), subject.rounding, why)


def forked_is_live(subject: Subject) -> Check:
    """A forked state, its parent afterwards and a state restored from a file, each continued, against live ones."""
    steps, prompt = subject.plan.steps, max(subject.plan.prompts)
    (text,) = subject.texts([prompt], seed=7)
    ends = subject.texts([steps] * 3, seed=8)
    ends = [*ends, ends[1]]
    model = subject.implementation

    def forked(everything: bool) -> Reading:
        reading, room = Reading(4), prompt + steps
        parent = model.start(1, room)
        read = model.read([text], parent, everything)
        for document in range(4):
            reading.add([document], [prompt], read)
        folder = subject.folder(f"state-{everything}")
        forks, saved = model.fork(parent, 2), model.restored(parent, folder)
        for step in range(steps):
            reading.add([0, 1], [1, 1], model.read([end[step, None] for end in ends[:2]], forks, everything))
        for step in range(steps):
            reading.add([2], [1], model.read([ends[2][step, None]], parent, everything))
            reading.add([3], [1], model.read([ends[3][step, None]], saved, everything))
        return reading

    def live(everything: bool) -> Reading:
        reading = Reading(4)
        for number, end in enumerate(ends):
            state = model.start(1, prompt + steps)
            reading.add([number], [prompt], model.read([text], state, everything))
            for token in end.split(1):
                reading.add([number], [1], model.read([token], state, everything))
        return reading

    why = "documents 0 and 1 are forks, 2 their parent, 3 was restored from a file: the same sums"
    return judge(subject, forked, live, subject.rounding, why)


def model_is_truth(subject: Subject) -> Check:
    """The whole model against the float64 recurrence."""
    texts, truth = subject.texts(subject.plan.truth, seed=9), subject.truth

    def true(everything: bool) -> Reading:
        reading = Reading(len(texts))
        reading.add(range(len(texts)), [len(text) for text in texts], truth.whole(texts))
        return reading

    why = "fp32 against float64: rounding adds up over the sublayers"
    tolerance = 3 * subject.rounding
    return judge(subject, separate(subject.implementation, texts), true, tolerance, why)


def sublayers_are_truth(subject: Subject) -> Check | None:
    """Every sublayer against the float64 recurrence, reading what the model's own sublayer before it gave."""
    texts = subject.texts(subject.plan.truth, seed=9)
    got, want = Reading(len(texts)), Reading(len(texts))
    for number, text in enumerate(texts):
        rows = subject.implementation.read([text], None, True)
        if not all(Place(index, RESIDUAL) in rows for index in range(len(subject.config.layers))):
            return None
        got.add([number], [len(text)], rows)
        want.add([number], [len(text)], subject.truth.sublayer_by_sublayer([text], rows))
    worst, wrong, ties = 0.0, None, 0
    for place, errors_T, tied_T in _local_errors(subject, got, want):
        error, ties = float(errors_T.max()), ties + int(tied_T.sum()) * (place.tensor == GATES)
        if wrong is None and not error <= ROUNDING:
            wrong = (place, errors_T)
        worst = error if math.isnan(error) else max(worst, error)
    where = "" if wrong is None else _truth_place(subject, got, want, *wrong)
    note = f"{ties} rows set aside in single sublayers: router ties" if ties else ""
    why = "one sublayer's fp32 rounding, relative to the largest value of each tensor"
    return Check(wrong is None, worst, ROUNDING, where, why, note)


def _truth_place(subject: Subject, got: Reading, want: Reading, place: Place, errors_T: Tensor) -> str:
    """The wrong place, by how much, where first, and what it looks like."""
    row = int(torch.nonzero(~(errors_T <= ROUNDING))[0, 0])
    name, error = subject.names.of_place(place), float(errors_T.max())
    where = f"{name} {amount(error)}, first in {got.where(row)}"
    if not 0 <= place.sublayer < len(subject.config.layers):
        return where
    (text,) = subject.texts(subject.plan.truth[:1], seed=9)
    rows = subject.implementation.read([text], None, True)
    true = subject.truth.sublayer_by_sublayer([text], rows)
    before = EMBEDDING if place.sublayer == 0 else Place(place.sublayer - 1, RESIDUAL)
    seen, meant = ({at.tensor: x for at, x in side.items() if at.sublayer == place.sublayer} for side in (rows, true))
    weight = subject.truth.weight_of(place.sublayer)
    return where + explanation(subject.config, weight, place.tensor, {**seen, "input": rows[before]}, meant, ROUNDING)


def _local_errors(subject: Subject, got: Reading, want: Reading) -> Iterator[tuple[Place, Tensor, Tensor]]:
    """Place, errors of its rows, and which rows a tie of the sublayer's own router took out."""
    free = torch.zeros(sum(want.lengths), dtype=torch.bool)
    tied: dict[int, Tensor] = {}
    for place in want.places:
        if place not in got.places:
            continue
        if place.tensor == ROUTER:
            margins_T, largest = subject.routers.margin(place.sublayer, want.rows(place))
            tied[place.sublayer] = margins_T <= 2 * ROUNDING * largest
        ours, theirs = got.rows(place), want.rows(place)
        if place.tensor == GATES:
            flips_T = ((ours != 0) != (theirs != 0)).any(1)
            tied[place.sublayer] = tied[place.sublayer] & flips_T
        tied_T = tied.get(place.sublayer, free) if place.tensor != ROUTER else free
        yield place, row_errors(ours, theirs, ~tied_T).masked_fill(tied_T, 0.0), tied_T


def written_back_is_original(subject: Subject) -> Check | None:
    """The files written again, each tensor stored as it was, against the files that are there."""
    again = subject.folder("written")
    if not subject.implementation.written_back(subject.directory, again):
        return None
    why = "bits are compared, in the files' own precision"
    with open_weights(subject.directory) as before, open_weights(again) as after:
        for name in sorted(before.names | after.names):
            if name not in before.names or name not in after.names:
                lost = "new" if name in after.names else "gone"
                return Check(False, 1.0, 0.0, f"tensor {name} is {lost}", why)
            first, second = before.read(name), after.read(name)
            if first.dtype != second.dtype or not torch.equal(first, second):
                where = f"{before.path_of(name).name}: tensor {name} differs by {_largest(first, second):.1e}"
                return Check(False, 1.0, 0.0, where, why)
    return Check(True, 0.0, 0.0, "", why)


def saved_is_original(subject: Subject) -> Check:
    """Save, load: the same bits in every tensor and in the logits."""
    model = subject.implementation
    again = model.saved_and_loaded(subject.folder("saved"))
    before, after = model.tensors(), again.tensors()
    for name, tensor in before.items():
        if name not in after or not torch.equal(tensor, after[name].to(tensor.dtype)):
            lost = "is gone" if name not in after else f"differs by {_largest(tensor, after[name]):.1e}"
            return Check(False, 1.0, 0.0, f"{name} {lost}", "bits are compared")
    texts = subject.texts(subject.plan.prompts, seed=16)
    first, second = separate(model, texts), separate(again, texts)
    return judge(subject, second, first, 0.0, "bits are compared")


def _largest(a: Tensor, b: Tensor) -> float:
    return float("nan") if a.shape != b.shape else float((a.double() - b.double()).abs().max())


CHECKS: tuple[tuple[str, Callable[[Subject], Check | None]], ...] = (
    ("batch == single", batch_is_single),
    ("chunk size unseen", chunk_size_is_unseen),
    ("causality", future_is_unseen),
    ("prefill == decode", decode_is_prefill),
    ("segmented == whole prefill", segments_are_whole),
    ("forked and restored == live", forked_is_live),
    ("float64 truth, each sublayer", sublayers_are_truth),
    ("float64 truth, whole", model_is_truth),
    ("save -> load == original", saved_is_original),
    ("files written back == files", written_back_is_original),
    ("gradients: packed == separate", gradients_are_separate),
    ("gradients: float64 truth", gradients_are_true),
    ("parameters present, used, trained", parameters_are_trained),
)
"""By name, in the order in which they run; `packed_is_separate` comes before them, once for each way of packing."""
