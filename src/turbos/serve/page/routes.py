"""Routes of the page: its files at `/` and `/page/`, and what its tabs ask beyond the interfaces for everyone.

    GET  /                   the page                      GET  /page/NAME         its files
    GET  /page/api/info      model, memory, tabs           POST /page/api/render   a text as HTML
    POST /page/api/play      a problem, three answers      POST /page/api/meter    what a text costs

Conversations go through `/v1/sessions` like any other client's. Where the server wants keys, files need none.

    app.include_router(page_router(service, Renderer(), known=demo_families(directory, model_config)))
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, Request, Response
from pydantic import Field

from turbos.common.errors import UserError
from turbos.common.records import Problem
from turbos.data.problems import FIRST_HELD_OUT_SEED, make_problem
from turbos.engine.layout import Layout
from turbos.serve.errors import ApiError
from turbos.serve.page.files import INDEX, file_response, page_files
from turbos.serve.page.meter import LONGEST_METER, Reading, meter
from turbos.serve.page.play import MODES, Judged, KnownFamily, Said, play
from turbos.serve.page.worker import LONGEST_TEXT, Renderer
from turbos.serve.schema import Strict
from turbos.serve.service import Service
from turbos.serve.serving import serving_of
from turbos.serve.sse import DONE, EventStream, event

HELD_OUT_SEEDS = 1_000_000
LONGEST_METERED = 4_000_000
"""Characters of a text for the meter, which counts its tokens and keeps nothing."""


class RenderBody(Strict):
    """A text, in part or whole."""

    text: Annotated[str, Field(max_length=LONGEST_TEXT)]


class PlayBody(Strict):
    """Which problem; without a seed any held-out one."""

    family: str
    level: int = 0
    seed: Annotated[int, Field(ge=0, lt=HELD_OUT_SEEDS)] | None = None


class MeterBody(Strict):
    """A text whose tokens are counted, and the length to measure at where it is another one."""

    text: Annotated[str, Field(max_length=LONGEST_METERED)] = ""
    tokens: Annotated[int, Field(ge=1, le=LONGEST_METER)] | None = None


def page_router(service: Service, renderer: Renderer, known: Sequence[KnownFamily] = ()) -> APIRouter:
    """All routes; with `known` families the page plays them instead of chatting."""
    router = APIRouter(include_in_schema=False)
    measuring = asyncio.Lock()

    @router.get("/page/api/info")
    async def info() -> dict[str, object]:
        return _info(service, known)

    @router.post("/page/api/render")
    async def render(body: RenderBody) -> dict[str, str]:
        return {"html": await renderer.html(body.text)}

    @router.post("/page/api/play")
    async def play_one(body: PlayBody, request: Request) -> Response:
        problem, serving = _problem(body, known), serving_of(request)

        @asynccontextmanager
        async def begin() -> AsyncIterator[AsyncIterator[bytes]]:
            with serving.gate.admit(len(MODES)):
                async with aclosing(_game(service, problem)) as events:
                    yield events

        return EventStream(begin, serving.options.stall_seconds)

    @router.post("/page/api/meter")
    async def measure(body: MeterBody) -> dict[str, object]:
        counted = len(await asyncio.to_thread(service.tokenizer.encode, body.text))
        tokens = body.tokens or max(1, min(counted, LONGEST_METER))
        # Two measurements would measure each other.
        if measuring.locked():
            raise ApiError(429, "another text is being measured: ask again in a moment", headers={"Retry-After": "5"})
        async with measuring:
            measured = await asyncio.to_thread(meter, service.engine, tokens)
        twin = None if measured.twin is None else _reading(measured.twin)
        return {"text_tokens": counted, "tokens": tokens, "model": _reading(measured.model), "twin": twin}

    # Last, because it takes any name.
    _add_files(router)
    return router


def _add_files(router: APIRouter) -> None:
    @router.get("/")
    async def index(request: Request) -> Response:
        return file_response(request, page_files().get(INDEX))

    @router.get("/page/{name}")
    async def file(request: Request, name: str) -> Response:
        return file_response(request, page_files().get(name))


def _info(service: Service, known: Sequence[KnownFamily]) -> dict[str, object]:
    engine = service.engine
    layout = Layout.of(engine.model.config, engine.model.embed_weight.dtype)
    return {
        "model": service.model_name,
        "families": [
            {"name": family.name, "levels": family.levels, "trained": list(family.trained)} for family in known
        ],
        "modes": list(MODES),
        "thinks": service.tokenizer.speaks_chat,
        "state_bytes": layout.state_bytes,
        "kv_bytes_per_token": layout.kv_bytes_per_token,
        "longest": engine.longest,
        "engine": engine.describe(),
    }


def _reading(reading: Reading) -> dict[str, object]:
    return {
        "sublayers": reading.sublayers,
        "state_bytes": reading.state_bytes,
        "kv_bytes_per_token": reading.kv_bytes_per_token,
        "bytes": reading.bytes,
        "ms_per_token": reading.ms_per_token,
    }


def _problem(body: PlayBody, known: Sequence[KnownFamily]) -> Problem:
    if body.family not in {family.name for family in known}:
        names = ", ".join(family.name for family in known) or "none"
        raise UserError(f"family: this model was not trained on {body.family!r}; it knows {names}")
    seed = secrets.randbelow(HELD_OUT_SEEDS) if body.seed is None else body.seed
    return make_problem(body.family, FIRST_HELD_OUT_SEED + seed, body.level)


async def _game(service: Service, problem: Problem) -> AsyncGenerator[bytes]:
    seed = problem.seed - FIRST_HELD_OUT_SEED
    yield event({"type": "problem", "question": problem.question, "level": problem.level, "seed": seed})
    try:
        async for item in play(service, problem):
            yield event(_game_event(item, problem))
    # The status was sent long ago: what cannot be is told as an event.
    except UserError as error:
        yield event({"type": "error", "message": str(error)})
    yield DONE


def _game_event(item: Said | Judged, problem: Problem) -> dict[str, object]:
    if isinstance(item, Said):
        return {"type": item.kind, "mode": item.mode, "text": item.text}
    return {
        "type": "judged",
        "mode": item.mode,
        "verdict": item.verdict.status,
        "reason": item.verdict.reason,
        "right": problem.answer,
        "thinking_tokens": item.thinking_tokens,
        "answer_tokens": item.answer_tokens,
        "seconds": item.seconds,
    }
