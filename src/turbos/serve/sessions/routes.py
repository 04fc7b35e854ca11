"""Routes of `/v1/sessions`: conversations that the server keeps.

    POST   /v1/sessions                 {title?, system?}           a session
    GET    /v1/sessions                 ?limit&offset               all, the last spoken in first
    GET    /v1/sessions/{id}                                        with its turns
    PATCH  /v1/sessions/{id}            {title}
    DELETE /v1/sessions/{id}
    POST   /v1/sessions/{id}/messages   {content?, thinking?, ...}  an answer, as events
    POST   /v1/sessions/{id}/stop                                   with the turns, the stopped one among them
    POST   /v1/sessions/{id}/fork       {turn?, title?}             a session with the turns before that one
    POST   /v1/sessions/{id}/undo                                   with its turns, without the last question
    POST   /v1/sessions/{id}/save       /load                       the model's state to disk, and from there

Events are JSON with a `type`: start, notice, reasoning, content, tool, recast, html, then finish or error.

    sessions = Sessions.open(service, Path("sessions"))
    app = create_app(service, options, closing=[sessions.close])
    app.include_router(sessions_router(sessions, renderer.html))
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response

from turbos.engine.layout import Layout
from turbos.serve.entrance import entry_of
from turbos.serve.errors import ApiError, json_response
from turbos.serve.metrics import Watch
from turbos.serve.service import Part, Service
from turbos.serve.serving import serving_of
from turbos.serve.sessions.answer import Answer, AnswerEvent, Began, Ended, Notice
from turbos.serve.sessions.schema import (
    MAX_TOKENS,
    MOST_SESSIONS,
    CreateBody,
    ForkBody,
    MessageBody,
    RenameBody,
    session_json,
    turn_json,
    usage_json,
)
from turbos.serve.sessions.sessions import Busy, Sessions
from turbos.serve.sessions.store import NoSession, StoreFailed
from turbos.serve.sse import DONE, EventStream, event
from turbos.text.stream import ContentDelta, ReasoningDelta, ToolCallDelta

LOG = logging.getLogger("turbos.serve.sessions")

Id = Annotated[str, Path(max_length=200)]
Render = Callable[[str], Awaitable[str]]
"""Makes sanitised HTML of an answer's text."""


def sessions_router(sessions: Sessions, render: Render | None = None) -> APIRouter:
    """All routes; with `render` the turns of the model come as HTML, too."""
    router = APIRouter(prefix="/v1/sessions")
    _add_list(router, sessions)
    _add_changes(router, sessions, render)
    _add_messages(router, sessions, render)
    _add_states(router, sessions)
    return router


def _add_messages(router: APIRouter, sessions: Sessions, render: Render | None) -> None:
    @router.post("/{id}/messages")
    async def message(id: Id, body: MessageBody, request: Request) -> Response:
        """The next answer, as events."""
        serving = serving_of(request)
        limits = replace(serving.options, default_completion_tokens=body.max_tokens or MAX_TOKENS)
        if limits.log_prompts:
            entry_of(request).said = body.content

        @asynccontextmanager
        async def begin() -> AsyncIterator[AsyncIterator[bytes]]:
            with serving.gate.admit(1), _refused():
                answer = await sessions.ask(id, body.content, body.options(), limits)
                try:
                    yield _events(answer, request, render)
                finally:
                    # A client that vanished is not answered on; what there is of the answer is kept.
                    answer.cancellation.request()

        return EventStream(begin, limits.stall_seconds)

    @router.post("/{id}/stop")
    async def stop(id: Id) -> Response:
        """End the answer that comes; what there is of it is kept."""
        with _refused():
            await sessions.stop(id)
            return json_response(await _whole(sessions, id, render))


def _add_list(router: APIRouter, sessions: Sessions) -> None:
    @router.post("", status_code=201)
    async def create(body: CreateBody | None = None) -> Response:
        """A session without turns."""
        body = body or CreateBody()
        with _refused():
            session = await sessions.create(body.title or "", body.system or "")
            return json_response(session_json(session), 201)

    @router.get("")
    async def recent(
        limit: Annotated[int, Query(ge=1, le=MOST_SESSIONS)] = MOST_SESSIONS,
        offset: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
    ) -> Response:
        """Sessions, the one that was spoken in last first."""
        with _refused():
            found = await sessions.recent(limit, offset)
            return json_response({"object": "list", "data": [session_json(session) for session in found]})


def _add_changes(router: APIRouter, sessions: Sessions, render: Render | None) -> None:
    @router.get("/{id}")
    async def read(id: Id) -> Response:
        """A session with its turns."""
        with _refused():
            return json_response(await _whole(sessions, id, render))

    @router.patch("/{id}")
    async def rename(id: Id, body: RenameBody) -> Response:
        """Another title."""
        with _refused():
            return json_response(session_json(await sessions.rename(id, body.title)))

    @router.delete("/{id}")
    async def delete(id: Id) -> Response:
        """Forget a session and its state on disk."""
        with _refused():
            await sessions.delete(id)
            return json_response({"id": id, "object": "session", "deleted": True})

    @router.post("/{id}/fork", status_code=201)
    async def fork(id: Id, body: ForkBody | None = None) -> Response:
        """Another session that begins like this one."""
        body = body or ForkBody()
        with _refused():
            return json_response(session_json(await sessions.fork(id, body.turn, body.title)), 201)

    @router.post("/{id}/undo")
    async def undo(id: Id) -> Response:
        """Take the last question and its answer back."""
        with _refused():
            undone = await sessions.undo(id)
            return json_response({**await _whole(sessions, id, render), "undone": undone.content})


def _add_states(router: APIRouter, sessions: Sessions) -> None:
    @router.post("/{id}/save")
    async def save(id: Id, request: Request) -> Response:
        """Write the model's state, so that a restarted server reads nothing again."""
        # What the engine has forgotten is read once more, as for an answer.
        with serving_of(request).gate.admit(1), _refused():
            return json_response(session_json(await sessions.save(id)))

    @router.post("/{id}/load")
    async def load(id: Id) -> Response:
        """Read the model's state from disk; a question does it by itself where it helps."""
        with _refused():
            return json_response(session_json(await sessions.load(id)))


@contextmanager
def _refused() -> Iterator[None]:
    """Refusals of sessions with their status."""
    try:
        yield
    except NoSession as error:
        raise ApiError(404, str(error), code="session_not_found") from error
    except Busy as error:
        raise ApiError(409, str(error), code="session_busy") from error
    except StoreFailed as error:
        # Where files lie is the server's own business; its log has the whole line.
        LOG.error("%s", error)
        raise ApiError(507, "the server's disk does not keep sessions at present", code="storage_failed") from error


async def _whole(sessions: Sessions, id: str, render: Render | None) -> dict[str, Any]:
    found = await sessions.read(id)
    turns = []
    for number, turn in enumerate(found.turns):
        is_answer = turn.message.role == "assistant"
        html = await render(turn.message.content) if is_answer and render is not None else None
        turns.append(turn_json(number, turn, html))
    return {**session_json(found.session), "answering": found.is_answering, "turns": turns}


async def _events(answer: Answer, request: Request, render: Render | None) -> AsyncIterator[bytes]:
    serving = serving_of(request)
    watch = Watch(serving.metrics)
    async for one in answer.events():
        if isinstance(one, Part):
            watch.see(one)
        elif isinstance(one, Ended):
            watch.see(one.finished)
            entry_of(request).finished.append(one.finished)
            if render is not None:
                yield event({"type": "html", "html": await render(one.finished.message.content)})
        if (found := _event(one, answer, serving.service)) is not None:
            yield event(found)
    yield DONE


def _event(one: AnswerEvent, answer: Answer, service: Service) -> dict[str, Any] | None:
    if isinstance(one, Began):
        return {"type": "start", "session": answer.session, "turn": one.number}
    if isinstance(one, Notice):
        return {"type": "notice", "message": one.message}
    if isinstance(one, Part):
        return _part(one)
    if isinstance(one, Ended):
        return _finish(one, answer, service)
    return {"type": "error", "message": one.message, "code": "server_error" if one.is_ours else "refused"}


def _part(part: Part) -> dict[str, Any] | None:
    delta = part.delta
    if isinstance(delta, ReasoningDelta):
        return {"type": "reasoning", "text": delta.text, "tokens": part.reasoning_tokens}
    if isinstance(delta, ContentDelta):
        return {"type": "content", "text": delta.text} if delta.text else None
    if isinstance(delta, ToolCallDelta):
        return {"type": "tool", "call": {"name": delta.call.name, "arguments": delta.call.arguments}}
    return {"type": "recast", "tokens": part.reasoning_tokens}


def _finish(ended: Ended, answer: Answer, service: Service) -> dict[str, Any]:
    usage, engine = ended.finished.usage, service.engine
    layout = Layout.of(engine.model.config, engine.model.embed_weight.dtype)
    total = usage.prompt + usage.completion
    # The first token belongs to the reading.
    rate = (usage.completion - 1) / ended.writing if ended.writing > 0 and usage.completion > 1 else None
    return {
        "type": "finish",
        "reason": ended.finished.reason,
        "detail": ended.finished.detail,
        "turn": ended.number,
        "usage": usage_json(usage),
        "seconds": {"reading": ended.reading, "writing": ended.writing},
        "tokens_per_second": rate,
        "state_bytes": layout.state_bytes + total * layout.kv_bytes_per_token,
        "session": answer.session,
    }
