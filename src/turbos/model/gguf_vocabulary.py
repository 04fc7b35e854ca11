"""A tokenizer as llama.cpp reads it: tokens, their types, merges, framing ids and the chat template.

llama.cpp has its own byte-level BPE and knows pre-tokenizers by name only, so a tokenizer whose pre-tokenizer it does
not know, or that does more than BPE, is refused: its text would be cut otherwise, and nobody would notice.

    vocabulary = read_vocabulary(tokenizer, rows=8192)
    vocabulary.pre, vocabulary.tokens[0], vocabulary.types[0]       # "qwen2", "<|endoftext|>", CONTROL
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbos.common.errors import UserError
from turbos.model.token_ids import TokenIds
from turbos.text.tokenizer import END, END_OF_TEXT, PAD, QWEN2_PATTERN, Tokenizer

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Token types of the format. llama.cpp finds user-defined tokens in any text, control tokens only where asked to."""

PRE_TOKENIZERS = {
    QWEN2_PATTERN: "qwen2",
    QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "dbrx",
}
"""llama.cpp's name of each pattern that it cuts text by exactly as `tokenizers` does: Qwen2's and GPT-4's."""

# What BPE may do beyond merging, and the value with which it does not; llama.cpp does none of it.
_PLAIN_BPE = {
    **{"type": "BPE", "dropout": None, "byte_fallback": False, "ignore_merges": False},
    **{"continuing_subword_prefix": "", "end_of_word_suffix": ""},
}


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer; `tokens` has one entry per row of the embedding."""

    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    ids: TokenIds
    adds_bos: bool
    chat_template: str | None


def read_vocabulary(tokenizer: Tokenizer, rows: int, ids: TokenIds | None = None) -> Vocabulary:
    """The vocabulary of a tokenizer for an embedding of `rows` rows; `ids` None takes those that its files name.

    Rows beyond the tokenizer's are filled with unused tokens. UserError for what llama.cpp would tokenise otherwise.
    """
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"gguf: the tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocab_size {rows}"
        )
    files = _saved_files(tokenizer)
    content, settings = json.loads(files["tokenizer.json"]), json.loads(files.get("tokenizer_config.json", "{}"))
    for problem in _unlike_llama_cpp(content):
        raise UserError(f"gguf: tokenizer.json: {problem}")
    pre = PRE_TOKENIZERS.get(_split_pattern(content))
    if pre is None:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise UserError(f"gguf: tokenizer.json: pre_tokenizer is none that llama.cpp is known to cut alike ({known})")
    if not content["model"]["merges"]:
        raise UserError("gguf: tokenizer.json: model.merges is empty: llama.cpp wants at least one merge")
    names = {id: name for name, id in content["model"]["vocab"].items()}
    types = dict.fromkeys(names, NORMAL)
    for token in content["added_tokens"]:
        names[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    return Vocabulary(
        pre=pre,
        tokens=tuple(names.get(id, f"[PAD{id}]") for id in range(rows)),
        types=tuple(types.get(id, UNUSED) for id in range(rows)),
        merges=tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]),
        ids=_all_ids(ids or TokenIds(), settings, {name: id for id, name in names.items()}),
        adds_bos=bool(settings.get("add_bos_token", False)),
        chat_template=_chat_template(files, settings),
    )


def _saved_files(tokenizer: Tokenizer) -> dict[str, str]:
    """What the tokenizer saves, by file name: a foreign tokenizer's own files, or those that we write."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save(directory)
        return {path.name: path.read_text(encoding="utf-8") for path in Path(directory).iterdir()}


def _unlike_llama_cpp(content: Mapping[str, Any]) -> Iterator[str]:
    """What in a tokenizer.json llama.cpp would not do, one line each."""
    if content.get("normalizer") is not None:
        yield f"normalizer {content['normalizer'].get('type')}: llama.cpp has none for byte-level BPE"
    for option, plain in _PLAIN_BPE.items():
        if (content["model"].get(option) or plain) != plain:
            yield f"model.{option} {content['model'][option]!r}: llama.cpp knows only {plain!r}"


def _split_pattern(content: Mapping[str, Any]) -> str:
    """The pattern of a pre-tokenizer that splits by it and then spells bytes; empty for any other."""
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [])
    if [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return ""
    split, spell = steps
    if split["behavior"] != "Isolated" or split["invert"] or spell["add_prefix_space"] or spell["use_regex"]:
        return ""
    return str(split["pattern"].get("Regex"))


def _all_ids(given: TokenIds, settings: Mapping[str, Any], by_name: Mapping[str, int]) -> TokenIds:
    """The given ids; a gap is filled from tokenizer_config.json, then by our own tokens' names.

    llama.cpp fills gaps by token 11, whatever that is, so a text's end must be there, and stands in for its beginning.
    """

    def named(key: str, *ours: str) -> int | None:
        token = settings.get(key)
        spelt = token["content"] if isinstance(token, dict) else token
        return next((by_name[name] for name in (str(spelt), *ours) if name in by_name), None)

    end = named("eos_token", END, END_OF_TEXT)
    ends = given.eos or (() if end is None else (end,))
    if not ends:
        raise UserError("gguf: the tokenizer names no end of text: set eos_token in tokenizer_config.json")
    bos = named("bos_token", END_OF_TEXT) if given.bos is None else given.bos
    return TokenIds(ends[0] if bos is None else bos, ends, named("pad_token", PAD) if given.pad is None else given.pad)


def _chat_template(files: Mapping[str, str], settings: Mapping[str, Any]) -> str | None:
    """The chat template, wherever a tokenizer's files keep it; of several named ones the default."""
    found = files.get("chat_template.jinja") or settings.get("chat_template")
    if isinstance(found, list):
        found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found
