"""What a phase of pretraining mixes: texts and conversations as shards with weights, prepared once and found again.

Texts carry loss on every token; conversations (worked problems, JSON-lines files) on the assistant's turns only. How
batches are dealt from them is `data.loader`'s matter, and what a run does with them `train.phase`'s.

    texts = text_ingredients(DataConfig(sources={"english": 1.0, "problems": 2.0}), tokenizer, Path("runs/base/shards"))
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from turbos.common.errors import UserError
from turbos.data.chats import ChatTargets, rendered_chats
from turbos.data.corpus import HELD_OUT_TEXTS, SourceShards, build_shards
from turbos.data.mixture import english_weights, languages_of, require_sources
from turbos.data.shards import ShardReader, write_rendered
from turbos.text.tokenizer import Tokenizer
from turbos.train.problems import Mode, ProblemMix, held_out_samples, problem_stream

PROBLEMS = "problems"
HELD_OUT_PROBLEMS = 200
"""Held-out problems of each mode that a phase is measured on."""
MODES: tuple[Mode, ...] = ("think", "short")


@dataclass(frozen=True)
class DataConfig:
    """What to read: `sources` are names or paths with their shares of the tokens (weights).

    `english_share` turns the weights so that English has that share of what sources in English and in Chinese have
    together; `languages` says what those without a card are in (en, zh, or another word for neither).
    `tokenizer` is a directory that holds one; None trains one of `model.vocab_size` tokens on about
    `tokenizer_characters` of each source. `longest_document` cuts longer texts (None: one micro-batch); where several
    fit a micro-batch, it mixes sources. `megabytes` limits each source. Each evaluation reads about `held_out_tokens`
    of each source. `shards` is where tokenised sources lie, to be shared by runs (None: in the run's directory).
    """

    sources: dict[str, float]
    english_share: float | None = None
    languages: dict[str, str] = field(default_factory=dict)
    tokenizer: str | None = None
    tokenizer_characters: int = 1_000_000
    longest_document: int | None = None
    megabytes: float | None = None
    held_out_tokens: int = 16_384
    cache_dir: str | None = None
    shards: str | None = None

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("data: sources names no text: add at least one")
        if self.tokenizer_characters < 1 or self.held_out_tokens < 1:
            raise UserError("data: tokenizer_characters and held_out_tokens must be at least 1")
        if self.megabytes is not None and not self.megabytes > 0:
            raise UserError(f"data: megabytes must be above 0, or null for no limit; not {self.megabytes}")
        if self.languages and self.english_share is None:
            raise UserError("data: languages says nothing without english_share: set that too, or leave both out")
        # Refuses an impossible dial here, before a run's directory is made.
        self.weights()

    def weights(self) -> dict[str, float]:
        """The weight of each source after the dial."""
        if self.english_share is None:
            return self.sources
        languages = languages_of(list(self.sources), self.languages)
        return english_weights(self.sources, languages, self.english_share)


@dataclass(frozen=True)
class ChatConfig:
    """Conversations with their weights beside those of `data.sources`, in the same unit.

    `problems` in `sources` stands for `num_problems` checked problems drawn from the mix in `problems`; any other name
    is the path of a `.jsonl` file of conversations (`data.chats`).
    """

    sources: dict[str, float]
    problems: ProblemMix = ProblemMix()
    num_problems: int = 20_000

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("chats: sources names no conversations: add at least one")
        if self.num_problems < 1:
            raise UserError("chats: num_problems must be at least 1")


@dataclass(frozen=True)
class Ingredient:
    """A source in shards, its weight, and for conversations which tokens carry loss."""

    shards: SourceShards
    weight: float
    targets: ChatTargets | None = None


def text_ingredients(config: DataConfig, tokenizer: Tokenizer, directory: Path) -> list[Ingredient]:
    """Each text source in shards below a directory; UserError for one that is not there, before any is read."""
    weights = config.weights()
    require_sources(list(weights))
    shards = build_shards(list(weights), tokenizer, directory, config.cache_dir, config.megabytes)
    return [Ingredient(one, weights[one.name]) for one in shards]


def chat_ingredients(config: ChatConfig, tokenizer: Tokenizer, directory: Path, seed: int) -> list[Ingredient]:
    """Each source of conversations in shards below a directory, found again where it has not changed."""
    targets = ChatTargets.of(tokenizer)
    found = []
    for name, weight in config.sources.items():
        if name == PROBLEMS:
            key = f"{config.problems} {config.num_problems} {seed}"
            made = _problem_chats(config, tokenizer, seed)
        else:
            path = Path(name).expanduser()
            key = f"{path} {path.stat().st_size if path.is_file() else 0}"
            made = _split(rendered_chats(path, tokenizer))
        found.append(Ingredient(_chat_shards(name, key, made, tokenizer, directory), weight, targets))
    return found


def _problem_chats(config: ChatConfig, tokenizer: Tokenizer, seed: int) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Problems for training, then held-out ones, and which is which."""
    stream = problem_stream(config.problems, tokenizer, f"anneal seed {seed}")
    yield from ((sample.ids, False) for sample in itertools.islice(stream, config.num_problems))
    for mode in MODES:
        held_out = held_out_samples(config.problems, tokenizer, mode, HELD_OUT_PROBLEMS)
        yield from ((sample.ids, True) for sample in held_out)


def _split(chats: Iterable[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Each different conversation once, and whether it is held out: by a hash of itself, as texts are."""
    seen: set[bytes] = set()
    for ids in chats:
        digest = hashlib.blake2b(repr(ids).encode(), digest_size=12).digest()
        if digest not in seen:
            seen.add(digest)
            yield ids, int.from_bytes(digest, "big") % HELD_OUT_TEXTS == 0


def _chat_shards(
    name: str, key: str, made: Iterable[tuple[Sequence[int], bool]], tokenizer: Tokenizer, directory: Path
) -> SourceShards:
    digest = hashlib.sha256(f"{name} {key} {tokenizer.fingerprint}".encode()).hexdigest()[:12]
    stem = "chats-" + re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem) + f"-{digest}"
    shards = SourceShards(f"chats:{name}", directory / f"{stem}.train.shard", directory / f"{stem}.held-out.shard")
    if shards.train.is_file() and shards.held_out.is_file():
        for path in (shards.train, shards.held_out):
            ShardReader(path, tokenizer).verify()
        return shards
    rows = list(made)
    if len(rows) < 2:
        raise UserError(f"chats: {name!r} holds {len(rows)} conversations: too few to hold one out, give it more")
    held_out = [ids for ids, is_held_out in rows if is_held_out] or [rows[-1][0]]
    train = [ids for ids, is_held_out in rows if not is_held_out and ids is not held_out[0]]
    write_rendered(shards.held_out, held_out, tokenizer)
    write_rendered(shards.train, train, tokenizer)
    return shards
