"""Routes of the live page, for a process that serves nothing else and for the server of the finished model.

GET  /live/              the page                  GET  /live/NAME          its files
GET  /live/api/run       what the run is doing     GET  /page/NAME          the chat page's files, which it shares

uvicorn.run(live_app(Path("runs/demo")))
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import RedirectResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from turbos.serve.live.records import RunReader
from turbos.serve.page.files import HEADERS, INDEX, PageFile, file_response, page_files, read_files

LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]"]


def live_files() -> dict[str, PageFile]:
    """The live page's own files, by name."""
    return read_files(__package__)


def live_router(reader: RunReader) -> APIRouter:
    """The live page of one run; the files that it shares with the chat page are another router's."""
    router = APIRouter(include_in_schema=False)
    reading = asyncio.Lock()

    @router.get("/live/api/run")
    async def run() -> Response:
        # Two readers would take the same lines of a log twice.
        async with reading:
            found = await asyncio.to_thread(reader.read)
        text = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
        # A damaged file may hold halves of characters.
        return Response(text.encode("utf-8", "replace"), headers=HEADERS, media_type="application/json")

    @router.get("/live")
    async def beside() -> Response:
        return RedirectResponse("live/")

    @router.get("/live/")
    async def index(request: Request) -> Response:
        return file_response(request, live_files().get(INDEX))

    @router.get("/live/{name}")
    async def file(request: Request, name: str) -> Response:
        return file_response(request, live_files().get(name))

    return router


def live_app(run_dir: Path) -> FastAPI:
    """An application that has the live page and nothing else, for this machine alone."""
    app = FastAPI(title="TurboS", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOCAL_NAMES, www_redirect=False)
    app.include_router(live_router(RunReader(run_dir)))

    @app.get("/")
    async def root() -> Response:
        return RedirectResponse("live/")

    @app.get("/page/{name}")
    async def shared(request: Request, name: str) -> Response:
        return file_response(request, page_files().get(name))

    return app
