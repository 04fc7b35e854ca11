"""What rounding the weights costs a trained model: divergence from its fp32 self on text, and accuracy on problems.

The rounded model is the torch model with the numbers that the packed weights stand for: the engine's fused step adds
them up to the same logits (`turbos verify`), so this is the engine's quality too. Problems, of held-out seeds, are
asked of checkpoints that speak our chats.

    python -m turbos.bench.quality runs/demo/final smollm2-checkpoint          # a table
    python -m turbos.bench.quality runs/demo/final --write                     # and docs/results/quality.json
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from turbos.bench.collect import provenance
from turbos.bench.tables import Result, write_result
from turbos.common.errors import UserError
from turbos.common.records import Documents
from turbos.data.sources import documents
from turbos.engine.fused.weights import Precision, pack
from turbos.eval.problems import evaluate, parse_family
from turbos.model.lm import LanguageModel
from turbos.model.package import Package, load_package

TEXT = "english"
TOKENS, DOCUMENT = 4096, 512
"""Tokens that are scored, and the most of one document."""
ROUNDED: tuple[Precision, ...] = ("bf16", "int8")
FAMILIES = ("addition/1", "chain_sum/1", "base_conversion/1", "gcd/0", "sorting/0")
"""The demo's."""
COLUMNS = (
    *("model", "parameters", "weights", "loss fp32", "loss rounded", "KL to fp32", "99th percentile"),
    *("same best token %", "problems right % fp32", "rounded"),
)


@dataclass(frozen=True)
class Quality:
    """One model in one precision, against fp32. Losses and divergences are nats a token; `agree` is a share.

    `right` are shares of problems solved, fp32 and rounded; None where the model does not speak our chats.
    """

    precision: Precision
    loss: float
    rounded_loss: float
    divergence: float
    high: float
    agree: float
    right: tuple[float, float] | None


def quality(package: Package, precision: Precision, tokens: int, problems: int) -> Quality:
    """Measure one checkpoint in one precision."""
    rounded = copy.deepcopy(package.model)
    pack(rounded, precision).round_to_packed(rounded)
    kl: list[Tensor] = []
    agree: list[Tensor] = []
    losses: list[tuple[Tensor, Tensor]] = []
    for ids_T in _texts(package, tokens):
        want_TV, got_TV = (_logprobs(model, ids_T) for model in (package.model, rounded))
        kl.append((want_TV.exp() * (want_TV - got_TV)).sum(-1))
        agree.append(want_TV.argmax(-1) == got_TV.argmax(-1))
        after = ids_T[1:, None]
        losses.append((-want_TV[:-1].gather(1, after)[:, 0], -got_TV[:-1].gather(1, after)[:, 0]))
    kl_T, (loss_T, rounded_T) = torch.cat(kl), (torch.cat(side) for side in zip(*losses, strict=True))
    right = None
    if package.tokenizer.speaks_chat and problems:
        right = tuple(_solved(model, package, problems) for model in (package.model, rounded))
    return Quality(
        precision,
        loss=float(loss_T.mean()),
        rounded_loss=float(rounded_T.mean()),
        divergence=float(kl_T.mean()),
        high=float(kl_T.quantile(0.99)),
        agree=float(torch.cat(agree).double().mean()),
        right=right,  # type: ignore[arg-type]
    )


def _texts(package: Package, tokens: int) -> Iterator[Tensor]:
    """Beginnings of documents, one row of ids each, `tokens` in all."""
    for text in documents(TEXT):
        ids = package.tokenizer.encode(text)[: min(DOCUMENT, tokens)]
        if len(ids) > 1:
            tokens -= len(ids)
            yield torch.tensor(ids)
        if tokens < 2:
            return
    raise UserError(f"quality: the source {TEXT!r} has too little text: {tokens} tokens are missing")


@torch.inference_mode()
def _logprobs(model: LanguageModel, ids_T: Tensor) -> Tensor:
    logits_TV = model.logits(model(ids_T, Documents.from_lengths([len(ids_T)])).hidden_TD)
    return torch.log_softmax(logits_TV, -1)


def _solved(model: LanguageModel, package: Package, problems: int) -> float:
    """Share of held-out problems of all families that are solved with thinking."""
    scores = evaluate(model, package.tokenizer, [parse_family(name) for name in FAMILIES], problems, modes=("on",))
    return sum(score.accuracy for score in scores) / len(scores)


def row_of(name: str, package: Package, measured: Quality) -> tuple[str | float | None, ...]:
    """A row of the table."""
    count = sum(parameter.numel() for parameter in package.model.parameters())
    right = (None, None) if measured.right is None else tuple(round(100 * share, 1) for share in measured.right)
    return (
        *(name, f"{count / 1e6:.1f} M", measured.precision, round(measured.loss, 4), round(measured.rounded_loss, 4)),
        *(float(f"{measured.divergence:.2g}"), float(f"{measured.high:.2g}"), round(100 * measured.agree, 2), *right),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure checkpoints; print the rows, and with `--write` keep them as a result."""
    parser = argparse.ArgumentParser(prog="python -m turbos.bench.quality", description="What rounding weights costs.")
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CKPT", help="a name for the table and a checkpoint")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"tokens of text (default {TOKENS})")
    parser.add_argument("--problems", type=int, default=16, help="of each family (default 16; 0: none)")
    parser.add_argument("--write", action="store_true", help="write docs/results/quality.json below this directory")
    args = parser.parse_args(argv)
    rows = []
    try:
        for word in args.checkpoints:
            name, _, checkpoint = word.rpartition("=")
            package = load_package(checkpoint)
            for precision in ROUNDED:
                rows.append(
                    row_of(name or checkpoint, package, quality(package, precision, args.tokens, args.problems))
                )
                print(*rows[-1], sep=" | ", flush=True)
        if args.write:
            origin = provenance("quality", "python -m turbos.bench.quality NAME=CKPT ...", ())
            print(write_result(Result(**origin, columns=COLUMNS, rows=tuple(rows)), Path.cwd()))
    except UserError as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
