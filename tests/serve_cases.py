"""A real server for tests: a tiny checkpoint, the real application, uvicorn in a thread on a free port.

Not a test file.

    with serving() as server:
        server.client().chat.completions.create(model="tiny", messages=[...])
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from fastapi import FastAPI

from tiny import save_tiny, tiny_model, tiny_tokenizer
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.serve.app import create_app
from turbos.serve.limits import Gate, ServeOptions
from turbos.serve.service import Service

PATIENCE = 60.0
"""Seconds after which something that should have happened hangs."""


@dataclass(frozen=True)
class Server:
    """A server that runs: its address, and the service behind it."""

    url: str
    service: Service
    gate: Gate
    uvicorn: uvicorn.Server

    def client(self, **options: Any) -> openai.OpenAI:
        """A real client of OpenAI's; a refusal is final, nothing is asked twice."""
        settings = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **settings)

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        """A request as it is: for what the client would not send."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE, **options)

    def send(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        """Bytes as they are."""
        return httpx.post(
            f"{self.url}{path}",
            content=content,
            headers={"Content-Type": "application/json", **headers},
            timeout=PATIENCE,
        )

    def wait_idle(self, seconds: float) -> bool:
        """Whether no answer runs or waits, and all slots but those of kept states are free, within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            metrics = self.service.engine.metrics()
            if not (metrics.waiting or metrics.reading or metrics.writing or self.service.engine.busy):
                return True
            time.sleep(0.01)
        return False


def tiny_engine(**options: Any) -> Engine:
    """An engine of a tiny model: small memory, and as fast to make as can be."""
    config = {"memory": 1 << 26, "precision": "fp32", "path": "torch", "threads": 1, "context": 1024, **options}
    tokenizer = tiny_tokenizer()
    ends = {tokenizer.special("<|end|>"), tokenizer.special("<|endoftext|>")}
    return Engine(tiny_model(), tokenizer, EngineConfig(**config), ends)


def tiny_service(**options: Any) -> Service:
    """A service of a tiny model."""
    return Service(tiny_engine(**options), "tiny")


def tiny_checkpoint(directory: Path) -> Path:
    """The same model as a checkpoint, for servers that are processes of their own."""
    return save_tiny(directory / "tiny")


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    service: Service | None = None,
    options: ServeOptions | None = None,
    app: FastAPI | None = None,
    grace_seconds: int = 1,
    **engine_options: Any,
) -> Iterator[Server]:
    """A server for as long as the context lasts; of an application where one is given, which is the service's then."""
    service = service or tiny_service(**engine_options)
    app = app or create_app(service, options)
    port = free_port()
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=grace_seconds,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    try:
        yield Server(f"http://127.0.0.1:{port}", service, app.state.serving.gate, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not stop"
