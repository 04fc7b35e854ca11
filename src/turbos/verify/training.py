"""Checks of gradients: documents do not see each other's, and every parameter is moved by a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from turbos.verify.compare import router_ties
from turbos.verify.readings import Reading
from turbos.verify.report import Check
from turbos.verify.subject import Subject, packed, separate

TRIES = 8
"""Texts that are drawn in search of one without router ties: a flipped choice gives another gradient."""
NO_TEXT = f"router ties flip in each of {TRIES} texts: nothing can be compared"
SHORT_TEXTS, SHORT_CHUNK = (21, 12, 1), 8
"""Lengths for the gradients of the slow truth, and a chunk size at which the first still crosses borders."""


def gradients_are_separate(subject: Subject) -> Check:
    """Gradients of a loss over packed documents against the sum over documents alone."""
    model, parameters = subject.implementation, subject.implementation.parameters()
    why = "sums over all tokens in another order, relative to each tensor's largest gradient"
    tolerance = 10 * subject.rounding
    texts = _texts_without_ties(subject, tolerance)
    if texts is None:
        return Check(False, math.nan, tolerance, NO_TEXT, why)
    values = list(parameters.values())
    got = _gradients(subject, texts)
    want = [torch.zeros_like(value) for value in values]
    for text in texts:
        if len(text) > 1:
            loss = model.loss([text], False)
            for total, gradient in zip(want, torch.autograd.grad(loss, values, allow_unused=True), strict=True):
                if gradient is not None:
                    total += gradient
    return _compared(got, dict(zip(parameters, want, strict=True)), tolerance, why)


def gradients_are_true(subject: Subject) -> Check | None:
    """Gradients of a loss against those of the float64 equations; None where parameters have another's names."""
    model, truth = subject.implementation, subject.truth
    if not set(model.parameters()) <= truth.names:
        return None
    why = f"fp32 (in chunks of {SHORT_CHUNK}) against float64, relative to each tensor's largest gradient"
    tolerance = 10 * subject.rounding
    for seed in range(200, 200 + TRIES):
        texts, true = subject.texts(SHORT_TEXTS, seed), Reading(len(SHORT_TEXTS))
        true.add(range(len(texts)), SHORT_TEXTS, truth.whole(texts))
        if not router_ties(separate(model, texts)(False), true, subject.routers, tolerance):
            with model.chunk_sized(SHORT_CHUNK):
                return _compared(_gradients(subject, texts), truth.gradients(texts), tolerance, why)
    return Check(False, math.nan, tolerance, NO_TEXT, why)


def _gradients(subject: Subject, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradients of packed documents by name of the parameter, 0 where it is not used."""
    parameters = subject.implementation.parameters()
    loss = subject.implementation.loss(texts, False)
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def _compared(got: Mapping[str, Tensor], want: Mapping[str, Tensor], tolerance: float, why: str) -> Check:
    """Each gradient against the wanted one, relative to its largest number (or a thousandth of the largest of all)."""
    largest = max(float(gradient.abs().max()) for gradient in want.values())
    errors = {}
    for label, a in got.items():
        b = want[label] if label in want else torch.zeros_like(a)
        errors[label] = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3 * largest, 1e-300)
    bad = [label for label, error in errors.items() if not error <= tolerance]
    # Gradients flow from the loss back: the last parameter that differs is the first to go wrong.
    where = f"{bad[-1]} differs by {errors[bad[-1]]:.1e} of its largest gradient" if bad else ""
    worst = max(errors.values(), key=lambda error: math.inf if math.isnan(error) else error)
    return Check(not bad, worst, tolerance, where, why)


def _texts_without_ties(subject: Subject, tolerance: float) -> list[Tensor] | None:
    """Documents in which packing flips no router's choice; None if none of the tries gives some."""
    model = subject.implementation
    for seed in range(100, 100 + TRIES):
        texts = subject.texts(subject.plan.packed, seed)
        got, want = packed(model, texts)(False), separate(model, texts)(False)
        if not router_ties(got, want, subject.routers, tolerance):
            return texts
    return None


def parameters_are_trained(subject: Subject) -> Check:
    """Every parameter is in the files, trainable, and moved by a loss."""
    model = subject.implementation
    texts = [text for text in subject.texts(subject.plan.packed, seed=15) if len(text) > 1]
    parameters = model.parameters()
    faults = model.misplaced() + [f"{name} needs no gradient" for name, x in parameters.items() if not x.requires_grad]
    trained = {name: value for name, value in parameters.items() if value.requires_grad}
    loss = torch.stack([model.loss([text], True) for text in texts]).sum()
    gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    excused = 0
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is None:
            faults.append(f"{name} is not used")
        elif not gradient.isfinite().all():
            faults.append(f"{name} has a gradient that is not finite")
        elif not gradient.any():
            if _single_choice(subject, gradient):
                excused += 1
            else:
                faults.append(f"{name} has a gradient of zero")
    where = "; ".join(faults[:3]) + (f" and {len(faults) - 3} more" if len(faults) > 3 else "")
    note = f"{excused} routers: one expert a token makes every gate 1, so no loss trains the choice" if excused else ""
    why = f"counts parameters at fault, of {len(parameters)}; one suffices"
    return Check(not faults, float(len(faults)), 0.0, where, why, note)


def _single_choice(subject: Subject, gradient: Tensor) -> bool:
    """Whether a gradient is a router's that chooses one expert: softmax over one score has no gradient."""
    config = subject.config
    is_router = gradient.shape == (config.num_experts, config.hidden_size)
    return is_router and config.top_k == 1 and config.router_normalise
