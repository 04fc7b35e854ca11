"""A real terminal for tests: a program under a pty of its own, keys sent to it, what it printed waited for.

Not a test file, and no emulator: what is printed is kept as it came, control sequences and all.

    with Terminal(["chat", checkpoint]) as terminal:
        terminal.expect("> ")
        terminal.send("hello\\r")
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

START = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from turbos.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""The child makes the pty its controlling terminal, so that Ctrl-C is a signal."""

PATIENCE = 60.0
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """`turbos` with some words, under a pty."""

    def __init__(self, words: Sequence[str]) -> None:
        ours, theirs = pty.openpty()
        self._fd = ours
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm"},
        )
        os.close(theirs)
        self.printed = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def send(self, keys: str) -> None:
        """Press keys; `\\r` is Enter."""
        os.write(self._fd, keys.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, a moment after the last key: Python's line editor may miss one that comes with it."""
        time.sleep(0.5)
        self.send(CTRL_C)

    def expect(self, text: str) -> str:
        """Wait until the text is printed; returns all since the last `expect`, up to it."""
        end = time.monotonic() + PATIENCE
        while text not in self.printed[self._seen :]:
            if time.monotonic() > end or not self._read():
                raise AssertionError(f"no {text!r} in {self.printed[self._seen :]!r}")
        start, self._seen = self._seen, self.printed.index(text, self._seen) + len(text)
        return self.printed[start : self._seen]

    def wait(self) -> int:
        """The exit code, once the program is over."""
        while self._read():
            pass
        return self._process.wait(PATIENCE)

    def _read(self) -> bool:
        """Take in what was printed; False when the program has closed its terminal."""
        if not select.select([self._fd], [], [], 1.0)[0]:
            return self._process.poll() is None
        try:
            content = os.read(self._fd, 1 << 16)
        except OSError:  # Linux's way to say that the other end is closed
            return False
        self.printed += content.decode("utf-8", errors="replace")
        return bool(content)
