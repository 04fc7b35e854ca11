"""From sources to shards: one training and one held-out shard per source, written once and found again.

A text is held out by a hash of itself, so that the split does not depend on the order or the number of texts, and
exact repetitions fall on one side and are dropped. What a model reads from the shards is the matter of `loader.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.data.shards import ShardReader, write_shard
from turbos.data.sources import documents
from turbos.text.tokenizer import Tokenizer

HELD_OUT_TEXTS = 50
"""One text in so many is held out."""


@dataclass(frozen=True)
class SourceShards:
    """The two shards of one source."""

    name: str
    train: Path
    held_out: Path


def unique(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Each different text once, and whether it is held out."""
    seen: set[bytes] = set()
    for text in texts:
        digest = hashlib.blake2b(text.encode(), digest_size=12).digest()
        if digest not in seen:
            seen.add(digest)
            yield text, int.from_bytes(digest, "big") % HELD_OUT_TEXTS == 0


def training_texts(names: Sequence[str], characters: int, cache_dir: str | Path | None = None) -> Iterator[str]:
    """Training texts of each source in turn, about `characters` of them from each: what a tokenizer learns from.

    Texts are taken evenly over the source, not from its beginning.
    """
    for name in names:
        kept = [text for text, is_held_out in unique(documents(name, cache_dir)) if not is_held_out]
        stride = max(1, round(sum(map(len, kept)) / characters))
        yield from kept[::stride]


def build_shards(
    names: Sequence[str],
    tokenizer: Tokenizer,
    directory: str | Path,
    cache_dir: str | Path | None = None,
    megabytes: float | None = None,
) -> list[SourceShards]:
    """Shards of each source below a directory; those already written with this tokenizer and limit are kept.

    At most the first `megabytes` (10^6 characters) of each source are taken: needed for endless ones, since a
    source's texts are held in memory. Raises UserError where a source is empty or too small to hold anything out.
    """
    return [_source_shards(name, tokenizer, Path(directory), cache_dir, megabytes) for name in names]


def _first(texts: Iterable[tuple[str, bool]], megabytes: float | None) -> Iterator[tuple[str, bool]]:
    """Texts until their limit is reached."""
    left = float("inf") if megabytes is None else megabytes * 1e6
    for text, is_held_out in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text, is_held_out


def _source_shards(
    name: str, tokenizer: Tokenizer, directory: Path, cache_dir: str | Path | None, megabytes: float | None
) -> SourceShards:
    # A path may hold anything; its hash keeps two sources with like names apart.
    key = hashlib.sha256(f"{name} {megabytes} {tokenizer.fingerprint}".encode()).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9]+", "-", Path(name).name) + "-" + key
    shards = SourceShards(name, directory / f"{stem}.train.shard", directory / f"{stem}.held-out.shard")
    if shards.train.is_file() and shards.held_out.is_file():
        for path in (shards.train, shards.held_out):
            ShardReader(path, tokenizer).verify()
        return shards
    texts = list(_first(unique(documents(name, cache_dir)), megabytes))
    if not texts:
        raise UserError(f"source {name!r} holds no text: name another")
    held_out = [text for text, is_held_out in texts if is_held_out] or [texts[-1][0]]
    train = [text for text, is_held_out in texts if not is_held_out and text is not held_out[0]]
    if not train:
        raise UserError(f"source {name!r} has {len(texts)} texts: too few to hold one out, give it more")
    write_shard(shards.held_out, held_out, tokenizer)
    write_shard(shards.train, train, tokenizer)
    return shards
