"""The play tab: one held-out problem, answered with thinking left to the model, on and off, side by side, and judged.

For models that were trained on families of problems and little else: a free chat would only show what they cannot do.
Which families those are, and at which level, stands on the checkpoint's card. Nothing is kept: a game is one request.

>>> known_problems("## Data\\n\\n- generated problems with checked answers: gcd/0, chain_sum/1\\n")
(KnownFamily(name='chain_sum', levels=4, trained=(1,)), KnownFamily(name='gcd', levels=3, trained=(0,)))
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from turbos.common.records import Problem, Verdict
from turbos.data.problems import check, families, levels
from turbos.engine.sampling_params import SamplingParams
from turbos.eval.problems import token_counts
from turbos.model.card import CARD_FILE
from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.serve.service import Finished, Service
from turbos.text.messages import Message
from turbos.text.stream import ContentDelta, ReasoningDelta, RecastDelta
from turbos.text.thinking import Thinking

LARGEST_DEMO = 30_000_000
"""Parameters of a model that is small enough to know only what it was drilled in."""

CONVERSATIONS = re.compile(r"^- conversations ", re.MULTILINE)
"""What a card says of a model that was trained to talk as well."""

Mode = Literal["auto", "on", "off"]
MODES: tuple[Mode, ...] = get_args(Mode)
LONGEST_GAME = 256
"""Tokens of an answer, thinking included."""


@dataclass(frozen=True)
class KnownFamily:
    """A family that a model was trained or measured on: how many levels there are, and which of them it has seen."""

    name: str
    levels: int
    trained: tuple[int, ...]


def known_problems(card: str) -> tuple[KnownFamily, ...]:
    """The families that a card names as `family/level`; none where conversations were among the data."""
    if CONVERSATIONS.search(card):
        return ()
    found: dict[str, set[int]] = {}
    for name, level in re.findall(r"\b([a-z_]+)/(\d)\b", card):
        if name in families() and int(level) < levels(name):
            found.setdefault(name, set()).add(int(level))
    return tuple(KnownFamily(name, levels(name), tuple(sorted(found[name]))) for name in sorted(found))


def demo_families(directory: Path, config: ModelConfig) -> tuple[KnownFamily, ...]:
    """The families to play with a checkpoint: those on its card, if it is small enough to know nothing else."""
    card = directory / CARD_FILE
    if describe(config).total_params > LARGEST_DEMO or not card.is_file():
        return ()
    return known_problems(card.read_text(encoding="utf-8", errors="replace"))


@dataclass(frozen=True)
class Said:
    """More of one mode's answer. A recast has no text: what stands so far was thinking."""

    mode: Mode
    kind: Literal["reasoning", "content", "recast"]
    text: str


@dataclass(frozen=True)
class Judged:
    """One mode's answer is over."""

    mode: Mode
    verdict: Verdict
    thinking_tokens: int
    answer_tokens: int
    seconds: float


async def play(service: Service, problem: Problem) -> AsyncIterator[Said | Judged]:
    """The three answers as they come, mixed; leaving early ends them."""
    queue: asyncio.Queue[Said | Judged | BaseException] = asyncio.Queue()
    tasks = [asyncio.create_task(_answer(service, problem, mode, queue)) for mode in MODES]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            left -= isinstance(item, Judged)
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _answer(
    service: Service, problem: Problem, mode: Mode, queue: asyncio.Queue[Said | Judged | BaseException]
) -> None:
    try:
        async for item in _answers(service, problem, mode):
            queue.put_nowait(item)
    # Whatever it is, it belongs to the request that waits on the queue.
    except Exception as error:
        queue.put_nowait(error)


async def _answers(service: Service, problem: Problem, mode: Mode) -> AsyncIterator[Said | Judged]:
    start = time.perf_counter()
    prompt = service.prompt([Message("user", problem.question)], (), Thinking(mode))
    params = SamplingParams(max_new_tokens=LONGEST_GAME)
    async for event in service.answer(prompt, params):
        if isinstance(event, Finished):
            verdict = check(problem, event.message.content)
            if event.reason != "stop":
                verdict = Verdict("fail", 0.0, "the turn was not ended")
            thinking, answer = token_counts(service.tokenizer, event.message.ids or ())
            yield Judged(mode, verdict, thinking, answer, time.perf_counter() - start)
        else:
            part = _part(mode, event.delta)
            if part is not None:
                yield part


def _part(mode: Mode, delta: object) -> Said | None:
    """What the page shows of a delta; a call of a tool is nothing here."""
    if isinstance(delta, ReasoningDelta):
        return Said(mode, "reasoning", delta.text)
    if isinstance(delta, ContentDelta):
        return Said(mode, "content", delta.text)
    return Said(mode, "recast", "") if isinstance(delta, RecastDelta) else None
