"""The application: OpenAI's interface over one service, and what else is served beside it.

    app = create_app(service, ServeOptions())
    uvicorn.run(app)

`assembly.py` puts sessions and the page beside it, `cli/serve.py` runs the whole with all options.

The service is opened and closed with the application. Routes of other files find what they work with by `serving_of`.
It does not bind a socket, and it reads no files.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response

from turbos import __version__
from turbos.serve import errors
from turbos.serve.asking import ask, check_model
from turbos.serve.chat import respond
from turbos.serve.completions import complete
from turbos.serve.conversation import turns_of
from turbos.serve.entrance import Entrance, entry_of
from turbos.serve.errors import ApiError, json_response
from turbos.serve.limits import Gate, ServeOptions
from turbos.serve.metrics import CONTENT_TYPE, ServerMetrics
from turbos.serve.schema import ChatRequest, CompletionRequest, ErrorReply
from turbos.serve.service import Service
from turbos.serve.serving import Serving, serving_of

REFUSALS = {
    400: "What is asked cannot be; the error names the option.",
    401: "A key is wanted.",
    403: "This server is not called so.",
    404: "There is no such thing here.",
    405: "Not with this method.",
    413: "The body is too large.",
    429: "Too much at once; Retry-After says when to ask again.",
    503: "The model has failed, or the server is stopping.",
}
"""What any request may be answered instead."""

MANY_MESSAGES = 1000
"""More of them are read beside the event loop."""


def create_app(
    service: Service, options: ServeOptions | None = None, closing: Sequence[Callable[[], Awaitable[None]]] = ()
) -> FastAPI:
    """The application of one service; what `closing` says is done in order when it stops, before the service stops."""
    options = options or ServeOptions()
    metrics = ServerMetrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with service, AsyncExitStack() as stack:
            for close in reversed(closing):
                stack.push_async_callback(close)
            yield

    app = FastAPI(
        title="TurboS",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,
        responses={status: {"model": ErrorReply, "description": what} for status, what in REFUSALS.items()},
    )
    app.state.serving = Serving(service, options, Gate(options.max_open), metrics, int(time.time()))
    app.add_middleware(Entrance, options=options, metrics=metrics)
    errors.install(app)
    app.include_router(_openai_router())
    app.include_router(_health_router())
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


def _openai_router() -> APIRouter:
    router = APIRouter(prefix="/v1")

    @router.post("/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The next turn of a conversation."""
        serving = serving_of(request)
        if serving.options.log_prompts:
            entry_of(request).said = [message.model_dump(exclude_none=True) for message in body.messages]
        # The event loop is others' too.
        is_long = len(body.messages) > MANY_MESSAGES
        turns = await asyncio.to_thread(turns_of, body.messages) if is_long else turns_of(body.messages)
        asked = await ask(serving.service, body, serving.options, turns)
        return await respond(request, asked, stream=bool(body.stream))

    @router.post("/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What follows some texts."""
        if serving_of(request).options.log_prompts:
            entry_of(request).said = body.prompt
        return await complete(request, body)

    @router.get("/models")
    async def models(request: Request) -> Response:
        """The one model that is served."""
        return json_response({"object": "list", "data": [_model(serving_of(request))]})

    @router.get("/models/{model:path}")
    async def model(model: str, request: Request) -> Response:
        """The model, by its name."""
        serving = serving_of(request)
        check_model(serving.service, model)
        return json_response(_model(serving))

    return router


def _health_router() -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health(request: Request) -> Response:
        """Whether answers can be had: 200, or 503 after the model has failed."""
        if serving_of(request).service.failed:
            raise ApiError(503, "the model has failed; start the server again")
        return json_response({"status": "ok", "model": serving_of(request).service.model_name})

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Counters for Prometheus."""
        serving = serving_of(request)
        text = serving.metrics.text(serving.service.engine.metrics(), serving.gate)
        return Response(text, media_type=CONTENT_TYPE)

    return router


def _model(serving: Serving) -> dict[str, Any]:
    service = serving.service
    return {
        "id": service.model_name,
        "object": "model",
        "created": serving.began,
        "owned_by": "turbos",
        "max_model_len": service.engine.longest,
        "thinking": service.speaks_chat,
    }


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI promises and this server never sends."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = document
    return app.openapi_schema
