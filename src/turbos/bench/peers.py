"""The same weights in our model and in transformers' own, and rounds that run both side by side.

A round measures every contestant once, in an order that rotates, so that other work on the machine falls on all alike.
Figures are medians over rounds; a ratio is the median of the rounds' own ratios.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from turbos.common.config import load_recipe
from turbos.common.errors import UserError
from turbos.model.checkpoint import save_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel

SHAPE = "bench-26m"
AGREEMENT = 1e-3
"""Relative difference of losses or logits above which two contestants do not compute the same thing."""


@dataclass(frozen=True)
class Times:
    """Seconds of each contestant in each round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        """Median seconds of a contestant."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, slower: str) -> float:
        """How many times faster `name` is than `slower`: the median of the rounds' ratios."""
        pairs = zip(self.seconds[slower], self.seconds[name], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def interleave(work: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> Times:
    """Run all contestants in turn, `rounds` times after `warm_up` unmeasured ones."""
    return interleave_timed({name: partial(seconds_of, run) for name, run in work.items()}, rounds, warm_up)


def interleave_timed(work: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> Times:
    """The same for contestants that say themselves how many seconds their work took."""
    names = list(work)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            taken = work[name]()
            if number >= 0:
                seconds[name].append(taken)
    return Times(seconds)


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def bench_model(shape: str = SHAPE) -> LanguageModel:
    """Our model of a benchmark's shape, from seed 0."""
    return LanguageModel(load_recipe(ModelConfig, "model", shape, [])).init_weights(seed=0)


def save_for_peers(model: LanguageModel, parent: str) -> Path:
    """The model's checkpoint in a fresh directory below `parent`, for peers to load."""
    directory = Path(tempfile.mkdtemp(dir=parent))
    save_model(model, directory)
    return directory


def load_transformers(directory: Path) -> torch.nn.Module:
    """transformers' own model with the same weights, fp32."""
    # It reports missing CUDA kernels and loading bars on every start; both are expected here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise UserError("bench: the peer is missing; install it with pip install 'turbos[export]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    peer: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return peer


def require_agreement(what: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Refuse to compare speeds of things that differ."""
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    if difference > AGREEMENT:
        raise RuntimeError(f"bench: {what} differ by {difference:.1e} (relative), more than {AGREEMENT:.0e}")
