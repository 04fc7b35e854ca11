"""What tests of sessions share: servers that keep them, and talking to one by its events. Not a test file.

with keeping(tmp_path) as server:
    talk = Talk.begin(server)
    talk.say("12 and 18?").usage["cached_tokens"]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from serve_cases import PATIENCE, Server, serving, tiny_service
from turbos.serve.app import create_app
from turbos.serve.limits import ServeOptions
from turbos.serve.service import Service
from turbos.serve.sessions.routes import sessions_router
from turbos.serve.sessions.sessions import Sessions


async def marked(text: str) -> str:
    """In place of the page's HTML, which has tests of its own."""
    return f"<p>{len(text)}</p>"


@contextmanager
def keeping(
    directory: Path, service: Service | None = None, options: ServeOptions | None = None, **engine_options: Any
) -> Iterator[Server]:
    """A server that keeps its sessions in a directory."""
    service = service or tiny_service(**engine_options)
    sessions = Sessions.open(service, directory)
    app = create_app(service, options or ServeOptions(), closing=[sessions.close])
    app.include_router(sessions_router(sessions, marked))
    with serving(service, app=app) as server:
        yield server


@dataclass(frozen=True)
class Said:
    """The events of an answer."""

    events: list[dict[str, Any]]

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Events of one type."""
        return [event for event in self.events if event["type"] == kind]

    @property
    def finish(self) -> dict[str, Any]:
        """How it ended."""
        (found,) = self.of("finish")
        return found

    @property
    def usage(self) -> dict[str, int]:
        """The tokens that were counted."""
        usage: dict[str, int] = self.finish["usage"]
        return usage

    @property
    def content(self) -> str:
        """What was said, as a reader of the events puts it together."""
        found = ""
        for event in self.events:
            if event["type"] == "recast":
                found = ""
            elif event["type"] == "content":
                found += event["text"]
        return found

    @property
    def thinking(self) -> str:
        """What was thought."""
        found, content = "", ""
        for event in self.events:
            if event["type"] == "recast":
                found += content
            elif event["type"] == "content":
                content += event["text"]
            elif event["type"] == "reasoning":
                found += event["text"]
        return found


@dataclass(frozen=True)
class Talk:
    """A client of one session."""

    server: Server
    id: str

    @classmethod
    def begin(cls, server: Server, **body: object) -> Talk:
        """A new session."""
        created = server.post("/v1/sessions", body)
        assert created.status_code == 201, created.text
        return cls(server, created.json()["id"])

    @property
    def path(self) -> str:
        """The session's address."""
        return f"/v1/sessions/{self.id}"

    def get(self) -> dict[str, Any]:
        """The session with its turns."""
        answer = httpx.get(f"{self.server.url}{self.path}", timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def contents(self) -> list[tuple[str, str]]:
        """Roles and contents of its turns."""
        return [(turn["role"], turn["content"]) for turn in self.get()["turns"]]

    def post(self, what: str, body: object = None) -> dict[str, Any]:
        """Something that must succeed."""
        answer = self.server.post(f"{self.path}/{what}", body)
        assert answer.status_code in (200, 201), answer.text
        found: dict[str, Any] = answer.json()
        return found

    def fork(self, turn: int | None = None) -> Talk:
        """Another session with the turns before one."""
        return Talk(self.server, self.post("fork", {"turn": turn})["id"])

    @contextmanager
    def asking(self, content: str | None, **options: object) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of an answer as they come."""
        body = {"content": content, "max_tokens": 12, "temperature": 0, **options}
        url = f"{self.server.url}{self.path}/messages"
        with httpx.stream("POST", url, json=body, timeout=PATIENCE) as answer:
            assert answer.status_code == 200, answer.read()
            yield _events(answer)

    def say(self, content: str | None, **options: object) -> Said:
        """A whole answer."""
        with self.asking(content, **options) as events:
            return Said(list(events))


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line == "data: [DONE]":
            return
        if line:
            yield json.loads(line.removeprefix("data: "))
