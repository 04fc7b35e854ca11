"""Which tokens begin, end and pad a text: `generation_config.json`, and the same ids in config.json.

Programs stop a generation at the ids that `generation_config.json` names; our own models end a turn with `<|end|>` and
a document with `<|endoftext|>`. How a chat looks is the tokenizer's business.

>>> TokenIds(eos=(6, 0), pad=1).as_json()
{'eos_token_id': [6, 0], 'pad_token_id': 1}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbos.common.errors import UserError
from turbos.text.tokenizer import END, END_OF_TEXT, PAD, Tokenizer

GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class TokenIds:
    """Ids of a tokenizer's framing tokens; any of them may be absent."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    pad: int | None = None

    def as_json(self) -> dict[str, object]:
        """The fields as Hugging Face names them; several ends are a list, one is a number."""
        eos = self.eos[0] if len(self.eos) == 1 else list(self.eos) or None
        named = {"bos_token_id": self.bos, "eos_token_id": eos, "pad_token_id": self.pad}
        return {name: value for name, value in named.items() if value is not None}


def own_token_ids(tokenizer: Tokenizer) -> TokenIds:
    """The ids of a tokenizer that we trained: a turn's end and a document's end both stop a generation."""
    return TokenIds(eos=(tokenizer.special(END), tokenizer.special(END_OF_TEXT)), pad=tokenizer.special(PAD))


def read_token_ids(directory: Path) -> TokenIds:
    """The ids that a checkpoint directory names, generation_config.json before config.json; UserError for bad ones."""
    fields: dict[str, Any] = {}
    for name in ("config.json", GENERATION_FILE):
        path = directory / name
        if path.is_file():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                fields |= {key: value for key, value in found.items() if value is not None}
                ids = _token_ids(fields)
            except (ValueError, AttributeError, TypeError) as error:
                raise UserError(f"{path}: token ids cannot be read ({error})") from error
    return ids if fields else TokenIds()


def _token_ids(fields: Mapping[str, Any]) -> TokenIds:
    eos = fields.get("eos_token_id", [])
    ends = tuple(int(id) for id in (eos if isinstance(eos, list) else [eos]))
    bos, pad = fields.get("bos_token_id"), fields.get("pad_token_id")
    return TokenIds(None if bos is None else int(bos), ends, None if pad is None else int(pad))


def write_generation_config(directory: Path, ids: TokenIds) -> None:
    """Write generation_config.json: where a generation stops, greedy unless told otherwise."""
    content = {"do_sample": False, **ids.as_json()}
    (directory / GENERATION_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
