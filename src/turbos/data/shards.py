"""Shards: tokens of many documents in one file that is mapped, never read whole; foreign or cut files are refused.

Layout: a header of 128 bytes, the tokens (uint16 below 65,537 ids, else uint32) padded to 8 bytes, and
`documents + 1` offsets (int64). The header says which tokenizer made it. Every text ends with `<|endoftext|>`;
conversations end as they were rendered.
Which documents make a batch is the matter of `loader.py`.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from turbos.common.errors import UserError
from turbos.data.encode import encoded
from turbos.text.tokenizer import END_OF_TEXT, Tokenizer

MAGIC, VERSION = b"TURBOS\x00\x01", 1
HEADER_BYTES = 128
# magic, version, bytes per token, vocabulary, documents, tokens, text bytes, checksum of the body, tokenizer's sha256
HEADER = struct.Struct("<8sIIQQQQI32s")


@dataclass(frozen=True)
class ShardInfo:
    """What a shard's header says; `text_bytes` is the UTF-8 size of its texts (for bits per byte)."""

    token_bytes: int
    vocab_size: int
    documents: int
    tokens: int
    text_bytes: int
    checksum: int
    fingerprint: str

    @property
    def padded_bytes(self) -> int:
        """Bytes of the token part, rounded up to 8."""
        return -(-self.tokens * self.token_bytes // 8) * 8

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return HEADER_BYTES + self.padded_bytes + 8 * (self.documents + 1)

    def pack(self) -> bytes:
        """The header, with a checksum of its own at its end."""
        fields = (self.token_bytes, self.vocab_size, self.documents, self.tokens, self.text_bytes, self.checksum)
        head = HEADER.pack(MAGIC, VERSION, *fields, bytes.fromhex(self.fingerprint)).ljust(HEADER_BYTES - 4, b"\0")
        return head + struct.pack("<I", zlib.crc32(head))


def write_shard(path: str | Path, texts: Iterable[str], tokenizer: Tokenizer) -> ShardInfo:
    """Tokenize texts, one document each, into a shard that appears whole or not at all.

    Raises UserError where there is no text.
    """
    return _write(Path(path), encoded(texts, tokenizer, tokenizer.special(END_OF_TEXT)), tokenizer)


def write_rendered(path: str | Path, rendered: Iterable[Sequence[int]], tokenizer: Tokenizer) -> ShardInfo:
    """The same for documents that are tokens already, such as conversations; nothing is added to them."""
    rows = ((np.array(ids, dtype=np.uint32), _text_bytes(ids, tokenizer)) for ids in rendered)
    return _write(Path(path), rows, tokenizer)


def _text_bytes(ids: Sequence[int], tokenizer: Tokenizer) -> int:
    return len(tokenizer.decode(ids, skip_special=True).encode())


def _write(path: Path, rows: Iterable[tuple[np.ndarray, int]], tokenizer: Tokenizer) -> ShardInfo:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            info = _write_body(file, rows, tokenizer)
            if not info.documents:
                raise UserError(f"the corpus for {path} is empty: name a source that holds text")
            file.seek(0)
            file.write(info.pack())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return info


def _write_body(file: BinaryIO, rows: Iterable[tuple[np.ndarray, int]], tokenizer: Tokenizer) -> ShardInfo:
    """Write tokens and offsets behind an empty header; returns what the header must say.

    A row is a document's tokens and the UTF-8 bytes of its text.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    file.write(b"\0" * HEADER_BYTES)
    offsets, text_bytes, checksum = [0], 0, 0
    for ids, size in rows:
        raw = ids.astype(dtype).tobytes()
        file.write(raw)
        checksum = zlib.crc32(raw, checksum)
        offsets.append(offsets[-1] + len(ids))
        text_bytes += size
    tail = b"\0" * (-offsets[-1] * dtype.itemsize % 8) + np.array(offsets, dtype="<i8").tobytes()
    file.write(tail)
    return ShardInfo(
        token_bytes=dtype.itemsize,
        vocab_size=tokenizer.vocab_size,
        documents=len(offsets) - 1,
        tokens=offsets[-1],
        text_bytes=text_bytes,
        checksum=zlib.crc32(tail, checksum),
        fingerprint=tokenizer.fingerprint,
    )


def _read_header(path: Path) -> ShardInfo:
    """The header of a shard, if it is one and as long as it says; UserError otherwise."""
    if not path.is_file():
        raise UserError(f"no shard at {path}")
    with path.open("rb") as file:
        raw = file.read(HEADER_BYTES)
    if len(raw) < HEADER_BYTES or raw[:8] != MAGIC:
        raise UserError(f"{path} is not a shard of this program: write it again from its texts")
    _, version, width, vocab, documents, tokens, text_bytes, checksum, fingerprint = HEADER.unpack_from(raw)
    if version != VERSION:
        raise UserError(f"shard {path} has version {version}, this program reads {VERSION}: write it again")
    if zlib.crc32(raw[:-4]) != struct.unpack("<I", raw[-4:])[0]:
        raise UserError(f"shard {path} has a damaged header: write it again from its texts")
    info = ShardInfo(width, vocab, documents, tokens, text_bytes, checksum, fingerprint.hex())
    size = path.stat().st_size
    if size != info.file_bytes:
        raise UserError(f"shard {path} has {size} bytes instead of {info.file_bytes} (cut off?): write it again")
    return info


class ShardReader:
    """A mapped shard: `len(reader)` documents; only what is asked for is read from disk."""

    def __init__(self, path: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Open a shard; UserError if it is foreign, cut off, or made with another tokenizer than the given one."""
        self.path = Path(path)
        self.info = info = _read_header(self.path)
        if tokenizer is not None and info.fingerprint != tokenizer.fingerprint:
            raise UserError(f"shard {path} was made with another tokenizer: write it again with this one")
        dtype = "<u2" if info.token_bytes == 2 else "<u4"
        self._tokens = np.memmap(self.path, dtype, "r", HEADER_BYTES, (info.tokens,))
        self.offsets = np.memmap(self.path, "<i8", "r", HEADER_BYTES + info.padded_bytes, (info.documents + 1,))

    def __len__(self) -> int:
        return self.info.documents

    def tokens(self, start: int, end: int) -> np.ndarray:
        """Tokens `start .. end - 1` of the shard, int64."""
        return np.asarray(self._tokens[start:end]).astype(np.int64)

    def document(self, number: int) -> np.ndarray:
        """Tokens of one document, int64, its `<|endoftext|>` included."""
        return self.tokens(int(self.offsets[number]), int(self.offsets[number + 1]))

    def documents(self) -> Iterator[np.ndarray]:
        """All documents in order."""
        return (self.document(number) for number in range(len(self)))

    def verify(self) -> None:
        """Read the whole body against its checksum; UserError where a byte differs."""
        checksum = 0
        with self.path.open("rb") as file:
            file.seek(HEADER_BYTES)
            while block := file.read(1 << 22):
                checksum = zlib.crc32(block, checksum)
        if checksum != self.info.checksum:
            raise UserError(f"shard {self.path} is damaged (its checksum differs): write it again from its texts")
