"""The engine alone in a process of its own, for `turbos bench serve`: the server's requests without the server.

It answers one line of JSON for each that it reads:

    python -m turbos.bench.serve_engine CHECKPOINT THREADS MEMORY STREAMS

    -> {"engine": ["engine: fused step, ...", "memory: ..."]}
    <- {"texts": ["what is ...", ...], "answer": 64}
    -> {"seconds": 6.1, "firsts": [0.2, ...], "tokens": 4096, "prompts": [[5, 17, ...], ...]}

Prompts, marks and sampling are what the server makes of the same chats; encoding them is not counted here.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from turbos.bench.serve_plan import SNAPSHOT_EVERY
from turbos.common.machine import keep_freed_memory, set_threads
from turbos.engine.config import EngineConfig, Precision
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.engine.sequence import Delta
from turbos.text.chat import opening_ids, render
from turbos.text.messages import Message
from turbos.text.thinking import Thinking
from turbos.text.tokenizer import Tokenizer

PRECISION: Precision = "int8"


@dataclass(frozen=True)
class Prompt:
    """A chat's tokens, and after how many of them the server has the state kept."""

    ids: tuple[int, ...]
    mark: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, text: str) -> Prompt:
        """Of a question without anything before it."""
        asked = render(tokenizer, [Message("user", text)]).ids
        return cls((*asked, *opening_ids(tokenizer, Thinking())), len(asked))


def run_requests(engine: Engine, prompts: Sequence[Prompt], answer: int) -> dict[str, Any]:
    """Put all in line at once and run them to their end."""
    params = SamplingParams(max_new_tokens=answer, stop_ids=frozenset())
    firsts: dict[int, float] = {}
    tokens = 0
    start = time.perf_counter()
    for place, prompt in enumerate(prompts):

        def note(delta: Delta, place: int = place) -> None:
            nonlocal tokens
            firsts.setdefault(place, time.perf_counter() - start)
            tokens += len(delta.ids)

        engine.submit(prompt.ids, params, marks=(prompt.mark,), sink=note)
    while engine.step():
        pass
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "firsts": list(firsts.values()), "tokens": tokens}


def main(checkpoint: str, threads: str, memory: str, streams: str) -> None:
    """Answer until there is no more to read."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # As the server's command does.
    set_threads(int(threads))
    keep_freed_memory()
    config = EngineConfig(
        memory=int(memory),
        max_running=int(streams),
        precision=PRECISION,
        threads=int(threads),
        snapshot_every=SNAPSHOT_EVERY,
    )
    engine = Engine.from_checkpoint(checkpoint, config)
    assert engine.tokenizer is not None, "a checkpoint has one"
    print(json.dumps({"engine": engine.describe()}), file=answers, flush=True)
    # In a thread of its own, as the server drives it: OpenMP's threads wait otherwise in a process's main thread, which
    # alone can double the time where other programs want the cores.
    with ThreadPoolExecutor(1) as driver:
        for line in sys.stdin:
            asked = json.loads(line)
            prompts = [Prompt.of(engine.tokenizer, text) for text in asked["texts"]]
            found = driver.submit(run_requests, engine, prompts, asked["answer"]).result()
            print(json.dumps({**found, "prompts": [prompt.ids for prompt in prompts]}), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
