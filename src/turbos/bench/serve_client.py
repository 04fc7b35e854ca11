"""A client that asks a server many things at once and notes when which bytes come; it reads them afterwards.

Bytes are stamped with a clock as they arrive and nothing else is done while answers come, since client and server share
the machine's cores. HTTP is read by h11 (uvicorn's own dependency), events as OpenAI and llama-server send them. Each
request has a connection of its own.

    streamed = asyncio.run(ask_all(Address("127.0.0.1", 8000), "/v1/chat/completions", bodies))
    streamed[0].first, streamed[0].gaps, streamed[0].end, streamed[0].text
    answer = ask_one(address, "/v1/chat/completions", body)
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import h11

PATIENCE = 600.0
"""Seconds after which a server that sends nothing more has failed."""


@dataclass(frozen=True)
class Address:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Address:
        """Of an address like `http://127.0.0.1:8000`."""
        parts = urlsplit(url)
        assert parts.hostname is not None and parts.port is not None, url
        return cls(parts.hostname, parts.port)


@dataclass(frozen=True)
class Streamed:
    """One streamed answer: seconds from the common start to each part that has text, to the last byte, and its tokens.

    A server that is late may send several tokens as one part. `tokens` are what the server counted.
    """

    parts: tuple[float, ...]
    end: float
    tokens: int
    text: str

    @property
    def first(self) -> float:
        """Seconds to the first part."""
        return self.parts[0]

    @property
    def gaps(self) -> list[float]:
        """Seconds from each part to the next."""
        return [after - before for before, after in zip(self.parts, self.parts[1:], strict=False)]


class _Incoming(asyncio.Protocol):
    """Sends a request and keeps what comes, with the moments."""

    def __init__(self, request: bytes, start: float, done: asyncio.Future[None]) -> None:
        self._request, self._start, self._done = request, start, done
        self.pieces: list[tuple[float, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter() - self._start, data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_result(None)


async def ask_all(address: Address, path: str, bodies: Sequence[object]) -> list[Streamed]:
    """Streamed answers to all bodies, which are sent at once, in their order. RuntimeError where one is no answer."""
    posts = [_Post.of(address, path, body) for body in bodies]
    loop, start = asyncio.get_running_loop(), time.perf_counter()

    async def ask(post: _Post) -> _Incoming:
        done = loop.create_future()
        transport, incoming = await loop.create_connection(
            lambda: _Incoming(post.sent, start, done), address.host, address.port
        )
        try:
            await asyncio.wait_for(done, PATIENCE)
        finally:
            transport.close()
        return incoming

    incoming = await asyncio.gather(*map(ask, posts))
    return [post.read(one.pieces) for post, one in zip(posts, incoming, strict=True)]


@dataclass(frozen=True)
class _Post:
    """A request on the wire, and the connection that can read its answer."""

    connection: h11.Connection
    sent: bytes

    @classmethod
    def of(cls, address: Address, path: str, body: object) -> _Post:
        content = json.dumps(body).encode()
        headers = [
            ("Host", f"{address.host}:{address.port}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(content))),
            ("Connection", "close"),
        ]
        connection = h11.Connection(h11.CLIENT)
        events = (h11.Request(method="POST", target=path, headers=headers), h11.Data(content), h11.EndOfMessage())
        return cls(connection, b"".join(connection.send(event) or b"" for event in events))

    def read(self, pieces: Sequence[tuple[float, bytes]]) -> Streamed:
        """The answer in the bytes that came."""
        status, rest, events = 0, b"", list[tuple[float, Any]]()
        for moment, data in pieces:
            self.connection.receive_data(data)
            while (event := self.connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
                if isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    *lines, rest = (rest + bytes(event.data)).split(b"\n")
                    events += [(moment, line[6:]) for line in lines if line.startswith(b"data: ")]
                elif isinstance(event, h11.EndOfMessage):
                    break
        if status != 200 or not events or events[-1][1].strip() != b"[DONE]":
            last = rest or (events[-1][1] if events else b"nothing")
            raise RuntimeError(f"bench serve: a server gave no whole answer ({status}): {last[:300].decode()}")
        return _streamed([(moment, json.loads(data)) for moment, data in events[:-1]], pieces[-1][0])


def _streamed(events: Sequence[tuple[float, Any]], end: float) -> Streamed:
    parts, texts, tokens = [], [], 0
    for moment, event in events:
        if "error" in event:
            raise RuntimeError(f"bench serve: an answer failed: {event['error']}")
        for choice in event["choices"]:
            delta = choice.get("delta", {})
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content") or ""
            if text:
                parts.append(moment)
                texts.append(text)
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
    if not parts:
        raise RuntimeError("bench serve: an answer has no text")
    return Streamed(tuple(parts), end, tokens, "".join(texts))


def ask_one(address: Address, path: str, body: object, method: str = "POST") -> Any:
    """The JSON that a server answers; of a stream of events the last one. RuntimeError where it refuses."""
    request = urllib.request.Request(
        f"http://{address.host}:{address.port}{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
            content = reply.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"bench serve: {path}: {error.code} {error.read()[:300].decode()}") from error
    if content.startswith(b"data: "):
        lines = [line[6:] for line in content.splitlines() if line.startswith(b"data: ")]
        content = lines[-2]
    return json.loads(content)


def await_health(address: Address) -> None:
    """Wait until a server answers; RuntimeError where it does not within a minute."""
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"http://{address.host}:{address.port}/health", timeout=PATIENCE).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise RuntimeError(f"bench serve: a server does not listen: {error}") from error
        time.sleep(0.05)
