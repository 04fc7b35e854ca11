"""Texts to token arrays at the tokenizer library's own rate: it works on all cores while Python packs what it gave.

The library shares a call's texts out over the cores and lets go of Python meanwhile. So one call is given enough text
to keep them busy, and runs in a thread while the results of the call before are turned into arrays and written. Files
are `shards.py`'s matter.

>>> tokenizer = Tokenizer.train(["to be or not to be"] * 3, vocab_size=304)
>>> [(ids.tolist() == [*tokenizer.encode(text), 0], size) for text, (ids, size) in
...  zip(["to be", "不"], encoded(["to be", "不"], tokenizer, end=0))]
[(True, 5), (True, 3)]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from turbos.text.tokenizer import Tokenizer

CALL_CHARACTERS = 2_000_000
"""Characters of one call: a second or so of work on a core, and memory for about ten times that."""
CALL_TEXTS = 8192


def calls_of(texts: Iterable[str], characters: int = CALL_CHARACTERS, most: int = CALL_TEXTS) -> Iterator[list[str]]:
    """Texts in groups that end as soon as they hold so many characters or texts.

    >>> list(calls_of(["ab", "c", "defg", "h"], characters=3))
    [['ab', 'c'], ['defg'], ['h']]
    """
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= characters or len(group) >= most:
            yield group
            group, size = [], 0
    if group:
        yield group


def encoded(
    texts: Iterable[str], tokenizer: Tokenizer, end: int, call_characters: int = CALL_CHARACTERS
) -> Iterator[tuple[np.ndarray, int]]:
    """Ids of each text followed by `end` (uint32), and its UTF-8 bytes, in order.

    A call of the library is given about `call_characters`; two calls' texts are held at a time.
    """

    def work(group: list[str]) -> list[list[int]]:
        return tokenizer.encode_batch(group)

    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: tuple[list[str], Future[list[list[int]]]] | None = None
        for group in calls_of(texts, call_characters):
            following = group, pool.submit(work, group)
            if waiting is not None:
                yield from _rows(waiting[0], waiting[1].result(), end)
            waiting = following
        if waiting is not None:
            yield from _rows(waiting[0], waiting[1].result(), end)


def _rows(group: list[str], found: list[list[int]], end: int) -> Iterator[tuple[np.ndarray, int]]:
    for text, ids in zip(group, found, strict=True):
        ids.append(end)
        yield np.array(ids, dtype=np.uint32), len(text) if text.isascii() else len(text.encode())
