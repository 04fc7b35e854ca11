"""`turbos bench prefill`: reading a prompt into a cache, ours in segments against transformers' whole prompt, fp32.

Speed is measured interleaved in this process. Memory is the growth of the peak resident size over one prefill, each
in a process of its own (Linux only, where the peak can be reset). The engine's reading of a long prompt, into the pages
of its pool and in its shorter segments, is measured for memory alone:

    python -m turbos.bench.prefill turbos 8192 CHECKPOINT_DIR      # prints bytes
    python -m turbos.bench.prefill engine 32768 CHECKPOINT_DIR
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from turbos.bench.peers import bench_model, interleave, load_transformers, require_agreement, save_for_peers
from turbos.bench.rows import Row
from turbos.common.machine import keep_freed_memory
from turbos.common.records import Documents
from turbos.engine.config import SEGMENT
from turbos.engine.layout import Layout
from turbos.engine.pool import StatePool
from turbos.model.checkpoint import load_model
from turbos.model.generate import prefill
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState

LENGTHS, ROUNDS, MIB = (2048, 8192), {2048: 7, 8192: 3}, 2**20
ENGINE_LENGTHS = (32768,)


def bench_prefill(lengths: Sequence[int] = LENGTHS, engine_lengths: Sequence[int] = ()) -> Sequence[Row]:
    """Rows `prefill <length>` (tok/s), `prefill <length> memory` and `engine prefill <length> memory` (MiB grown)."""
    model = bench_model()
    rows = []
    with tempfile.TemporaryDirectory() as parent:
        directory = save_for_peers(model, parent)
        peer = load_transformers(directory).eval()
        for length in lengths:
            rows.append(_speed(model, peer, length))
            rows.append(_memory(directory, length))
        rows += [_memory(directory, length, "engine") for length in engine_lengths]
    return rows


def _speed(model: LanguageModel, peer: nn.Module, length: int) -> Row:
    tokens = prompt(model.config.vocab_size, length)
    require_agreement("last logits", our_prefill(model, tokens), their_prefill(peer, tokens))
    rounds = ROUNDS.get(length, 3)
    print(f"bench prefill: {rounds} rounds at {length} tokens, {torch.get_num_threads()} threads", file=sys.stderr)
    work = {"turbos": lambda: our_prefill(model, tokens), "transformers": lambda: their_prefill(peer, tokens)}
    times = interleave(work, rounds, warm_up=0)  # the agreement check has run both
    ratios = {"transformers": times.ratio("turbos", "transformers")}
    return Row(f"prefill {length}", length / times.median("turbos"), "tok/s", ratios)


def _memory(directory: Path, length: int, ours: str = "turbos") -> Row:
    grown = {}
    for name in (ours, "transformers"):
        command = [sys.executable, "-m", "turbos.bench.prefill", name, str(length), str(directory)]
        grown[name] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratios = {"transformers": grown["transformers"] / grown[ours]}
    name = f"prefill {length} memory"
    return Row(name if ours == "turbos" else f"{ours} {name}", grown[ours] / MIB, "MiB grown", ratios)


def prompt(vocabulary: int, length: int) -> list[int]:
    """The same random prompt everywhere."""
    return torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()


@torch.inference_mode()
def our_prefill(model: LanguageModel, tokens: list[int]) -> Tensor:
    """Logits after the prompt, read in segments into a fresh state."""
    state = HybridState.alloc(model.config, 1, len(tokens))
    return model.logits(prefill(model, [tokens], state))[0]


@torch.inference_mode()
def engine_prefill(model: LanguageModel, tokens: list[int]) -> Tensor:
    """The same as an engine reads a prompt: in its segments, into a pool with just enough pages."""
    pool = StatePool(model.config, 1, Layout.of(model.config).pages_for(len(tokens)))
    row = pool.new_row()
    assert row is not None and pool.ensure(row, len(tokens)), "the pool was made for it"
    for start in range(0, len(tokens), SEGMENT):
        piece_T = torch.tensor(tokens[start : start + SEGMENT])
        with pool.view([row]) as state:
            hidden_TD = model(piece_T, Documents.from_lengths([len(piece_T)]), state).hidden_TD
    return model.logits(hidden_TD[-1:])[0]


@torch.inference_mode()
def their_prefill(peer: nn.Module, tokens: list[int]) -> Tensor:
    """The same by transformers' own model, with its cache."""
    logits: Tensor = peer(input_ids=torch.tensor([tokens]), use_cache=True, logits_to_keep=1).logits
    return logits[0, -1]


def memory_growth(name: str, length: int, directory: Path) -> int:
    """Bytes by which one prefill raises this process's peak resident size, after a short one has warmed it up."""
    keep_freed_memory()
    run: Callable[[list[int]], Tensor]
    if name == "transformers":
        run = partial(their_prefill, load_transformers(directory).eval())
    else:
        run = partial(our_prefill if name == "turbos" else engine_prefill, load_model(directory))
    tokens = prompt(256, length)
    run(tokens[:64])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident
    before = peak_resident()
    run(tokens)
    return peak_resident() - before


def peak_resident() -> int:
    """Peak resident bytes of this process since its start or the last reset."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    print(memory_growth(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])))
