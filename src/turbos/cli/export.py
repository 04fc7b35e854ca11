"""`turbos export CKPT --to hf|gguf --out FILE`: a checkpoint for other programs, whole or not at all.

`hf` writes a directory that `transformers` loads without our code, `gguf` one file for llama.cpp. What the target
cannot express is refused, and the option named.

    turbos export runs/demo/final --to gguf --type q8_0 --out demo.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from turbos.cli.import_ import DTYPES, refuse_existing, rewrite
from turbos.common.errors import UserError

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("export", help="write a checkpoint for other programs", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or hub id")
    parser.add_argument("--to", choices=("hf", "gguf"), required=True, help="Hugging Face directory, or llama.cpp file")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="directory (hf) or file (gguf) to make")
    parser.add_argument("--dtype", choices=DTYPES, help="with hf: how weights are stored (default: keep)")
    parser.add_argument("--type", choices=GGUF_TYPES, help="with gguf: how matrices are stored (default: f32)")


def run(args: argparse.Namespace) -> int:
    """Load, convert and write; prints what was written."""
    unused = {"hf": args.type and "--type", "gguf": args.dtype and "--dtype"}[args.to]
    if unused:
        raise UserError(f"{unused} says nothing with --to {args.to}")
    refuse_existing(args.out)
    if args.to == "hf":
        rewrite(args.checkpoint, args.out, args.dtype or "keep", hugging_face=True)
    else:
        export_gguf(args.checkpoint, args.out, args.type or "f32")
    print(args.out)
    return 0


def export_gguf(checkpoint: str, out: Path, kind: str) -> None:
    """Write one GGUF file, tokenizer included."""
    from turbos.model.gguf import write_gguf
    from turbos.model.package import load_package

    package = load_package(checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(package.model, package.tokenizer, out, kind, package.token_ids)
