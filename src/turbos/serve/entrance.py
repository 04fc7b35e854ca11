"""The way in: who may ask, how large a request may be, a name for each, a line in the log when it is over.

A plain ASGI layer, because every token of every stream passes it on the way out. Refusals are in OpenAI's shape. The
log says of each request times and counts and never what was said, unless the options want that too. A name that a
browser was tricked into (DNS rebinding) is refused where the server has a list of its own names, and so is another
site's page that would change something here.

    {"event": "request", "id": "req-...", "method": "POST", "path": "/v1/chat/completions", "status": 200, ...}
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from turbos.serve.errors import TOO_LARGE, ApiError
from turbos.serve.limits import Keys, ServeOptions
from turbos.serve.metrics import ServerMetrics
from turbos.serve.service import Finished

LOG = logging.getLogger("turbos.serve")
GUARDED = ("/v1/", "/metrics", "/page/api/")
"""Beginnings of paths that want a key, where there are keys."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
SAFE = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing: whichever page asks, it cannot read the answer."""
LONGEST_PATH = 200
MOST_BODIES = 16
"""Bodies of the largest size that are held in memory at once."""


@dataclass
class Entry:
    """A request on its way through the server; what routes know of it is added as they go."""

    id: str
    began: float
    status: int = 0
    received: int = 0
    said: object = None
    finished: list[Finished] = field(default_factory=list)


def entry_of(request: Request) -> Entry:
    """The entry of a request."""
    entry: Entry = request.scope["turbos.entry"]
    return entry


class Entrance:
    """Stands before an application."""

    def __init__(self, app: ASGIApp, options: ServeOptions, metrics: ServerMetrics) -> None:
        self._app, self._options, self._metrics = app, options, metrics
        self._keys = Keys(options.api_keys)
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = Entry(f"req-{secrets.token_hex(8)}", time.monotonic())
        scope["turbos.entry"] = entry

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", entry.id.encode())]}
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, sending)
            else:
                await self._app(scope, self._counted(receive, entry), sending)
        except Exception:
            # The answer to it is sent from farther out.
            entry.status = entry.status or 500
            raise
        finally:
            self._held -= entry.received
            self._note(scope, entry)

    def _refusal(self, scope: Scope) -> ApiError | None:
        """Why a request is not let in, as far as its head tells."""
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._options.allowed_hosts and _name(host) not in self._options.allowed_hosts:
            return ApiError(403, f"this server is not called {host[:80]!r}", code="host_not_allowed")
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and scope["method"] not in SAFE and origin.partition("://")[2] != host:
            return ApiError(403, f"a page of {origin[:80]!r} may change nothing here", code="origin_not_allowed")
        is_guarded = scope["path"].startswith(GUARDED)
        if self._keys.wanted and is_guarded and not self._keys.accept(headers.get(b"authorization", b"")):
            what = "a key is wanted: send it as 'Authorization: Bearer KEY'"
            return ApiError(401, what, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._options.max_body:
            return ApiError(413, self._too_large, code=TOO_LARGE, headers={"Connection": "close"})
        return None

    @property
    def _too_large(self) -> str:
        return f"the body is larger than the {self._options.max_body} bytes that this server reads"

    def _counted(self, receive: Receive, entry: Entry) -> Receive:
        """`receive` for bodies that do not say how long they are, and for all of them together."""

        whole = False

        async def counting() -> Message:
            nonlocal whole
            try:
                # Once the body is there, what is waited for is the client's end.
                async with asyncio.timeout(None if whole else self._options.stall_seconds):
                    message = await receive()
            except TimeoutError as error:
                what = f"nothing more of the body came for {self._options.stall_seconds:g} seconds"
                raise HTTPException(408, what, {"Connection": "close"}) from error
            whole = whole or not message.get("more_body", False)
            size = len(message.get("body", b""))
            entry.received += size
            self._held += size
            if entry.received > self._options.max_body:
                raise HTTPException(413, self._too_large, {"Connection": "close"})
            if self._held > MOST_BODIES * self._options.max_body:
                raise HTTPException(429, "too much is being read at once: ask again later", {"Retry-After": "1"})
            return message

        return counting

    def _note(self, scope: Scope, entry: Entry) -> None:
        """Count a request that is over, and log it."""
        seconds = time.monotonic() - entry.began
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = scope.get("route")
        self._metrics.request(method, getattr(route, "path", "other"), entry.status, seconds)
        if LOG.isEnabledFor(logging.INFO):
            fields = {
                "id": entry.id,
                "method": method,
                "path": scope["path"][:LONGEST_PATH],
                "status": entry.status,  # 0: the client was gone before there was one
                "seconds": round(seconds, 4),
                **_counts(entry.finished),
                **({"said": entry.said} if self._options.log_prompts and entry.said is not None else {}),
            }
            LOG.info("request", extra={"fields": fields})


def _counts(finished: Sequence[Finished]) -> dict[str, object]:
    """Tokens and ends of the answers of a request."""
    if not finished:
        return {}
    return {
        "prompt_tokens": finished[0].usage.prompt,
        "cached_tokens": min(one.usage.cached for one in finished),
        "completion_tokens": sum(one.usage.completion for one in finished),
        "reasoning_tokens": sum(one.usage.reasoning for one in finished),
        "finish": [one.reason for one in finished],
    }


def _name(host: str) -> str:
    """A host without its port."""
    return host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
