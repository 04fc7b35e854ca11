"""Everyone in `turbos bench decode`: our fused step at each precision, transformers' model, llama.cpp's files.

All come from the same weights, and none is timed before it agrees: in fp32 with both peers' log-probabilities, in bf16
and int8 with those of our own model that computes with the same rounded weights.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from turbos.bench.contest import CANDIDATES
from turbos.bench.contestants import Worker
from turbos.bench.peers import load_transformers, require_agreement, save_for_peers
from turbos.bench.sessions import Sessions
from turbos.common.records import Documents
from turbos.engine.fused.weights import PRECISIONS, PackedModel, Precision, pack
from turbos.model.config import ModelConfig
from turbos.model.describe import describe
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import SMALLEST_VOCABULARY, Tokenizer

EQUAL_KINDS = {"fp32": "f32", "bf16": "bf16", "int8": "q8_0"}
"""llama.cpp's kind of file with weights as wide as ours."""

SMALLER_KIND = "q4_0"
WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


@dataclass(frozen=True)
class Ours:
    """Our weights at one precision, a session that has read all of a prompt but its last token, and what follows.

    `logprobs_TV` are the plain model's after each token of the prompt, with the same rounded weights.
    """

    precision: Precision
    config: ModelConfig
    packed: PackedModel
    start: Sessions
    logprobs_TV: Tensor

    @classmethod
    def of(cls, model: LanguageModel, precision: Precision, tokens: Sequence[int]) -> Ours:
        """Pack the model, and read the prompt with a rounded copy of it, which is not kept."""
        packed = pack(model, precision)
        rounded = model if precision == "fp32" else copy.deepcopy(model)
        packed.round_to_packed(rounded)
        start = Sessions(model.config, packed, 1, len(tokens), 1)
        start.read(rounded, tokens[:-1])
        with torch.inference_mode():
            hidden_TD = rounded(torch.tensor(list(tokens)), Documents.from_lengths([len(tokens)])).hidden_TD
            logprobs_TV = torch.log_softmax(rounded.logits(hidden_TD), -1)
        return cls(precision, model.config, packed, start, logprobs_TV)

    def sessions(self, batch: int, longest: int, threads: int, last_token: int) -> Sessions:
        """`batch` copies of the session, once the fused step has said what the model says after the last token."""
        sessions = Sessions(self.config, self.packed, batch, longest, threads)
        sessions.take_over(self.start)
        stepped_BV = torch.log_softmax(sessions.step(torch.full((batch,), last_token)), -1)
        what = f"log-probabilities of the fused step and the model in {self.precision}"
        require_agreement(what, stepped_BV, self.logprobs_TV[-1:].expand_as(stepped_BV))
        return sessions

    def traffic_bytes(self, batch: int, context: int) -> int:
        """Bytes that a step must move: weights once (in a batch those of all experts), keys, states twice."""
        counted = describe(self.config, 4)
        params = counted.active_params if batch == 1 else counted.total_params
        states = batch * (context * counted.kv_bytes_per_token + 2 * counted.state_bytes)
        return params * WEIGHT_BYTES[self.precision] + states


@dataclass(frozen=True)
class Field:
    """All that run: ours, transformers' model, llama.cpp's files by kind (where these are there)."""

    ours: Sequence[Ours]
    transformers: nn.Module | None
    files: Mapping[str, Path]

    @property
    def exact_V(self) -> Tensor:
        """Log-probabilities after the prompt with fp32 weights."""
        return self.ours[0].logprobs_TV[-1]


def assemble(model: LanguageModel, tokens: Sequence[int], parent: str) -> Field:
    """Everyone that is there, from the same weights; a line for each peer that is not."""
    directory = save_for_peers(model, parent)
    peer, files = None, {}
    if importlib.util.find_spec("transformers") is None:
        say("transformers is left out: not installed (pip install 'turbos[peers]')")
    else:
        peer = load_transformers(directory).eval()
    if importlib.util.find_spec("xllamacpp") is None:
        say("llama.cpp is left out: not installed (pip install 'turbos[peers]')")
    else:
        files = {kind: _write_file(model, directory, kind) for kind in (*EQUAL_KINDS.values(), SMALLER_KIND)}
    ours = [Ours.of(model, precision, tokens) for precision in PRECISIONS]
    for one in ours[1:]:
        say(compare_precisions(ours[0], one))
    return Field(ours, peer, files)


def _write_file(model: LanguageModel, directory: Path, kind: str) -> Path:
    """The weights for llama.cpp; its file wants a tokenizer, of which nothing is measured."""
    from turbos.model.gguf import write_gguf

    path = directory / f"{kind}.gguf"
    write_gguf(model, Tokenizer.train(["bench bench"], SMALLEST_VOCABULARY + 8), path, kind)
    return path


def compare_precisions(exact: Ours, rounded: Ours) -> str:
    """What rounded weights do to the predictions after every token of the prompt, in a line.

    With untrained weights it says little about a trained model: flipped experts inflate it.
    """
    exact_TV, rounded_TV = exact.logprobs_TV, rounded.logprobs_TV
    divergence = float((exact_TV.exp() * (exact_TV - rounded_TV)).sum(-1).mean())
    same = float((exact_TV.argmax(-1) == rounded_TV.argmax(-1)).float().mean())
    return (
        f"{rounded.precision} against {exact.precision}, untrained weights: "
        f"KL {divergence:.1e} nats, the same best token {same:.1%}"
    )


def require_agreement_with(worker: Worker, tokens: Sequence[int], exact_V: Tensor) -> None:
    """Refuse a program whose next-token log-probabilities differ from ours."""
    told = worker.likeliest(tokens, CANDIDATES)
    theirs = torch.tensor(list(told.values()))
    require_agreement(f"log-probabilities of {worker.name}", exact_V[list(told)], theirs)


def say(line: str) -> None:
    """A line for whoever watches."""
    print(f"bench decode: {line}", file=sys.stderr)
