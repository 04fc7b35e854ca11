"""All that `turbos serve` serves, put together: OpenAI's interface, sessions and the page over one service.

    app = assemble(service, ServeOptions(sessions=Path("talks")), known=())

Without a directory for sessions they live in a temporary one, and are forgotten when the server stops.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from fastapi import FastAPI

from turbos.serve.app import create_app
from turbos.serve.limits import ServeOptions
from turbos.serve.page.play import KnownFamily
from turbos.serve.page.routes import page_router
from turbos.serve.page.worker import Renderer
from turbos.serve.service import Service
from turbos.serve.sessions.directory import Directory
from turbos.serve.sessions.routes import sessions_router
from turbos.serve.sessions.sessions import Sessions


def assemble(
    service: Service, options: ServeOptions, known: Sequence[KnownFamily] = (), held: Directory | None = None
) -> FastAPI:
    """The whole application. `held` is the sessions' directory where it is held already.

    UserError where another server holds it.
    """
    temporary = TemporaryDirectory(prefix="turbos-sessions-")
    sessions = Sessions.open(service, held or options.sessions or Path(temporary.name))
    renderer = Renderer()

    async def forget() -> None:
        temporary.cleanup()

    app = create_app(service, options, closing=(sessions.close, renderer.close, forget))
    app.include_router(sessions_router(sessions, renderer.html))
    app.include_router(page_router(service, renderer, known))
    return app
