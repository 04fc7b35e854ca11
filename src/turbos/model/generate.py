"""The plain generation loop: prefill in segments, then one token a step for a whole batch. The engine's oracle.

Sampling noise depends only on (seed, position), so a sequence samples the same whatever else is in its batch, up to the
rounding of shared matrix products. It is not continuous batching: a batch runs until its last sequence ends.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.common.records import Completion, Documents
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState
from turbos.ops.sampling import gumbel_noise

SEGMENT = 2048
"""Prompt tokens read per call: matrix products are near their best rate, activations stay small."""

SHRINK_BELOW = 0.75
"""A batch is compacted once fewer than this share of its rows still runs (a copy of the state pays for itself)."""


@dataclass
class _Row:
    """One sequence on its way."""

    place: int
    prompt: tuple[int, ...]
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""


def prefill(
    model: LanguageModel, prompts: Sequence[Sequence[int]], state: HybridState, segment: int = SEGMENT
) -> Tensor:
    """Read prompts into a fresh state; returns the hidden state of each last token, `[B, D]`.

    Short prompts share a call of up to `segment` tokens; a longer one is read in segments.
    """
    hidden = []
    for start, stop in _prefill_groups([len(prompt) for prompt in prompts], segment):
        view = state.rows(start, stop)
        if stop - start > 1 or len(prompts[start]) <= segment:
            documents = Documents.from_lengths([len(prompt) for prompt in prompts[start:stop]])
            tokens_T = torch.tensor([token for prompt in prompts[start:stop] for token in prompt])
            hidden.append(model(tokens_T, documents, view).hidden_TD[documents.cu_seqlens[1:] - 1])
            continue
        tokens_T = torch.tensor(list(prompts[start]))
        for piece_T in tokens_T.split(segment):
            output = model(piece_T, Documents.from_lengths([len(piece_T)]), view)
        hidden.append(output.hidden_TD[-1:])
    return torch.cat(hidden)


def _prefill_groups(lengths: list[int], segment: int) -> Iterator[tuple[int, int]]:
    """Ranges of prompts whose tokens together fit into a segment; one that does not fit stands alone."""
    start = total = 0
    for row, length in enumerate(lengths):
        if row > start and total + length > segment:
            yield start, row
            start, total = row, 0
        total += length
    yield start, len(lengths)


def sample(logits_BV: Tensor, temperature: float, seeds_B: Tensor, positions_B: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens and their log-probabilities under softmax(logits / temperature); greedy at temperature 0."""
    if temperature == 0.0:
        logprobs_BV, tokens_B = torch.log_softmax(logits_BV, -1), logits_BV.argmax(-1)
    else:
        logprobs_BV = torch.log_softmax(logits_BV / temperature, -1)
        tokens_B = (logprobs_BV + gumbel_noise(seeds_B, positions_B, logits_BV.shape[1])).argmax(-1)
    return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    stop_ids: Collection[int] = (),
    segment: int = SEGMENT,
    max_batch: int = 64,
) -> list[Completion]:
    """Continue every prompt until a stop id (kept as the last id) or `max_new_tokens`; order is kept.

    `seeds` (default 0, 1, 2, ...) decide the noise at temperature > 0. Log-probabilities are of the sampled
    distribution, nats. Errors: empty prompts, an impossible temperature, `max_new_tokens` < 1.
    """
    _check(model, prompts, max_new_tokens, temperature, segment)
    if max_batch < 1:
        raise UserError(f"generate: max_batch must be at least 1, not {max_batch}")
    seeds = range(len(prompts)) if seeds is None else seeds
    rows = [_Row(i, tuple(prompt), seed) for i, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))]
    # Prompts of like length share a batch, so that less state lies idle.
    queue = sorted(rows, key=lambda row: (len(row.prompt), row.place))
    for start in range(0, len(queue), max_batch):
        batch = queue[start : start + max_batch]
        _run_batch(model, batch, max_new_tokens, temperature, frozenset(stop_ids), segment)
    return [
        Completion(row.prompt, tuple(row.ids), tuple(row.logprobs), "stop" if row.finish == "stop" else "length")
        for row in rows
    ]


def _check(
    model: LanguageModel, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float, segment: int
) -> None:
    vocabulary = model.config.vocab_size
    for prompt in prompts:
        if len(prompt) == 0:
            raise UserError("generate: a prompt has no tokens; give at least one")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise UserError(
                f"generate: a prompt id lies outside vocab_size {vocabulary}: is this the model's tokenizer?"
            )
    if segment < 1:
        raise UserError(f"generate: segment must be at least 1, not {segment}")
    if max_new_tokens < 1:
        raise UserError(f"generate: max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0.0 <= temperature < float("inf"):
        raise UserError(f"generate: temperature must be 0 (greedy) or a positive number, not {temperature}")


def _run_batch(
    model: LanguageModel,
    rows: list[_Row],
    max_new_tokens: int,
    temperature: float,
    stop_ids: frozenset[int],
    segment: int,
) -> None:
    longest = max(len(row.prompt) for row in rows) + max_new_tokens
    state = HybridState.alloc(model.config, len(rows), longest, model.embed_weight.device, model.embed_weight.dtype)
    hidden_BD = prefill(model, [row.prompt for row in rows], state, segment)
    while True:
        seeds_B = torch.tensor([row.seed for row in rows])
        tokens_B, logprobs_B = sample(model.logits(hidden_BD), temperature, seeds_B, state.lengths_B)
        for row, token, logprob in zip(rows, tokens_B.tolist(), logprobs_B.tolist(), strict=True):
            _append(row, token, logprob, stop_ids, max_new_tokens)
        running = [place for place, row in enumerate(rows) if not row.finish]
        if not running:
            return
        if len(running) < SHRINK_BELOW * len(rows):
            rows, state, tokens_B = [rows[place] for place in running], state.select(running), tokens_B[running]
        hidden_BD = model(tokens_B, Documents.from_lengths([1] * len(rows)), state).hidden_TD


def _append(row: _Row, token: int, logprob: float, stop_ids: frozenset[int], limit: int) -> None:
    """Add a sampled token to a row that still runs; a finished row keeps what it has."""
    if row.finish:
        return
    if not math.isfinite(logprob):
        raise ValueError(f"token {len(row.ids)} of sequence {row.place} has log-probability {logprob}: broken weights?")
    row.ids.append(token)
    row.logprobs.append(logprob)
    if token in stop_ids:
        row.finish = "stop"
    elif len(row.ids) == limit:
        row.finish = "length"


@torch.inference_mode()
def stream(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    segment: int = SEGMENT,
) -> Iterator[int]:
    """Token ids as they are sampled, the stop id included; the same ids as `generate` gives."""
    _check(model, [prompt], max_new_tokens, temperature, segment)
    weight = model.embed_weight
    state = HybridState.alloc(model.config, 1, len(prompt) + max_new_tokens, weight.device, weight.dtype)
    hidden_BD = prefill(model, [prompt], state, segment)
    for number in range(max_new_tokens):
        tokens_B, _ = sample(model.logits(hidden_BD), temperature, torch.tensor([seed]), state.lengths_B)
        yield int(tokens_B[0])
        if int(tokens_B[0]) in stop_ids or number == max_new_tokens - 1:
            return
        hidden_BD = model(tokens_B, Documents.from_lengths([1]), state).hidden_TD
