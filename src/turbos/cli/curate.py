"""`turbos data curate SOURCE... --out DIR`: raw texts through the stages of curation into a folder to train on.

The stages are in `turbos.data.curate`; here sources, classifiers and evaluation texts are brought together, and the
result is told. The folder holds JSON Lines, `report.html`, `funnel.png` and `curation.json`, and is itself a source.

    turbos data curate english-prose chinese-modern --out clean
    turbos data curate pages.jsonl --rules web --languages en,zh --eval exam.txt --out clean
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from turbos.data.curate.counts import Counts
    from turbos.data.curate.labels import Labels
    from turbos.data.curate.semantic import Embed

LABELS_FILE = "curation-labels-1.npz"
TOKENS_TO_EMBED, TYPICAL_TEXTS = 512, 32
SECONDS_BETWEEN_LINES = 10.0


def add_curate_parser(subparsers: Any) -> None:
    """Declare the action."""
    parser = subparsers.add_parser(
        "curate",
        help="clean sources: copies, markup, bad text, evaluation texts",
        allow_abbrev=False,
        description="Clean sources into a folder to train on. The same command goes on where it was stopped.",
    )
    parser.add_argument("names", nargs="+", metavar="SOURCE", help="sources, groups, paths or datasets:OWNER/NAME")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write (must not exist)")
    parser.add_argument(
        "--rules", choices=("web", "books", "none"), default="books",
        help="heuristics: web (all published ones, for crawled pages), books (default), none",
    )  # fmt: skip
    parser.add_argument("--languages", metavar="A,B", help="keep only these: codes such as en,zh,code (default: all)")
    parser.add_argument(
        "--min-quality", type=float, default=0.05, metavar="P", help="least quality score (default 0.05)"
    )
    parser.add_argument("--megabytes", type=float, metavar="N", help="take the first N MB of each source")
    parser.add_argument(
        "--eval", type=Path, action="append", default=[], metavar="FILE",
        help="a file of evaluation texts to keep out, beside the held-out problems (may be given again)",
    )  # fmt: skip
    parser.add_argument("--labels", metavar="FILE", help="classifiers to use, or none (default: trained once, kept)")
    parser.add_argument(
        "--curated", action="append", default=[], metavar="SOURCE",
        help="train the quality classifier on this good text (may be given again; needs --labels FILE to write)",
    )  # fmt: skip
    parser.add_argument("--embed", metavar="CKPT", help="drop texts of like meaning, by this model's hidden states")
    parser.add_argument("--skip", default="", metavar="A,B", help="stages to leave out")
    parser.add_argument("--cache", metavar="DIR", help="where fetched packages and trained classifiers lie")
    parser.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")
    parser.set_defaults(act=curate_sources)


def curate_sources(args: argparse.Namespace) -> int:
    """Curate, write the report, and tell the counts."""
    try:
        import numba
        import rensa
        import resiliparse
    except ImportError as error:
        raise UserError(f"curation needs {error.name}: pip install 'turbos[data]'") from error
    del numba, rensa, resiliparse
    from turbos.data.curate.pipeline import Aids, CurationConfig, curate
    from turbos.data.curate.report import FUNNEL_FILE, write_report

    skip = tuple(name for name in args.skip.split(",") if name)
    languages = tuple(name for name in (args.languages or "").split(",") if name)
    config = CurationConfig(args.rules, languages, args.min_quality, args.megabytes, skip)
    with contextlib.redirect_stdout(sys.stderr):
        labels = find_labels(args)
        if labels:
            require_languages(languages, labels)
        texts = evaluation_texts(args.eval) if "contamination" not in skip else []
        from turbos.data.curate.contamination import EvaluationTexts

        embed = checkpoint_embedding(args.embed, typical_texts(args)) if args.embed else None
        key = aids_key(labels, texts, args.embed)
        with progress() as watch:
            aids = Aids(labels, EvaluationTexts(texts) if texts else None, embed)
            counts = curate(args.names, args.out, config, aids, args.cache, key, watch)
    notes = [f"rules: {args.rules}; {len(texts):,} evaluation texts kept out"]
    if labels:
        notes += [f"{name} classifier: {labels.card[name]}" for name in ("language", "topic", "quality")]
    page = write_report(counts, args.out, args.names, notes)
    if args.json:
        outcome = {"out": str(args.out), "report": str(page), "funnel": str(args.out / FUNNEL_FILE)}
        print(json.dumps(outcome | {"counts": counts.plain()}, ensure_ascii=False))
    else:
        print_counts(counts)
        print(page)
    return 0


def require_languages(languages: Sequence[str], labels: Labels) -> None:
    """Raises UserError for a language that the classifier does not know."""
    from turbos.data.curate.labels import UNSURE

    for language in languages:
        if language not in (*labels.language.names, UNSURE):
            raise UserError(f"no language {language!r}: the classifier knows {', '.join(labels.language.names)}")


def find_labels(args: argparse.Namespace) -> Labels | None:
    """The classifiers of a file, or those kept in the cache, trained first where there are none."""
    from turbos.data.curate.examples import train_labels
    from turbos.data.curate.labels import read_labels, write_labels
    from turbos.data.fetch import cache_directory

    if args.labels == "none":
        if args.curated:
            raise UserError("--curated says nothing with --labels none")
        return None
    path = Path(args.labels) if args.labels else cache_directory(args.cache) / LABELS_FILE
    if args.curated and not args.labels:
        raise UserError("--curated needs --labels FILE: where to write the classifiers that it trains")
    if path.is_file() and not args.curated:
        return read_labels(path)
    if args.labels and not args.curated:
        raise UserError(f"no file of classifiers at {path}: leave --labels out, or name good text with --curated")
    if path.is_file():
        raise UserError(f"{path} is there already: name a new file, or leave --curated out")
    print("labels: training the classifiers from named sources, once (a minute, fetches what is missing)")
    labels = train_labels(args.cache, tuple(args.curated), note=print)
    write_labels(path, labels)
    return labels


def evaluation_texts(files: Sequence[Path]) -> list[str]:
    """The held-out problems' questions, and the texts of the given files (line by line where they are plain text)."""
    from turbos.data.curate.contamination import held_out_questions
    from turbos.data.sources import documents

    texts = list(held_out_questions())
    for file in files:
        found = list(documents(str(file)))
        if not found:
            raise UserError(f"{file} holds no evaluation text")
        texts += found if file.suffix != ".txt" else [line for text in found for line in text.splitlines() if line]
    return texts


def aids_key(labels: Labels | None, texts: Sequence[str], embed: str | None) -> str:
    """A hash of what a run is given beside its settings, so that a resumed run is the same one."""
    digest = hashlib.sha256("\0".join(texts).encode(errors="replace"))
    if labels:
        for part in (labels.language, labels.topic, labels.quality):
            digest.update(part.weight_BC.tobytes())
    digest.update(str(embed).encode())
    return digest.hexdigest()[:16]


def checkpoint_embedding(name: str, typical: Sequence[str]) -> Embed:
    """Texts to the mean of a model's last hidden states over their first 512 tokens, less that of typical texts.

    Hidden states of any two texts point the same way (their common part is most of them), so what is common is taken
    out; without that, everything would resemble everything.
    """
    import numpy
    import torch

    from turbos.common.records import Documents
    from turbos.model.package import load_package

    package = load_package(name)

    @torch.inference_mode()
    def mean_state(text: str) -> np.ndarray:
        ids = package.tokenizer.encode(text[: 8 * TOKENS_TO_EMBED])[:TOKENS_TO_EMBED]
        hidden_TD = package.model(torch.tensor(ids), Documents.from_lengths([len(ids)])).hidden_TD
        state_D: np.ndarray = hidden_TD.float().mean(0).numpy()
        return state_D / numpy.linalg.norm(state_D)

    common_D = numpy.mean([mean_state(text) for text in typical], axis=0)
    return lambda texts: numpy.stack([mean_state(text) - common_D for text in texts])


def typical_texts(args: argparse.Namespace) -> list[str]:
    """The first texts of every source."""
    from turbos.data.sources import documents, expand

    names = expand(args.names)
    return [text for name in names for text in itertools.islice(documents(name, args.cache), TYPICAL_TEXTS)]


@contextlib.contextmanager
def progress() -> Iterator[Callable[[Counts], None]]:
    """Shows how far a run is: a live line on a terminal's stderr, elsewhere a line every ten seconds."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    told = time.monotonic()
    status = console.status("curating") if console.is_terminal else None

    def watch(counts: Counts) -> None:
        nonlocal told
        total = counts.total
        sizes = f"{total.bytes_in / 1e6:,.1f} MB in, {total.bytes_out / 1e6:,.1f} MB out"
        line = f"curating: {total.documents_in:,} documents, {sizes}"
        if status:
            status.update(line)
        elif time.monotonic() - told >= SECONDS_BETWEEN_LINES:
            told = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    with status or contextlib.nullcontext():
        yield watch


def print_counts(counts: Counts) -> None:
    """A table of the stages."""
    print(f"{'stage':<26} {'documents in':>12} {'dropped':>9} {'edited':>8} {'MB out':>9} {'MB/s':>7}")
    for stage in counts.stages:
        if stage.skipped:
            print(f"{stage.title:<26} left out: {stage.skipped}")
            continue
        speed = f"{stage.bytes_in / 1e6 / stage.seconds:7.0f}" if stage.seconds > 0.01 else " " * 7
        row = f"{stage.title:<26} {stage.documents_in:>12,} {stage.dropped:>9,} {stage.edited:>8,}"
        print(f"{row} {stage.bytes_out / 1e6:>9.2f} {speed}")
    total, seconds = counts.total, sum(stage.seconds for stage in counts.stages)
    size = total.bytes_in / 1e6
    kept = f"{100 * total.bytes_out / max(total.bytes_in, 1):.1f} % of {size:.1f} MB"
    speed = f"{size / max(seconds, 1e-9):.1f} MB/s a core over all stages"
    print(f"kept {total.documents_out:,} of {total.documents_in:,} documents, {kept}, {speed}")
