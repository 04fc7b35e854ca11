"""Errors in OpenAI's shape: every refusal is `{"error": {"message", "type", "param", "code"}}`, never FastAPI's 422.

A mistake of whoever asks is a 400 that names the option; 401, 403, 404, 405, 411, 413, 415, 429 and 503 mean what they
mean elsewhere. Messages never quote what was sent beyond a short word. The handlers are installed by `app.py`.

>>> ApiError(400, "top_p must lie between 0 and 1, not 2", param="top_p").body["error"]["param"]
'top_p'
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from turbos.common.errors import UserError
from turbos.text.messages import ChatError

LONGEST_MESSAGE = 500
TOO_LARGE = "body_too_large"
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    507: "server_error",
}
"""OpenAI's types of errors by status; all others are an invalid request."""


class ApiError(Exception):
    """A refusal as the client will see it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that is sent."""
        kind = TYPES.get(self.status, "invalid_request_error")
        message = self.message if len(self.message) <= LONGEST_MESSAGE else f"{self.message[:LONGEST_MESSAGE]} ..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The whole response."""
        return json_response(self.body, self.status, self.headers)


def json_bytes(content: object) -> bytes:
    """Compact JSON in UTF-8; half a surrogate pair, which a request may hold, becomes an escape again."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def json_response(content: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with a JSON body."""
    return Response(json_bytes(content), status, headers, "application/json")


def of_user_error(error: UserError) -> ApiError:
    """The 400 for a mistake that a room below found; the option is the word its message begins with."""
    if isinstance(error, ChatError):
        return of_chat_error(error, error.message)
    if str(error).startswith("message "):
        return ApiError(400, str(error), param="messages")
    named = re.match(r"([a-z_]+)(?: must| holds|:| needs| ')", str(error))
    return ApiError(400, str(error), param=None if named is None or named[1] == "engine" else named[1])


def of_chat_error(error: ChatError, place: int | None) -> ApiError:
    """The 400 for a conversation that cannot be, because of the message in a place."""
    param = "messages" if place is None else f"messages[{place}]"
    if error.part in ("tools", "tool"):
        param = "tools"
    return ApiError(400, f"{param}, {error.part}: {error.what}", param=param)


def of_validation(error: RequestValidationError) -> ApiError:
    """The 400 for a body, query or path that is not what the schema says: the first thing that is wrong with it."""
    found = error.errors()
    # Of the members of a union all complain; the one that got farthest into the request knows best.
    first = max(found, key=lambda one: (one["type"] == "value_error", len(_place(one["loc"]))))
    param = _spelt(_place(first["loc"])) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON ({first['ctx']['error']})", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return ApiError(
            400, f"unknown option {param}: this server cannot honour it", param=param, code="unknown_option"
        )
    what = str(first["msg"]).removeprefix("Value error, ")
    return ApiError(400, f"{param}: {what}" if param else what, param=param)


def _place(loc: Sequence[str | int]) -> list[str]:
    """Where in the request: without the word for the body, and without the names of a union's members."""
    words = [str(word) for word in loc[1:]]
    return [word[:80] for word in words if re.fullmatch(r"[a-z0-9_]+|\d+", word[:80])]


def _spelt(words: Sequence[str]) -> str:
    """`messages[0].content`."""
    return "".join(f"[{word}]" if word.isdigit() else f".{word}" for word in words).removeprefix(".")


def install(app: FastAPI) -> None:
    """Let an application answer all errors in this shape."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(UserError)
    async def _user(request: Request, error: UserError) -> Response:
        return of_user_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        return of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        if error.status_code < 400:
            return Response(status_code=error.status_code, headers=error.headers)
        status = 400 if error.status_code == 422 else error.status_code
        code = TOO_LARGE if status == 413 else None
        return ApiError(status, str(error.detail), code=code, headers=error.headers).response()

    @app.exception_handler(ClientDisconnect)
    async def _gone(request: Request, error: ClientDisconnect) -> None:
        # Nobody is there to be answered, and it is no fault of ours to be logged with its trace.
        return None

    @app.exception_handler(Exception)
    async def _any(request: Request, error: Exception) -> Response:
        # The trace goes to the log; strangers learn no more than that it is our fault.
        return ApiError(500, "the server failed on this request").response()
