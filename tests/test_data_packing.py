"""Packing and the loader: whole documents, once per epoch, as pure functions."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbos.common.errors import UserError
from turbos.common.records import IGNORED, Sample
from turbos.data.loader import Loader, Part, batches_once
from turbos.data.packing import batch_of, pack_lengths, pack_samples
from turbos.data.shards import ShardReader, write_shard
from turbos.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["abc def ghi jkl"] * 5, vocab_size=304)


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_packing_keeps_every_item_once_and_within_room(lengths: list[int], room: int) -> None:
    bins = pack_lengths(lengths, room)
    assert sorted(item for content in bins for item in content) == list(range(len(lengths)))
    loads = [sum(lengths[item] for item in content) for content in bins]
    assert all(load <= room for load in loads)


def slow_best_fit(lengths: list[int], room: int) -> list[int]:
    """Loads of best fit decreasing, by looking at every bin."""
    loads: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, load in enumerate(loads) if load + length <= room]
        if fitting:
            loads[max(fitting, key=lambda number: loads[number])] += length
        else:
            loads.append(length)
    return sorted(loads)


@given(st.lists(st.integers(1, 50), max_size=60))
def test_packing_is_best_fit_decreasing(lengths: list[int]) -> None:
    bins = pack_lengths(lengths, 50)
    assert sorted(sum(lengths[item] for item in content) for content in bins) == slow_best_fit(lengths, 50)


def test_realistic_lengths_fill_the_bins() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.3, 1.0, 20_000).astype(int), 1, 2048).tolist()
    assert sum(lengths) / (2048 * len(pack_lengths(lengths, 2048))) >= 0.97


def test_samples_are_never_cut() -> None:
    samples = [Sample((1,) * length, (0.0,) * length) for length in (3, 9, 4)]
    assert sorted(map(sorted, pack_samples(samples, 9))) == [[0, 2], [1]]
    with pytest.raises(UserError, match="9 tokens does not fit 8"):
        pack_samples(samples, 8)


def test_batches_shift_weights_logprobs_and_advantages() -> None:
    first = Sample((5, 6, 7), (0.0, 0.5, 1.0), logprobs=(0.0, -1.0, -2.0), advantage=2.0)
    second = Sample((8, 9), (0.0, 0.0))
    batch = batch_of([first, second])
    assert batch.tokens_T.tolist() == [5, 6, 7, 8, 9] and batch.documents.lengths == [3, 2]
    assert batch.targets_T.tolist() == [6, 7, IGNORED, IGNORED, IGNORED]
    assert batch.loss_weights_T.tolist() == [0.5, 1.0, 0.0, 0.0, 0.0]
    assert batch.logprobs_T is not None and batch.logprobs_T.tolist() == [-1.0, -2.0, 0.0, 0.0, 0.0]
    assert batch.advantages_T is not None and batch.advantages_T.tolist() == [2.0, 2.0, 2.0, 0.0, 0.0]
    assert batch_of([second]).logprobs_T is None


def shard_of(folder: Path, name: str, lengths: list[int]) -> ShardReader:
    """A shard whose documents have the given lengths, each with a text of its own letters."""
    texts = [
        f"{number:05d}" + "x " * ((length - 7) // 2) + "y" * ((length - 7) % 2)
        for number, length in lengths_of(lengths)
    ]
    write_shard(folder / name, texts, TOKENIZER)
    return ShardReader(folder / name, TOKENIZER)


def lengths_of(lengths: list[int]) -> list[tuple[int, int]]:
    return list(enumerate(lengths))


def seen_documents(loader: Loader, steps: range) -> Counter[tuple[int, ...]]:
    """How often each document (or piece) was in the batches of some steps."""
    seen: Counter[tuple[int, ...]] = Counter()
    for step in steps:
        batch = loader.batch(step)
        tokens = batch.tokens_T.tolist()
        borders = batch.documents.borders
        seen.update(tuple(tokens[start:end]) for start, end in pairwise(borders))
    return seen


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(8, 120), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 5))
def test_every_document_is_seen_whole_once_per_epoch(tmp_path: Path, lengths: list[int], slots: int, seed: int) -> None:
    reader = shard_of(tmp_path, "a.shard", lengths)
    whole = Counter(tuple(document.tolist()) for document in reader.documents())
    longest = max(map(len, whole))
    loader = Loader([Part("a", (reader,))], longest * slots, seed, longest_document=longest)
    steps = loader.slots_in_epoch("a")
    seen = seen_documents(loader, range(steps))
    assert seen == Counter({document: count * slots for document, count in whole.items()})
    assert sum(sum(map(len, [batch.tokens_T])) for batch in batches_once(reader, longest)) == reader.info.tokens


def test_long_documents_are_cut_and_predict_across_the_cut(tmp_path: Path) -> None:
    reader = shard_of(tmp_path, "a.shard", [100])
    document = reader.document(0)
    batches = list(batches_once(reader, 32))
    pairs = {(t, y) for b in batches for t, y in zip(b.tokens_T.tolist(), b.targets_T.tolist(), strict=True)}
    targets = sum(int((batch.targets_T != IGNORED).sum()) for batch in batches)
    assert targets == len(document) - 1
    assert pairs <= {*zip(document.tolist(), document.tolist()[1:], strict=False), (int(document[-1]), IGNORED)}
    assert document[-1] == TOKENIZER.special("<|endoftext|>")


def test_a_batch_depends_on_its_step_only(tmp_path: Path) -> None:
    readers = [shard_of(tmp_path, f"{name}.shard", list(range(9, 60))) for name in "ab"]
    parts = [Part("a", (readers[0],), 3.0), Part("b", (readers[1],), 1.0)]
    loader = Loader(parts, 256, seed=1, longest_document=64)
    forward = [loader.batch(step).tokens_T for step in range(60)]
    for step in (59, 3, 31, 0):
        fresh = Loader(parts, 256, seed=1, longest_document=64).batch(step)
        assert torch.equal(fresh.tokens_T, forward[step])
    assert any(
        not torch.equal(Loader(parts, 256, seed=2, longest_document=64).batch(s).tokens_T, forward[s]) for s in range(5)
    )


def test_weights_are_shares_of_the_tokens(tmp_path: Path) -> None:
    few = shard_of(tmp_path, "few.shard", [16] * 40)
    many = [f"{number:05d}zz" for number in range(400)]
    write_shard(tmp_path / "many.shard", many, TOKENIZER)
    loader = Loader([Part("few", (few,), 0.7), Part("many", (ShardReader(tmp_path / "many.shard"),), 0.3)], 64, seed=0)
    z = TOKENIZER.encode("z")[0]
    sources = Counter(z in loader.batch(step).tokens_T.tolist() for step in range(2048))
    assert sources[True] / 2048 == pytest.approx(0.3, abs=0.002)


@pytest.mark.parametrize(
    ("parts", "tokens", "said"), [([], 64, "no source"), ([0.0], 64, "above 0"), ([1.0], 1, "longest_document")]
)
def test_impossible_mixtures_are_named(tmp_path: Path, parts: list[float], tokens: int, said: str) -> None:
    reader = shard_of(tmp_path, "a.shard", [9])
    with pytest.raises(UserError, match=said):
        Loader([Part("a", (reader,), weight) for weight in parts], tokens)
