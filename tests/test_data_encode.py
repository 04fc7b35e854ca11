"""Tokenising: the same ids as one text at a time, in order, at the library's own rate, lazily."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from turbos.data.encode import calls_of, encoded
from turbos.data.shards import write_shard
from turbos.text.tokenizer import Tokenizer


@given(st.lists(st.text(max_size=30), max_size=40), st.integers(1, 50), st.integers(1, 5))
def test_calls_keep_every_text_in_order(texts: list[str], characters: int, most: int) -> None:
    groups = list(calls_of(texts, characters, most))
    assert [text for group in groups for text in group] == texts
    assert all(1 <= len(group) <= most and sum(map(len, group[:-1])) < characters for group in groups)


def test_rows_are_the_ids_of_each_text_and_its_bytes() -> None:
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc 12\n文é", k=draw.randint(1, 80))) for _ in range(500)]
    for text, (ids, size) in zip(texts, encoded(texts, tiny_tokenizer(), end=7), strict=True):
        assert ids.tolist() == [*tiny_tokenizer().encode(text), 7] and ids.dtype == np.uint32
        assert size == len(text.encode())


def test_many_calls_come_back_in_order() -> None:
    texts = [f"{number:04d} " for number in range(2000)]
    found = [tiny_tokenizer().decode(ids[:-1].tolist()) for ids, _ in encoded(texts, tiny_tokenizer(), 7, 100)]
    assert found == texts


def test_texts_are_read_no_more_than_a_few_calls_ahead() -> None:
    read: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(100_000):
            read.append(number)
            yield "x" * 10

    next(encoded(texts(), tiny_tokenizer(), 7, call_characters=1000))
    assert len(read) * 10 <= 3 * 1000


def test_a_shard_is_written_at_the_rate_of_the_library_alone(tmp_path: Path) -> None:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(3000)]
    texts = [" ".join(draw.choices(words, k=600)) for _ in range(400)]
    tokenizer = Tokenizer.train(texts[:100], vocab_size=2048)
    tokenizer.encode_batch(texts[:50])
    # Interleaved, and the best of each, because the machine has other work.
    alone, written = [], []
    for _ in range(3):
        started = time.perf_counter()
        tokenizer.encode_batch(texts)
        alone.append(time.perf_counter() - started)
        started = time.perf_counter()
        write_shard(tmp_path / "a.shard", texts, tokenizer)
        written.append(time.perf_counter() - started)
    assert min(alone) / min(written) > 0.7
