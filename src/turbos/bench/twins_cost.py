"""What a twin costs at a length: training speed and memory of one document, and what decoding holds and takes.

Costs do not depend on what a model has learnt, so they are measured once on initial weights, each in a process of its
own (whose peak memory the system tells; Linux only):

    python -m turbos.bench.twins_cost hybrid 8192        # prints one JSON object
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from turbos.bench.peers import seconds_of
from turbos.bench.prefill import MIB, peak_resident
from turbos.bench.train import our_step
from turbos.bench.twins_plan import VOCABULARY, Twin, twin_model, twin_named
from turbos.common.errors import UserError
from turbos.common.records import Documents
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState

WARM_UP = 256
ENOUGH_SECONDS, MOST_ROUNDS = 6.0, 7
DECODE_STEPS = 30


@dataclass(frozen=True)
class Cost:
    """At `length` tokens: training speed (forward, loss, backward), peak memory it adds, decoding's state and time.

    `state_bytes` are fp32 keys, values, conv rows and scan states of one sequence.
    """

    twin: str
    length: int
    train_tokens_per_second: float
    train_mib: float
    state_bytes: int
    decode_ms: float


def twin_cost(twin: Twin, length: int) -> Cost:
    """Measure in this process, with torch's threads; the fastest round counts, which others disturbed least."""
    model = LanguageModel(twin_model(twin)).init_weights(seed=0)
    tokens_T = torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(0))
    our_step(model, tokens_T[:WARM_UP])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = peak_resident()
    seconds = [seconds_of(lambda: our_step(model, tokens_T))]
    grown = peak_resident() - before
    while sum(seconds) < ENOUGH_SECONDS and len(seconds) < MOST_ROUNDS:
        seconds.append(seconds_of(lambda: our_step(model, tokens_T)))
    held = HybridState.alloc(model.config, 1, length).nbytes
    return Cost(twin.name, length, length / min(seconds), grown / MIB, held, 1000 * decode_seconds(model, length))


@torch.inference_mode()
def decode_seconds(model: LanguageModel, length: int) -> float:
    """Least seconds of reading one token after `length` others; what those were makes no difference to the work."""
    state = HybridState.alloc(model.config, 1, length + DECODE_STEPS)
    state.lengths_B.fill_(length)
    token_B, document = torch.zeros(1, dtype=torch.int64), Documents.from_lengths([1])
    seconds = []
    for _ in range(DECODE_STEPS):
        start = time.perf_counter()
        model.logits(model(token_B, document, state).hidden_TD)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def read_cost(path: Path) -> Cost:
    """A cost as it was kept; UserError for a file that is not such."""
    try:
        return Cost(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} holds no cost of a twin ({error!r}): delete it and run the bench again") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one twin at one length and print the cost."""
    name, length = sys.argv[1:] if argv is None else argv
    print(json.dumps(dataclasses.asdict(twin_cost(twin_named(name), int(length)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
