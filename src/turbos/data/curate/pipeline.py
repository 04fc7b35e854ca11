"""The curation run: documents of sources through the stages into JSON Lines, in bounded memory, resumable.

A run works in a folder beside its output (`.OUT.curating`) and renames it at the end, so an output is whole or not
there. Every minute, and when reading fails, it saves what the stages remember and how far it got; the same command goes
on from there and gives the same bytes as one that was never stopped. Documents are taken in batches of about a
megabyte; what grows with the corpus is what stages remember (about 0.6 bytes for each byte of text).

    curate(["english", "pages.jsonl"], Path("clean"), CurationConfig(rule_set="web"), Aids(labels))
    next(documents("clean"))
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np

from turbos.common.errors import UserError
from turbos.data.curate import stages as stage_room
from turbos.data.curate.batch import Batch, Document
from turbos.data.curate.contamination import EvaluationTexts
from turbos.data.curate.counts import Counts, SourceCounts, StageCounts, counts_from
from turbos.data.curate.labels import Labels
from turbos.data.curate.rules import RuleSet
from turbos.data.curate.semantic import Embed, SemanticCopies
from turbos.data.curate.stages import Stage
from turbos.data.sources import documents, expand

FORMAT = 1
BATCH_BYTES, BATCH_DOCUMENTS = 1 << 20, 1024
SHARD_BYTES = 64 << 20
SECONDS_BETWEEN_SNAPSHOTS = 60.0
COUNTS_FILE, PROGRESS_FILE = "curation.json", "progress.json"
LANGUAGES_OF_QUALITY = ("en", "zh", "code")


@dataclass(frozen=True)
class CurationConfig:
    """What a run is asked for. `languages` empty keeps all; `megabytes` takes only the first of each source."""

    rule_set: RuleSet | Literal["none"] = "books"
    languages: tuple[str, ...] = ()
    min_quality: float = 0.05
    megabytes: float | None = None
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rule_set not in ("web", "books", "none"):
            raise UserError(f"rules are 'web', 'books' or 'none', not {self.rule_set!r}")
        if not 0 <= self.min_quality <= 1:
            raise UserError(f"the least quality is a probability from 0 to 1, not {self.min_quality:g}")
        if self.megabytes is not None and self.megabytes <= 0:
            raise UserError(f"megabytes of each source must be above 0, not {self.megabytes:g}")
        unknown = [name for name in self.skip if name not in STAGE_TITLES]
        if unknown:
            raise UserError(f"no stage {unknown[0]!r} to skip: stages are {', '.join(STAGE_TITLES)}")


ORDER: tuple[type[Stage], ...] = (
    *(stage_room.Readable, stage_room.Exact, stage_room.Extraction, stage_room.Scanning, stage_room.Labelling),
    *(stage_room.Rules, stage_room.Quality, stage_room.Contamination, stage_room.Near, stage_room.BlockPruning),
    stage_room.Semantic,
)
STAGE_TITLES = {stage.name: stage.title for stage in ORDER}
Watch = Callable[[Counts], None]


@dataclass(frozen=True)
class Aids:
    """What stages need from outside; a stage whose aid is missing is left out, and the report says so."""

    labels: Labels | None = None
    evaluation: EvaluationTexts | None = None
    embed: Embed | None = None


def build_stages(config: CurationConfig, aids: Aids) -> tuple[list[Stage], dict[str, str]]:
    """The stages of a run in their order, and why others are left out."""
    labels, evaluation, embed = aids.labels, aids.evaluation, aids.embed
    made: dict[str, Stage | str] = {
        "readable": stage_room.Readable(),
        "exact": stage_room.Exact(),
        "extraction": stage_room.Extraction(),
        "scan": stage_room.Scanning(),
        "labels": stage_room.Labelling(labels, config.languages) if labels else "no classifiers",
        "rules": stage_room.Rules(config.rule_set) if config.rule_set != "none" else "no rules asked for",
        "quality": stage_room.Quality(config.min_quality, LANGUAGES_OF_QUALITY) if labels else "no classifiers",
        "contamination": stage_room.Contamination(evaluation) if evaluation else "no evaluation texts",
        "near": stage_room.Near(),
        "blocks": stage_room.BlockPruning(),
        "semantic": stage_room.Semantic(SemanticCopies(embed)) if embed else "no embedding model given",
    }
    made |= {name: "left out on request" for name in config.skip if name != "scan"}
    if config.languages and isinstance(made["labels"], str):
        raise UserError("keeping only some languages needs the classifiers: do not leave labels out")
    chosen = [stage for stage in made.values() if isinstance(stage, Stage)]
    return chosen, {name: why for name, why in made.items() if isinstance(why, str)}


class Curation:
    """Stages and their counts: takes batches, gives what is left of them."""

    def __init__(self, config: CurationConfig, aids: Aids) -> None:
        self.stages, left_out = build_stages(config, aids)
        counts = [StageCounts(name, title, skipped=left_out.get(name, "")) for name, title in STAGE_TITLES.items()]
        self.counts = Counts(counts)

    def process(self, batch: Batch) -> None:
        """Send a batch through every stage."""
        for document in batch.documents:
            source = self.counts.sources.setdefault(document.source, SourceCounts())
            source.documents_in += 1
            source.bytes_in += len(document.text)
        by_name = {counts.name: counts for counts in self.counts.stages}
        for stage in self.stages:
            _run_stage(stage, batch, by_name[stage.name])
        for place in batch.living():
            source = self.counts.sources[batch.documents[place].source]
            source.documents_out += 1
            source.bytes_out += len(batch.texts[place])
            if batch.judged is not None:
                _add(self.counts.languages, batch.judged.language_N[place])
                _add(self.counts.topics, batch.judged.topic_N[place])

    def save(self, path: Path) -> None:
        """Write what the stages remember."""
        arrays = {f"{stage.name}.{key}": value for stage in self.stages for key, value in stage.arrays().items()}
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    def restore(self, path: Path, counts: Counts) -> None:
        """Take back what `save` wrote, and the counts of that moment."""
        with np.load(path, allow_pickle=False) as arrays:
            for stage in self.stages:
                parts = [name for name in arrays.files if name.startswith(f"{stage.name}.")]
                if parts:
                    stage.restore({name.partition(".")[2]: arrays[name] for name in parts})
        self.counts = counts


def _add(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1


def _run_stage(stage: Stage, batch: Batch, counts: StageCounts) -> None:
    """One stage over a batch, counted and timed in CPU seconds."""
    counts.documents_in += int(batch.alive.sum())
    counts.bytes_in += batch.alive_bytes

    def drop(place: int, reason: str, detail: str) -> None:
        document = batch.documents[place]
        counts.drop(document.number, document.source, reason, batch.texts[place], detail)
        batch.alive[place] = False

    def show(place: int, reason: str, cut: bytes) -> None:
        document = batch.documents[place]
        counts.edited += 1
        counts.show(document.number, document.source, reason, cut)

    started = time.process_time()
    stage.apply(batch, drop, show)
    counts.seconds += time.process_time() - started
    counts.documents_out += int(batch.alive.sum())
    counts.bytes_out += batch.alive_bytes


def read_documents(
    names: Sequence[str], cache_dir: str | Path | None = None, megabytes: float | None = None
) -> Iterator[Document]:
    """Documents of all sources in turn, numbered; of each at most the first `megabytes` (10^6 bytes of UTF-8)."""
    number = 0
    for name in expand(names):
        left = float("inf") if megabytes is None else megabytes * 1e6
        for text in documents(name, cache_dir):
            if left <= 0:
                break
            raw = text.encode(errors="replace")
            left -= len(raw)
            yield Document(number, name, raw)
            number += 1


def batches(found: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about a megabyte, at most 1,024 to a group."""
    group: list[Document] = []
    size = 0
    for document in found:
        group.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES or len(group) >= BATCH_DOCUMENTS:
            yield group
            group, size = [], 0
    if group:
        yield group


def curate(
    names: Sequence[str], out: Path, config: CurationConfig, aids: Aids, cache_dir: str | Path | None = None,
    key: str = "", watch: Watch = lambda counts: None,
) -> Counts:  # fmt: skip
    """Curate sources into a folder of JSON Lines and `curation.json`; goes on where the same run was stopped.

    `key` stands for aids that are part of what is asked for (files of labels, evaluation texts). Raises UserError where
    the folder holds another run, a source changed since the run was stopped, or nothing is left of the sources.
    """
    asked = json.dumps([FORMAT, list(expand(names)), asdict(config), key])
    if (out / COUNTS_FILE).is_file():
        return _finished(out, asked)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and no output of curation: name a new folder")
    work = out.with_name(f".{out.name}.curating")
    with _sole_owner(work):
        run = _Run(work, asked, Curation(config, aids))
        run.resume()
        counts = run.take(read_documents(names, cache_dir, config.megabytes), watch)
        if not counts.total.documents_in:
            shutil.rmtree(work)
            raise UserError(f"no text in {', '.join(names)}: name a source that holds some")
        run.finish(out)
    return counts


@contextmanager
def _sole_owner(work: Path) -> Iterator[None]:
    """Hold a work folder (made if missing) against a second process; the system lets go however this one ends."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process is at work in {work}: wait for it, or name another folder") from None
    finally:
        os.close(descriptor)


def _finished(out: Path, asked: str) -> Counts:
    """The counts of a folder that was written before by the same command; UserError for another."""
    plain = json.loads((out / COUNTS_FILE).read_text(encoding="utf-8"))
    if plain["asked"] != asked:
        raise UserError(f"{out} holds the output of another curation: name a new folder, or delete it")
    return counts_from(plain["counts"])


@dataclass
class _Progress:
    """How far a run got: documents taken, a checksum of them, and the shard being written."""

    asked: str
    taken: int = 0
    checksum: int = 0
    shard: int = 0
    shard_bytes: int = 0
    state: str = ""


class _Run:
    """A run in its work folder."""

    def __init__(self, work: Path, asked: str, curation: Curation) -> None:
        self.work, self.curation = work, curation
        self.progress = _Progress(asked)
        self.saved = time.monotonic()
        self.started = time.process_time()
        self.seconds_before = 0.0

    def resume(self) -> None:
        """Go back to the last snapshot, if there is one; lines written after it are cut off."""
        file = self.work / PROGRESS_FILE
        if file.is_file():
            plain = json.loads(file.read_text(encoding="utf-8"))
            if plain["progress"]["asked"] != self.progress.asked:
                raise UserError(f"{self.work} holds another unfinished curation: delete it to start this one")
            known = {field.name for field in fields(_Progress)}
            self.progress = _Progress(**{name: value for name, value in plain["progress"].items() if name in known})
            self.curation.restore(self.work / self.progress.state, counts_from(plain["counts"]))
            self.seconds_before = self.curation.counts.seconds
        for path in self.work.glob("part-*.jsonl"):
            number = int(path.stem.partition("-")[2])
            if number > self.progress.shard or not file.is_file():
                path.unlink()
            elif number == self.progress.shard:
                os.truncate(path, self.progress.shard_bytes)

    def take(self, found: Iterator[Document], watch: Watch) -> Counts:
        """Pass over what was taken before, send the rest through the stages, write what is left."""
        found = self._rest(found)
        groups = batches(found)
        while True:
            try:
                group = next(groups, None)
            except BaseException:
                # Between batches everything is consistent: whatever reading met, what was done is kept.
                self.snapshot()
                raise
            if group is None:
                break
            batch = Batch(group)
            self.curation.process(batch)
            self._write(batch)
            for document in group:
                self.progress.checksum = zlib.crc32(document.text, self.progress.checksum)
            self.progress.taken += len(group)
            self.curation.counts.seconds = self.seconds_before + time.process_time() - self.started
            watch(self.curation.counts)
            if time.monotonic() - self.saved >= SECONDS_BETWEEN_SNAPSHOTS:
                self.snapshot()
        return self.curation.counts

    def _rest(self, found: Iterator[Document]) -> Iterator[Document]:
        """What was not taken before; UserError where what was taken reads otherwise today."""
        checksum = 0
        for _ in range(self.progress.taken):
            document = next(found, None)
            checksum = zlib.crc32(document.text, checksum) if document else -1
        if checksum != self.progress.checksum:
            raise UserError(f"a source changed since this curation was stopped: delete {self.work} to start it anew")
        return found

    def _write(self, batch: Batch) -> None:
        """Append the documents that are alive to the present shard."""
        lines = [_line(batch, place) for place in batch.living()]
        path = self.work / f"part-{self.progress.shard:05d}.jsonl"
        with path.open("ab") as file:
            file.write(b"".join(lines))
        self.progress.shard_bytes += sum(map(len, lines))
        if self.progress.shard_bytes >= SHARD_BYTES:
            self.progress.shard += 1
            self.progress.shard_bytes = 0

    def snapshot(self) -> None:
        """Save memory, counts and place, so that a stopped run can go on; the old ones stay until the new are whole."""
        before = self.progress.state
        self.progress.state = f"state-{self.progress.taken}.npz"
        path = self.work / f"part-{self.progress.shard:05d}.jsonl"
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self.curation.save(self.work / self.progress.state)
        plain = {"progress": asdict(self.progress), "counts": self.curation.counts.plain()}
        partial = self.work / f".{PROGRESS_FILE}"
        partial.write_text(json.dumps(plain), encoding="utf-8")
        os.replace(partial, self.work / PROGRESS_FILE)
        if before and before != self.progress.state:
            (self.work / before).unlink(missing_ok=True)
        self.saved = time.monotonic()

    def finish(self, out: Path) -> None:
        """Write the counts, drop the memory, and give the folder its name."""
        plain = {"asked": self.progress.asked, "counts": self.curation.counts.plain()}
        (self.work / COUNTS_FILE).write_text(json.dumps(plain, ensure_ascii=False, indent=1), encoding="utf-8")
        for path in (*self.work.glob("state-*.npz"), self.work / PROGRESS_FILE):
            path.unlink(missing_ok=True)
        if out.exists():
            out.rmdir()
        os.replace(self.work, out)


def _line(batch: Batch, place: int) -> bytes:
    """A document as a line of JSON: text, source, its number in the run, and its labels where it has any."""
    document = batch.documents[place]
    row: dict[str, object] = {
        "text": batch.texts[place].decode(),
        "source": document.source,
        "number": document.number,
    }
    if batch.judged is not None:
        row["language"], row["topic"] = batch.judged.language_N[place], batch.judged.topic_N[place]
        row["quality"] = round(float(batch.judged.quality_N[place]), 4)
    return json.dumps(row, ensure_ascii=False).encode() + b"\n"
