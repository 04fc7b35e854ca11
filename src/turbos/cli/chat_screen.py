"""What a chat shows and how it asks: answers on stdout, everything about them on stderr, questions from stdin.

On a terminal, thinking is one dim line that counts while it lasts, and lines can be edited (a paste of many lines is
one message where the terminal brackets pastes). Elsewhere it is plain text, one message a line. Model text is hostile:
no character of it can command a terminal, wherever it goes. What is said and what answers is not decided here.

>>> out, notes = io.StringIO(), io.StringIO()
>>> screen = Screen(io.StringIO(), out, notes, talkative=True)
>>> screen.thinking("18-12=6", 5); screen.thinking("6", 6); screen.content("six\\x1b[2J"); screen.end_answer()
>>> out.getvalue(), notes.getvalue()
('six·[2J\\n', 'thought for 6 tokens\\n')
"""

from __future__ import annotations

import io
import shutil
import sys
import time
from typing import TextIO

from turbos.cli.terminal import printable, write

PROMPT, MORE = "> ", "... "
BLOCK = '"""'
"""A line that begins with this begins a message of many lines, which the same at a line's end ends."""

BEAT = 0.1
"""Seconds between two states of a live line."""

DIM, PLAIN, CLEAR = "\x1b[2m", "\x1b[0m", "\r\x1b[K"


class Screen:
    """One chat's input and output; `unfolded` shows thinking as text, `talkative` says how answers went."""

    def __init__(
        self, source: TextIO, out: TextIO, notes: TextIO, talkative: bool = False, unfolded: bool = False
    ) -> None:
        self._source, self._out, self._notes = source, out, notes
        self.talkative, self.unfolded = talkative, unfolded
        self.is_terminal = source.isatty() and out.isatty()
        self._is_live = notes.isatty()
        self._at_start = True  # of a line of `out`
        self._is_thinking, self._thought, self._beat = False, 0, 0.0

    # Questions

    def ask(self) -> str | None:
        """The next message or command, None at the end of input; several lines between lines of \"\"\"."""
        line = self._line(PROMPT)
        if line is None or not line.startswith(BLOCK):
            return line
        lines = [line.removeprefix(BLOCK)]
        while not lines[-1].endswith(BLOCK):
            more = self._line(MORE)
            if more is None:
                break
            lines.append(more)
        return "\n".join(lines).removesuffix(BLOCK).strip("\n")

    def _line(self, prompt: str) -> str | None:
        if self.is_terminal and self._source is sys.stdin:
            try:
                return input(prompt)
            except EOFError:
                write(self._out, "\n")
                return None
        line = self._source.readline()
        return line.rstrip("\r\n") if line else None

    # Answers

    def thinking(self, text: str, tokens: int) -> None:
        """More of the thinking, `tokens` of it so far."""
        first, self._is_thinking, self._thought = not self._is_thinking, True, tokens
        if self.unfolded:
            self._dim(("thinking: " if first else "") + text)
        elif self._is_live and time.perf_counter() - self._beat > BEAT:
            self._beat = time.perf_counter()
            self._live(f"thinking ... {tokens} tokens")

    def content(self, text: str) -> None:
        """More of the answer itself."""
        self._fold()
        self._text(text)

    def end_answer(self) -> None:
        """The answer is over: the next thing begins on a line of its own."""
        self._fold()
        self._new_line()

    def _fold(self) -> None:
        """Thinking is over, if there was any: one line says how long it was."""
        if not self._is_thinking:
            return
        self._is_thinking = False
        if self.unfolded:
            self._new_line()
        elif self._is_live:
            self._live(f"thought for {self._thought} tokens")
            write(self._notes, "\n")
        elif self.talkative:
            write(self._notes, f"thought for {self._thought} tokens\n")

    # Words about answers

    def note(self, text: str) -> None:
        """What the user wants to know in any case: replies to commands, mistakes."""
        self._new_line()
        text = printable(text, keep="\n")
        write(self._notes, f"{DIM}{text}{PLAIN}\n" if self._is_live else f"{text}\n")

    def aside(self, text: str) -> None:
        """What is said only where somebody watches or asked for it."""
        if self.talkative:
            self.note(text)

    def _dim(self, text: str) -> None:
        """Unfolded thinking: part of the output, but seen as such."""
        if self._out.isatty():
            write(self._out, DIM)
        self._text(text)
        if self._out.isatty():
            write(self._out, PLAIN)

    def _text(self, text: str) -> None:
        if text:
            write(self._out, printable(text, keep="\n\t"))
            self._at_start = text.endswith("\n")

    def _new_line(self) -> None:
        if not self._at_start:
            write(self._out, "\n")
            self._at_start = True

    def _live(self, text: str) -> None:
        """Put a line in the place of the last live one; it must not be wider than the terminal."""
        text = text[: shutil.get_terminal_size().columns - 1]
        write(self._notes, f"{CLEAR}{DIM}{text}{PLAIN}")


def open_screen(talkative: bool, unfolded: bool) -> Screen:
    """The screen of this process. Bytes of the input that are no text come through, to be refused where they matter."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    screen = Screen(sys.stdin, sys.stdout, sys.stderr, talkative, unfolded)
    if screen.is_terminal:
        _edit_lines()
    return screen


def _edit_lines() -> None:
    """Let `input` edit lines and take a bracketed paste as one; a Python built without readline reads plain lines."""
    try:
        import readline
    except ImportError:
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
