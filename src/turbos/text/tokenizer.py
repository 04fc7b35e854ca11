"""The tokenizer: byte-level BPE with Qwen2's pre-tokenizer, single digits, no normaliser, and fixed special tokens.

Free text never becomes a special token: text that spells `<think>` is encoded as letters, and only `special` gives
the id. So whatever a user or a document says, it cannot forge a turn. Chats are rendered in `chat.py`, not here.

>>> tokenizer = Tokenizer.train(["to be or not to be 2718"] * 3, vocab_size=320)
>>> tokenizer.decode(tokenizer.encode("be <think> 42")), len(tokenizer.encode("42")), tokenizer.vocab_size % 8
('be <think> 42', 2, 0)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from turbos.common.errors import UserError
from turbos.text.template import chat_template

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer: known to llama.cpp, and each digit is a token of its own."""

END_OF_TEXT, PAD, END = "<|endoftext|>", "<|pad|>", "<|end|>"
SPECIALS = (
    END_OF_TEXT,
    PAD,
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    END,
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    *(f"<|spare_{number}|>" for number in range(32)),
)
"""Special tokens; they take the first ids, in this order."""

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
"""Tokens that files mark as not special, as Qwen's do: programs that skip special tokens must still show them to their
parsers. In memory they are special, so that text which spells them stays text."""

CHAT_TOKENS = SPECIALS[: SPECIALS.index("<|spare_0|>")]
"""What chats are made of."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""Files of a foreign tokenizer that go with it."""

SMALLEST_VOCABULARY = 8 * -(-(len(SPECIALS) + 256) // 8)


class Tokenizer:
    """A wrapper around a `tokenizers` tokenizer; a foreign one also keeps the files that it was read from."""

    def __init__(self, backend: tokenizers.Tokenizer, files: Mapping[str, bytes] | None = None) -> None:
        """Take a backend and tell it that text is only text."""
        if any(not token.special for token in _tags(backend)):
            backend = tokenizers.Tokenizer.from_str(_mark_tags(backend, special=True))
        backend.encode_special_tokens = True
        self._backend = backend
        self._files = dict(files or {})
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learn a vocabulary of `vocab_size` tokens, specials included, from texts.

        A corpus too small for it gives fewer tokens, filled up to a multiple of 8. Raises UserError for a size that is
        no multiple of 8 or leaves no room for the bytes, and for an empty corpus.
        """
        if vocab_size % 8 or vocab_size < SMALLEST_VOCABULARY:
            raise UserError(f"vocab_size must be a multiple of 8, at least {SMALLEST_VOCABULARY}, got {vocab_size}")
        seen = _Seen(texts)
        backend = _new_backend()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIALS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            min_frequency=2,
            show_progress=False,
        )
        backend.train_from_iterator(seen, trainer)
        if not seen.characters:
            raise UserError("cannot train a tokenizer on an empty corpus: name a source that holds text")
        missing = -backend.get_vocab_size() % 8
        backend.add_special_tokens([f"<|fill_{number}|>" for number in range(missing)])
        return cls(backend)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json from a directory; UserError where there is none or it cannot be read."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"no tokenizer at {path}: name a directory that holds tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise UserError(f"cannot read tokenizer {path}: {error}") from error
        tokenizer = cls(backend)
        if tokenizer.speaks_chat:
            return tokenizer
        found = {name: (path.parent / name).read_bytes() for name in FILES if (path.parent / name).is_file()}
        return cls(backend, found)

    def save(self, directory: str | Path) -> None:
        """Write the files that transformers, vLLM and SGLang read; a foreign tokenizer's are written back unchanged."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in (self._files or self._own_files()).items():
            (directory / name).write_bytes(content)

    def _own_files(self) -> dict[str, bytes]:
        names = {"eos_token": END, "pad_token": PAD} if self.speaks_chat else {}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        files = {"tokenizer.json": _mark_tags(self._backend, special=False)}
        if self.speaks_chat:
            config["chat_template"] = files["chat_template.jinja"] = self.chat_template
            files["special_tokens_map.json"] = json.dumps(names, indent=1)
        files["tokenizer_config.json"] = json.dumps(config, indent=1)
        return {name: text.encode() for name, text in files.items()}

    @property
    def chat_template(self) -> str:
        """The Jinja twin of `chat.render` for this tokenizer; a foreign tokenizer has its own in its files."""
        return chat_template(list(self._special_ids))

    @property
    def foreign_files(self) -> Mapping[str, bytes]:
        """Files of a foreign tokenizer as they were read, by name; empty for one of ours."""
        return self._files

    @cached_property
    def speaks_chat(self) -> bool:
        """Whether all tokens are there that our chats are made of."""
        return all(name in self._special_ids for name in CHAT_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Ids of free text, without any special token."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become the replacement character, unknown ids vanish."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def special(self, name: str) -> int:
        """Id of a special token; UserError where this tokenizer has none of that name."""
        if name not in self._special_ids:
            raise UserError(f"this tokenizer has no special token {name!r}: use one that `turbos` trained")
        return self._special_ids[name]

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        added = sorted(self._backend.get_added_tokens_decoder().items())
        return {token.content: id for id, token in added if token.special}

    def token_bytes(self, id: int) -> bytes:
        """What a token adds to the bytes of a decoded text (this is byte-level BPE); nothing for an unknown id."""
        if id not in self._bytes:
            token = self._backend.id_to_token(id) if id >= 0 else None
            self._bytes[id] = _bytes_of(token or "")
        return self._bytes[id]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of all special tokens."""
        return frozenset(self._special_ids.values())

    @cached_property
    def vocab_size(self) -> int:
        """Number of tokens, specials included; a multiple of 8 for one that we trained."""
        return self._backend.get_vocab_size()

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's canonical JSON: shards carry it, so that they are never read with another."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()


class _Seen:
    """Passes texts on and counts their characters, so that an empty corpus is noticed without a second pass."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = iter(texts)
        self.characters = 0

    def __iter__(self) -> _Seen:
        return self

    def __next__(self) -> str:
        text = next(self._texts)
        self.characters += len(text)
        return text


def _new_backend() -> tokenizers.Tokenizer:
    """An untrained byte-level BPE."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _tags(backend: tokenizers.Tokenizer) -> list[tokenizers.AddedToken]:
    """Those of the chat's tags that a backend has as tokens."""
    return [token for token in backend.get_added_tokens_decoder().values() if token.content in TAGS]


def _mark_tags(backend: tokenizers.Tokenizer, special: bool) -> str:
    """A backend's JSON with the tags marked as special or not."""
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        if token["content"] in TAGS:
            token["special"] = special
    return json.dumps(content, ensure_ascii=False)


@cache
def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE's letter for each byte, the other way round: printable bytes stand for themselves."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def _bytes_of(token: str) -> bytes:
    letters = _byte_of_letter()
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode()
