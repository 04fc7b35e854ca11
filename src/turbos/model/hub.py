"""A checkpoint argument: a directory, or a repository on the Hugging Face hub (`owner/name` or `owner/name@revision`).

A directory always wins. What was downloaded once is found again without a network; only files that a checkpoint needs
are downloaded. Nothing is ever uploaded.

>>> resolve_checkpoint(".")
PosixPath('.')
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download

from turbos.common.errors import UserError

HUB_ID = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
NEEDED_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt", "README.md")
"""Patterns of what is downloaded: configuration, weights, tokenizer, card."""


def resolve_checkpoint(name: str | Path) -> Path:
    """The directory of a checkpoint argument; UserError, in one line, where there is none and the hub has none."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    found = HUB_ID.fullmatch(str(name))
    if found is None or path.exists():
        raise UserError(f"{name}: no such directory; name a checkpoint directory, or a hub id such as owner/name")
    try:
        folder = snapshot_download(found["repository"], revision=found["revision"], allow_patterns=list(NEEDED_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such directory, and the Hugging Face hub did not give it ({reason})") from error
    return Path(folder)
