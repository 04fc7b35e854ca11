"""From logits to tokens for a batch of unlike requests, row by row as if each were alone.

The order: logit bias, penalties, thinking budget, grammar, temperature, top-k, top-p, min-p, then noise that depends on
(seed, position) only. The log-probability that is reported is the model's own: of softmax(logits / temperature) before
anything else changed it, temperature 1 where the choice is greedy. It does not know where states lie. A row whose
logits or rules leave nothing to choose is an outcome of its own, and the other rows go on.

>>> sampler = Sampler(vocab_size=3, tokenizer=None)
>>> greedy = sampler.writer(SamplingParams(), prompt_ids=[0])
>>> banned = sampler.writer(SamplingParams(logit_bias={1: float("-inf")}), prompt_ids=[0])
>>> logits_BV = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [0.0, float("nan"), 1.0]])
>>> one, two, three = sampler.sample(logits_BV, [greedy, banned, greedy])
>>> one.token, two.token, three
(1, 2, NoChoice(reason='the logits are not finite numbers: broken weights?'))
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.engine.choosing import COMPILED, perturbed_argmax, smallest_kept
from turbos.engine.grammar import Constraint, GrammarCompiler
from turbos.engine.penalties import penalise
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.thinking import FREE, Rule, ThinkingSpan, thinking_tags
from turbos.engine.writer import Top, Writer
from turbos.text.tokenizer import Tokenizer

SMALLEST_TEMPERATURE = 1e-37
"""Below it a temperature is no normal fp32 number; all but the best tokens have probability 0 long before."""


@dataclass(frozen=True)
class Choice:
    """The next token, its log-probability, and the likeliest tokens where the request wants them."""

    token: int
    logprob: float
    top: Top = ()


@dataclass(frozen=True)
class NoChoice:
    """Why a row has no next token: its answer ends as an error."""

    reason: str


BROKEN = NoChoice("the logits are not finite numbers: broken weights?")
NOTHING = NoChoice("bias, thinking budget and grammar together allow no token")


class Sampler:
    """Makes writers and chooses their tokens; `compiled` False keeps to torch."""

    def __init__(self, vocab_size: int, tokenizer: Tokenizer | None, compiled: bool = COMPILED) -> None:
        """`vocab_size` is the model's: it may have more ids than the tokenizer."""
        self.vocab_size, self._tokenizer, self._compiled = vocab_size, tokenizer, compiled
        self._tags = None if tokenizer is None else thinking_tags(tokenizer)
        self._grammars = None if tokenizer is None else GrammarCompiler(tokenizer)

    def writer(
        self, params: SamplingParams, prompt_ids: Sequence[int], place: int = 0, eos_ids: Collection[int] = ()
    ) -> Writer:
        """Begin answer number `place` of a request; UserError where its ids, grammar or budget cannot be honoured.

        `eos_ids` end it unless the request names its own.
        """
        self._check(params)
        thinking = constraint = None
        if self._tags is not None and (params.thinking_budget is not None or params.grammar is not None):
            thinking = ThinkingSpan(self._tags, prompt_ids, params.thinking_budget)
        if params.grammar is not None and self._grammars is not None:
            constraint = self._grammars.constraint(params.grammar)
        stop_ids = frozenset(eos_ids) if params.stop_ids is None else params.stop_ids
        return Writer(params, prompt_ids, stop_ids, self._tokenizer, place, thinking, constraint)

    def _check(self, params: SamplingParams) -> None:
        for name, ids in (("stop_ids", params.stop_ids or ()), ("logit_bias", params.logit_bias)):
            beyond = sorted(id for id in ids if id >= self.vocab_size)
            if beyond:
                raise UserError(f"{name}: token {beyond[0]} lies outside vocab_size {self.vocab_size}")
        if self._tokenizer is None and (params.stop or params.grammar is not None):
            what = "stop strings" if params.stop else "a grammar"
            raise UserError(f"{what} need a tokenizer, and this engine has none: use stop_ids, or give it one")
        if self._tags is None and params.thinking_budget is not None:
            raise UserError("thinking_budget needs a tokenizer with <think> and </think> as special tokens")

    @torch.inference_mode()
    def sample(self, logits_BV: Tensor, writers: Sequence[Writer]) -> list[Choice | NoChoice]:
        """The next token of each writer from its row of logits, fp32 `[B, V]`, which are left as they are."""
        finite = _finite(logits_BV)
        if not all(finite):
            logits_BV = torch.where(torch.tensor(finite, device=logits_BV.device)[:, None], logits_BV, 0.0)
        logprobs_BV = _log_softmax(logits_BV, [writer.params.temperature for writer in writers])
        tokens = self._tokens(logits_BV, logprobs_BV, writers)
        tokens_B1 = torch.tensor(tokens, device=logits_BV.device).clamp_min(0)[:, None]
        choices: list[Choice | NoChoice] = []
        for row, logprob in enumerate(logprobs_BV.gather(1, tokens_B1)[:, 0].tolist()):
            if not finite[row] or tokens[row] < 0:
                choices.append(NOTHING if finite[row] else BROKEN)
            else:
                choices.append(Choice(tokens[row], logprob, _top(logprobs_BV[row], writers[row].params.logprobs)))
        return choices

    def _tokens(self, logits_BV: Tensor, logprobs_BV: Tensor, writers: Sequence[Writer]) -> list[int]:
        """The token of each row, or -1 where nothing is allowed: rows that nothing changes at once, others singly."""
        tokens = [-1] * len(writers)
        greedy: list[int] = []
        drawn: list[int] = []
        for row, writer in enumerate(writers):
            rule = writer.rule()
            if rule.forced is not None:
                tokens[row] = rule.forced
            elif _changes(writer, rule):
                tokens[row] = self._changed_token(logits_BV[row], writer, rule)
            else:
                (drawn if writer.params.temperature else greedy).append(row)
        for row, token in zip(greedy, _rows(logits_BV, greedy).argmax(-1).tolist(), strict=True):
            tokens[row] = token
        drawn_writers = [writers[row] for row in drawn]
        for row, token in zip(drawn, self._drawn(_rows(logprobs_BV, drawn), drawn_writers), strict=True):
            tokens[row] = token
        return tokens

    def _changed_token(self, logits_V: Tensor, writer: Writer, rule: Rule) -> int:
        """The token of a row that bias, penalties, budget, grammar or truncation may change; -1 if there is none."""
        params = writer.params
        logits_V = _changed(logits_V, writer, rule)
        if float(logits_V.max()) == -math.inf:
            return -1
        if params.temperature == 0.0:
            return int(logits_V.argmax())
        scores_1V = _log_softmax(logits_V[None], [params.temperature])
        if params.truncates:
            probabilities_V = scores_1V[0].exp().float()
            edge = smallest_kept(probabilities_V, params.top_k, params.top_p, self._compiled)
            edge = max(edge, params.min_p * float(probabilities_V.max()))
            scores_1V = scores_1V.masked_fill(probabilities_V < edge, -math.inf)
        return self._drawn(scores_1V, [writer])[0]

    def _drawn(self, scores_BV: Tensor, writers: Sequence[Writer]) -> list[int]:
        seeds, positions = [writer.seed for writer in writers], [writer.position for writer in writers]
        return perturbed_argmax(scores_BV, seeds, positions, self._compiled) if writers else []


def _finite(logits_BV: Tensor) -> list[bool]:
    """Whether all logits of each row are finite: NaN is both its smallest and its largest."""
    # Two passes: torch's aminmax is ten times as slow as amin and amax.
    low_B, high_B = logits_BV.amin(-1), logits_BV.amax(-1)
    return (low_B.isfinite() & high_B.isfinite()).tolist()


def _rows(x_BV: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor; the tensor itself where it is all of them."""
    return x_BV if len(rows) == len(x_BV) else x_BV[rows]


def _log_softmax(logits_BV: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Log-probabilities at each row's temperature, 1 where it is 0; right at the smallest ones, too."""
    used = [max(temperature, SMALLEST_TEMPERATURE) if temperature else 1.0 for temperature in temperatures]
    if all(temperature == 1.0 for temperature in used):
        return torch.log_softmax(logits_BV, -1)
    used_B1 = torch.tensor(used, dtype=logits_BV.dtype, device=logits_BV.device)[:, None]
    scaled_BV = logits_BV / used_B1
    best_B1 = scaled_BV.amax(-1, keepdim=True)
    if not bool(best_B1.isfinite().all()):
        # The quotient leaves the range; its distance from the best does not matter where it does.
        from_best_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / used_B1
        scaled_BV = torch.where(best_B1.isfinite(), scaled_BV, from_best_BV)
    return torch.log_softmax(scaled_BV, -1)


def _changes(writer: Writer, rule: Rule) -> bool:
    """Whether anything but temperature decides on a writer's next token."""
    params = writer.params
    asked = bool(params.logit_bias) or params.penalises or params.truncates
    return asked or rule != FREE or writer.constraint is not None


def _changed(logits_V: Tensor, writer: Writer, rule: Rule) -> Tensor:
    """A copy of a row on the CPU after bias, penalties, thinking budget and grammar; -inf where nothing is allowed."""
    params = writer.params
    logits_V = logits_V.detach().to("cpu", copy=True)
    if params.logit_bias:
        logits_V[list(params.logit_bias)] += torch.tensor(list(params.logit_bias.values()), dtype=logits_V.dtype)
    if writer.counts is not None:
        penalise(logits_V, writer.counts, params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    if rule.bias is not None:
        logits_V[rule.bias[0]] += rule.bias[1]
    if writer.constraint is not None:
        logits_V.masked_fill_(_forbidden(writer, writer.constraint, len(logits_V)), -math.inf)
    logits_V[list(rule.banned)] = -math.inf
    return logits_V


def _forbidden(writer: Writer, constraint: Constraint, vocab_size: int) -> Tensor:
    """Tokens that neither go on with the grammar nor end a whole answer nor begin thinking, bool `[V]`."""
    allowed = np.zeros(vocab_size, np.bool_)
    tokens = constraint.allowed()[:vocab_size]
    allowed[: len(tokens)] = tokens
    allowed[list(writer.stop_ids)] = constraint.may_end
    if writer.may_open is not None:
        allowed[writer.may_open] = True
    return torch.from_numpy(~allowed)


def _top(logprobs_V: Tensor, count: int | None) -> Top:
    """The likeliest tokens, best first, equal ones by id."""
    if not count:
        return ()
    values, tokens = logprobs_V.topk(min(count, len(logprobs_V)))
    return tuple(sorted(zip(tokens.tolist(), values.tolist(), strict=True), key=lambda pair: (-pair[1], pair[0])))
