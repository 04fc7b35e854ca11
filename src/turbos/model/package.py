"""A whole checkpoint directory: model, tokenizer with chat template, token ids and card, written and read together.

    config.json  model.safetensors  tokenizer.json  tokenizer_config.json  generation_config.json  README.md  ...

    write_package(directory, model, tokenizer, Card(title="Demo"))      # into an existing, empty directory
    package = load_package("owner/name")                                # a directory or a hub id
    package.model, package.tokenizer, package.token_ids.eos

Atomic replacement of whole directories is the trainer's (`train.checkpoint.write_whole`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from turbos.common.errors import UserError
from turbos.model.card import Card, write_card
from turbos.model.checkpoint import load_model, read_family, save_model
from turbos.model.families import Family
from turbos.model.hub import resolve_checkpoint
from turbos.model.lm import LanguageModel
from turbos.model.token_ids import (
    GENERATION_FILE,
    TokenIds,
    own_token_ids,
    read_token_ids,
    write_generation_config,
)
from turbos.text.tokenizer import Tokenizer

TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Package:
    """A checkpoint that was read: where it lies, its family, and what is in it."""

    directory: Path
    family: Family
    model: LanguageModel
    tokenizer: Tokenizer
    token_ids: TokenIds


def load_package(name: str | Path, dtype: torch.dtype = torch.float32) -> Package:
    """Everything of a checkpoint (directory or hub id); UserError naming file and tensor for one that is broken."""
    directory = resolve_checkpoint(name)
    family, _ = read_family(directory)
    tokenizer = Tokenizer.load(directory)
    check_vocabulary(directory, tokenizer)
    ids = read_token_ids(directory)
    if not ids.eos and tokenizer.speaks_chat:
        ids = own_token_ids(tokenizer)
    return Package(directory, family, load_model(directory, dtype), tokenizer, ids)


def check_vocabulary(directory: Path, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer with more tokens than the embedding has rows (fewer is usual: embeddings are padded)."""
    family, config = read_family(directory)
    if tokenizer.vocab_size > config.vocab_size:
        embedding = next(name.file for name in family.tensor_names(config) if name.ours == "embed_weight")
        raise UserError(
            f"{directory / TOKENIZER_FILE}: {tokenizer.vocab_size} tokens, but tensor {embedding} has "
            f"{config.vocab_size} rows; take both from one checkpoint"
        )


def write_package(
    directory: Path,
    model: LanguageModel,
    tokenizer: Tokenizer,
    card: Card,
    *,
    token_ids: TokenIds | None = None,
    family: Family | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Fill an existing directory with a checkpoint; `family` and `dtypes` as for `save_model`.

    `token_ids` None takes those of a tokenizer of ours, or what a foreign tokenizer's files say. A
    generation_config.json that is there already stays as it is.
    """
    tokenizer.save(directory)
    if token_ids is None:
        token_ids = own_token_ids(tokenizer) if tokenizer.speaks_chat else read_token_ids(directory)
    if token_ids != TokenIds() and not (directory / GENERATION_FILE).is_file():
        write_generation_config(directory, token_ids)
    save_model(model, directory, family=family, dtypes=dtypes, token_ids=token_ids)
    write_card(directory, card, model.config)
