"""Rendering in a process of its own, so that a hostile text costs seconds of one child and nothing else.

Brackets that never close are looked for in quadratic time, and a lexer's pattern can run for ever; both hold the
interpreter. So the child has a limit of memory, and one that does not answer in time is ended: the text is shown as it
was written. It is one child for all pages, started with the first text.

    renderer = Renderer()
    await renderer.html("**2**")        # '<p><strong>2</strong></p>\\n'
    await renderer.close()
"""

from __future__ import annotations

import asyncio
import os
import sys
from html import escape
from typing import BinaryIO

PATIENCE = 3.0
"""Seconds for one text."""

LONGEST_TEXT = 200_000
"""Characters of a text that is rendered at all."""

CHILD_MEMORY = 1 << 30
SIZE_BYTES = 4


class Renderer:
    """Markdown to HTML, one text after another; always an answer, at worst the plain text."""

    def __init__(self, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()

    async def html(self, text: str) -> str:
        """A text as sanitised HTML."""
        if len(text) > LONGEST_TEXT:
            return plain(text)
        async with self._turn:
            try:
                self._child = self._child or await _start()
                return await asyncio.wait_for(_ask(self._child, text), self._patience)
            except (TimeoutError, asyncio.IncompleteReadError, OSError):
                await self._end()
                return plain(text)
            except asyncio.CancelledError:
                # Its answer would be taken for that to the next text.
                await self._end()
                raise

    async def close(self) -> None:
        """End the child."""
        async with self._turn:
            await self._end()

    async def _end(self) -> None:
        if self._child is not None:
            if self._child.returncode is None:
                self._child.kill()
            await self._child.wait()
            self._child = None


def plain(text: str) -> str:
    """A text as it was written."""
    return f"<pre>{escape(text)}</pre>"


async def _ask(child: asyncio.subprocess.Process, text: str) -> str:
    assert child.stdin is not None and child.stdout is not None, "both are pipes"
    data = text.encode("utf-8", "replace")
    child.stdin.write(len(data).to_bytes(SIZE_BYTES) + data)
    await child.stdin.drain()
    size = int.from_bytes(await child.stdout.readexactly(SIZE_BYTES))
    return (await child.stdout.readexactly(size)).decode()


async def _start() -> asyncio.subprocess.Process:
    """A child that has said that it is ready: loading its libraries is not the first text's fault."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        __name__,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # The child must find what this process found.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None, "a pipe"
    await child.stdout.readexactly(SIZE_BYTES)
    return child


def serve(source: BinaryIO, target: BinaryIO) -> None:
    """The child: an empty size when it is ready; then size and text in, size and HTML out, until the input ends."""
    from turbos.serve.page.render import render_markdown

    target.write(bytes(SIZE_BYTES))
    target.flush()
    while len(size := source.read(SIZE_BYTES)) == SIZE_BYTES:
        text = source.read(int.from_bytes(size)).decode()
        try:
            html = render_markdown(text)
        # A text that is too deep or too large for a parser is still a text.
        except (RecursionError, MemoryError, ValueError):
            html = plain(text)
        data = html.encode()
        target.write(len(data).to_bytes(SIZE_BYTES) + data)
        target.flush()


def _main() -> None:
    if sys.platform != "win32":
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY, CHILD_MEMORY))
        # Ctrl-C is for the server, which ends this process itself; and answers go before looks.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.nice(5)
    serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    _main()
