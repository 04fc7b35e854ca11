"""Server-sent events, and work that ends when its client is gone.

A stream is a response of its own instead of Starlette's, so that nothing stands between a token and the socket: the
work runs in one task, another waits for the client to hang up, and whichever ends first ends the other. A client that
takes nothing for a while is cut off. What is sent is the caller's matter.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from turbos.serve.errors import json_bytes

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # proxies that collect would hold tokens back
]

Begin = Callable[[], AbstractAsyncContextManager[AsyncIterator[bytes]]]
"""Opens what a stream will send; whatever it raises before the first byte becomes an ordinary error response."""


def event(content: object) -> bytes:
    """One event with JSON as its data."""
    return b"data: " + json_bytes(content) + b"\n\n"


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The work's result; where the client hangs up first, the work is cancelled and ClientDisconnect raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect()
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        # Not over before the work has cleaned up: its answers are cancelled then.
        await asyncio.wait((working, watching))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stalled(Exception):
    """A client has taken nothing for too long."""


class EventStream(Response):
    """Sends the chunks of a stream as they come."""

    media_type = "text/event-stream"

    def __init__(self, begin: Begin, stall_seconds: float) -> None:
        self._begin, self._stall_seconds = begin, stall_seconds
        self.status_code, self.background, self.body = 200, None, b""
        self.raw_headers = list(HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream to its end, or to the client's."""
        async with self._begin() as chunks:
            try:
                await until_gone(receive, self._send(chunks, send))
            # Without the last chunk the connection is closed: whoever still reads sees that something is missing.
            except (ClientDisconnect, Stalled):
                return

    async def _send(self, chunks: AsyncIterator[bytes], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in chunks:
            try:
                async with asyncio.timeout(self._stall_seconds):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            except TimeoutError as error:
                raise Stalled from error
        await send({"type": "http.response.body", "body": b"", "more_body": False})
