"""Files inside archives: Debian packages, npm's and pip's tarballs, gzip within them. Nothing is written to disk.

    for name, content in deb_files(path, lambda name: name.endswith(".html")): ...

A damaged archive raises one of `ARCHIVE_ERRORS`, which `documents` turns into one line.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import yaml

ARCHIVE_ERRORS = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, gzip.BadGzipFile, yaml.YAMLError),
    *(EOFError, struct.error, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
)
"""What reading damaged bytes can raise.

ValueError has the errors of text, numbers and JSON, LookupError what lacks, RuntimeError what no reader can unpack;
TypeError and AttributeError come of JSON or YAML with another shape.
"""

Keep = Callable[[str], bool]
"""Whether the file of this name is wanted."""

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


def tar_files(path: Path, keep: Keep) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted files of a compressed tarball, in its order."""
    with path.open("rb") as file:
        yield from _tar_stream(file, keep)


def deb_files(path: Path, keep: Keep) -> Iterator[tuple[str, bytes]]:
    """Name and content of the wanted files of a Debian package, gzipped ones unpacked (and named without `.gz`).

    A Debian package is an `ar` archive whose member `data.tar.*` holds the files (deb(5)).
    """
    with path.open("rb") as file:
        data = io.BytesIO(_data_member(file))
    for name, content in _tar_stream(data, lambda name: keep(name.removesuffix(".gz"))):
        if name.endswith(".gz"):
            yield name.removesuffix(".gz"), gzip.decompress(content)
        else:
            yield name, content


def _data_member(file: IO[bytes]) -> bytes:
    """The `data.tar.*` of a Debian package."""
    if file.read(8) != b"!<arch>\n":
        raise tarfile.ReadError("no Debian package")
    while len(header := file.read(60)) == 60:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return file.read(size)
        # Members begin at even places.
        file.seek(size + size % 2, 1)
    raise tarfile.ReadError("it has no data.tar")


def _tar_stream(file: IO[bytes], keep: Keep) -> Iterator[tuple[str, bytes]]:
    """Files of a tarball. tarfile's own unpacking ends silently where a stream is cut, so it gets unpacked bytes."""
    with _unpacked(file) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile() and keep(name):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield name, content.read()
        # To the end, where the checksum is.
        while stream.read(1 << 20):
            pass


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    """The bytes of a gzip, xz or bzip2 stream, by its first bytes."""
    start = file.read(6)
    file.seek(-len(start), 1)
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]
    if start.startswith(b"\xfd7zXZ"):
        return lzma.LZMAFile(file)
    if start.startswith(b"BZh"):
        return bz2.BZ2File(file)
    packing = "zstd" if start.startswith(ZSTD_MAGIC) else "neither gzip, xz nor bzip2"
    raise tarfile.ReadError(f"it is packed with {packing}, which is not read here")
