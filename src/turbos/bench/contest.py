"""`turbos bench peers`: training, prefill and decode of the same weights and tokens, ours against every peer found.

All run in fp32, with as many threads, in turn within each round. Before anything is measured, the log-probabilities
after a prompt are compared: speeds of things that differ are not. A peer that is not there is left out with one line.
Training is measured against transformers alone, the others do not train.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from turbos.bench.contestants import Contestant, LlamaBench, Ours, Transformers, Worker
from turbos.bench.peers import (
    Times,
    bench_model,
    interleave,
    interleave_timed,
    load_transformers,
    require_agreement,
    save_for_peers,
)
from turbos.bench.prefill import prompt
from turbos.bench.rows import Row
from turbos.bench.train import our_step, their_step
from turbos.common.errors import UserError
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import SMALLEST_VOCABULARY, Tokenizer

CANDIDATES = 20
"""Next tokens whose log-probabilities are compared."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens of a training step and of the prompts, tokens before and in decoding, rounds."""

    train: int = 2048
    prefill: tuple[int, ...] = (256, 2048)
    context: int = 256
    steps: int = 64
    rounds: int = 5

    @property
    def longest(self) -> int:
        """Tokens that a cache must hold."""
        return max(*self.prefill, self.context + self.steps) + 8


@dataclass(frozen=True)
class Elsewhere:
    """Where peers are that this environment does not have: a llama-bench program, an environment with vLLM."""

    llama_bench: Path | None = None
    vllm: Path | None = None


def bench_peers(
    elsewhere: Elsewhere = Elsewhere(), sizes: Sizes = Sizes(), model: LanguageModel | None = None
) -> Sequence[Row]:
    """Rows `train N`, `prefill N` and `decode after N`, tok/s; `model` None takes the benchmarks' shape."""
    model = model or bench_model()
    with tempfile.TemporaryDirectory() as parent, ExitStack() as stack:
        directory = save_for_peers(model, parent)
        contestants: list[Contestant] = [Ours(model)]
        rows = []
        if importlib.util.find_spec("transformers") is None:
            _say("transformers is left out: not installed (pip install 'turbos[peers]')")
        else:
            peer = load_transformers(directory)
            rows.append(_train_row(model, peer.train(), sizes))
            contestants.append(Transformers(peer.eval()))
        contestants += _elsewhere(elsewhere, model, directory, sizes, stack)
        _require_agreement(contestants, prompt(model.config.vocab_size, sizes.context))
        return [*rows, *_inference_rows(contestants, model.config.vocab_size, sizes)]


def _elsewhere(
    elsewhere: Elsewhere, model: LanguageModel, directory: Path, sizes: Sizes, stack: ExitStack
) -> Iterator[Contestant]:
    """llama.cpp and vLLM, as far as they are there; a line for each that is not."""
    threads = torch.get_num_threads()
    found = importlib.util.find_spec("xllamacpp") is not None
    if elsewhere.llama_bench is None and not found:
        _say("llama.cpp is left out: not installed (pip install 'turbos[peers]', or name a program: --llama-bench)")
    else:
        path = write_bench_gguf(model, directory)
        if elsewhere.llama_bench is not None:
            yield LlamaBench(_existing(elsewhere.llama_bench, "--llama-bench"), path, threads)
        else:
            python = Path(sys.executable)
            yield stack.enter_context(Worker("llama.cpp", "llama.cpp", python, path, threads, sizes.longest))
    if elsewhere.vllm is None:
        _say("vLLM is left out: name an environment that has it with --vllm")
    else:
        python = _existing(elsewhere.vllm / "bin" / "python", "--vllm")
        yield stack.enter_context(Worker("vLLM", "vllm", python, directory, threads, sizes.longest))


def write_bench_gguf(model: LanguageModel, directory: Path) -> Path:
    """The same weights for llama.cpp; its file wants a tokenizer, of which nothing is measured."""
    from turbos.model.gguf import write_gguf

    path = directory / "model.gguf"
    write_gguf(model, Tokenizer.train(["bench bench"], SMALLEST_VOCABULARY + 8), path, "f32")
    return path


def _existing(path: Path, option: str) -> Path:
    if not path.is_file():
        raise UserError(f"bench: {option}: there is no {path}")
    return path


def _say(line: str) -> None:
    print(f"bench peers: {line}", file=sys.stderr)


def _require_agreement(contestants: Sequence[Contestant], tokens: Sequence[int]) -> None:
    """Refuse to compare programs whose next-token log-probabilities differ from ours."""
    ours, vocabulary = contestants[0], max(tokens) + 1
    everything = ours.likeliest(tokens, vocabulary)
    for contestant in contestants[1:]:
        told = contestant.likeliest(tokens, CANDIDATES)
        known = [token for token in told if token in everything]
        if known:
            mine, theirs = ([source[token] for token in known] for source in (everything, told))
            require_agreement(f"log-probabilities of {contestant.name}", torch.tensor(mine), torch.tensor(theirs))


def _train_row(model: LanguageModel, peer: torch.nn.Module, sizes: Sizes) -> Row:
    tokens_T = torch.tensor(prompt(model.config.vocab_size, sizes.train))
    require_agreement("losses", our_step(model, tokens_T), their_step(peer, tokens_T))
    _say(f"train, {sizes.rounds} rounds of {sizes.train} tokens, {torch.get_num_threads()} threads")
    work = {"turbos": lambda: our_step(model, tokens_T), "transformers": lambda: their_step(peer, tokens_T)}
    # The agreement check has run both once.
    times = interleave(work, sizes.rounds, warm_up=0)
    for network in (model, peer):
        network.zero_grad(set_to_none=True)
    return _row(f"train {sizes.train}", sizes.train, times)


def _inference_rows(contestants: Sequence[Contestant], vocabulary: int, sizes: Sizes) -> Iterator[Row]:
    names = ", ".join(contestant.name for contestant in contestants)
    for length in sizes.prefill:
        _say(f"prefill of {length} tokens, {sizes.rounds} rounds: {names}")
        tokens = prompt(vocabulary, length)
        times = interleave_timed({one.name: partial(one.prefill, tokens) for one in contestants}, sizes.rounds)
        yield _row(f"prefill {length}", length, times)
    _say(f"decode of {sizes.steps} tokens after {sizes.context}, {sizes.rounds} rounds: {names}")
    tokens = prompt(vocabulary, sizes.context)
    times = interleave_timed({one.name: partial(one.decode, tokens, sizes.steps) for one in contestants}, sizes.rounds)
    yield _row(f"decode after {sizes.context}", sizes.steps, times)


def _row(name: str, tokens: int, times: Times) -> Row:
    """Our rate, and how many times each peer's it is."""
    ratios: Mapping[str, float] = {peer: times.ratio("turbos", peer) for peer in times.seconds if peer != "turbos"}
    return Row(name, tokens / times.median("turbos"), "tok/s", ratios)
