"""What `turbos bench serve` asks, and of which model: the plan, its texts, a checkpoint with random weights.

Texts are words of this package's own source, drawn from a seed: as many tokens a word as source has, no meaning. The
same plan asks the same of every program.

    plan = ServePlan(threads=2)
    checkpoint = make_checkpoint(plan, Path("somewhere"))
    requests = plan.requests(number=0)
    python -m turbos.bench.serve_plan DIRECTORY         # the same checkpoint, for other clients' measurements
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from turbos.bench.peers import bench_model
from turbos.common.errors import UserError
from turbos.common.machine import usable_cores
from turbos.model.card import Card
from turbos.model.lm import LanguageModel
from turbos.model.package import Package, load_package, write_package
from turbos.text.tokenizer import Tokenizer

SHAPE = "bench-26m"
MEMORY = 3 * 2**30
"""Bytes for each of our engines, so that every machine has the same plan."""
SNAPSHOT_EVERY = 512
"""Tokens between states that our engines keep within a prompt: the server's default."""


@dataclass(frozen=True)
class ServePlan:
    """How many ask at once for how much, and the conversation that is read again.

    A request has `shortest` to `longest` words and wants `answer` tokens. The conversation has `turns` questions of
    `question` words, each answered with `reply` tokens; `changed` is the one that is edited, or left out by a fork.
    A message of `document` words is asked twice, with other words from its middle on.
    """

    threads: int = min(2, usable_cores())
    streams: int = 64
    rounds: int = 5
    shortest: int = 8
    longest: int = 72
    answer: int = 64
    turns: int = 10
    question: int = 50
    reply: int = 48
    changed: int = 5
    document: int = 800
    memory: int = MEMORY
    peer: bool = True

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise UserError(f"bench serve: --threads must be at least 1, not {self.threads}")
        assert 0 < self.changed < self.turns, "a question in the middle"

    def requests(self, number: int) -> list[str]:
        """Texts of one round, unlike in length and beginning; the longest and the shortest come in turn."""
        step = (self.longest - self.shortest) / self.streams
        lengths = [self.shortest + round(place * step) for place in range(self.streams)]
        order = sorted(range(self.streams), key=lambda place: (place % 7, place))
        return [words(lengths[place], f"round {number} {place}") for place in order]

    def questions(self) -> list[str]:
        """What is asked in the conversation, in order."""
        return [words(self.question, f"question {turn}") for turn in range(self.turns)]

    def edited(self) -> tuple[str, str]:
        """The changed question: its words that stay, and the whole of it, other words from the middle on."""
        return _other_end(words(self.question, f"question {self.changed}"))

    def documents(self) -> tuple[str, str, str]:
        """A long message, its words that stay, and the whole with other words from the middle on."""
        before = words(self.document, "document")
        return before, *_other_end(before)


def words(count: int, seed: str) -> str:
    """So many words, the same for the same seed."""
    return " ".join(random.Random(seed).choices(_vocabulary(), k=count))


def _other_end(text: str) -> tuple[str, str]:
    """The first half of a text, and that half with other words after it."""
    found = text.split()
    kept = " ".join(found[: len(found) // 2])
    return kept, f"{kept} {words(len(found) - len(found) // 2, 'another end')}"


@cache
def _vocabulary() -> Sequence[str]:
    found = {word for text in _sources() for word in re.findall(r"[a-z]{2,12}", text)}
    return sorted(found)


def _sources() -> list[str]:
    root = Path(__file__).resolve().parent.parent
    return [path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.py"))]


def make_checkpoint(directory: Path, model: LanguageModel | None = None) -> Path:
    """A checkpoint of the benchmark's shape from seed 0, with a tokenizer trained on this package's source.

    Special tokens cannot be the likeliest: an answer then has as many tokens as were asked for, and all are text.
    """
    model = model or bench_model(SHAPE)
    tokenizer = Tokenizer.train(_sources(), vocab_size=model.config.vocab_size)
    with torch.no_grad():
        for rows in (sorted(tokenizer.special_ids), slice(tokenizer.vocab_size, None)):
            # Small and not zero: where the head is the embedding, too, a zero would make experts equally likely.
            model.head_weight[rows] *= 0.1
    directory.mkdir(parents=True)
    write_package(directory, model, tokenizer, Card(title="Bench"))
    return directory


def open_checkpoint(directory: Path) -> Package:
    """A checkpoint that can be measured. UserError for one without our layout of chats."""
    package = load_package(directory)
    if not package.tokenizer.speaks_chat:
        raise UserError(f"bench serve: {directory}: its chat template is its own; choose a checkpoint of turbos")
    return package


def say(line: str) -> None:
    """A line for whoever watches."""
    print(f"bench serve: {line}", file=sys.stderr)


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]))
