"""The programs of `turbos bench serve`, each a process of its own: `turbos serve`, the engine alone, llama-server.

All are used in `with` blocks, which end them. A program that does not come up is a UserError with its last words.

    with start_server(checkpoint, plan, sessions=directory) as server:
        ask_one(server.address, "/v1/chat/completions", body)
"""

from __future__ import annotations

import json
import re
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbos.bench.contestants import worker_environment
from turbos.bench.serve_client import PATIENCE, Address, await_health
from turbos.bench.serve_engine import PRECISION
from turbos.bench.serve_plan import SNAPSHOT_EVERY, ServePlan
from turbos.common.errors import UserError

PEER = Path(__file__).with_name("serve_peer.py")
NAME = "bench"
"""What the server calls the model."""


class Child:
    """A process whose lines are read one by one; what it complains of is kept for its last words."""

    def __init__(self, name: str, words: Sequence[str], threads: int) -> None:
        self.name = name
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=worker_environment(threads),
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def stop(self) -> None:
        """Tell it to stop as a user does; leaving the context waits for it."""
        self._process.send_signal(signal.SIGTERM)

    def ask(self, question: object) -> Any:
        """The JSON line that it answers to one."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # its last words say more
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        return json.loads(self.line())

    def line(self) -> str:
        """The next line; UserError with its last words where none comes."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            line = self._process.stdout.readline() if selector.select(PATIENCE) else b""
        if line:
            return line.decode()
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines() or ["it gave no reason"]
        complaint = next((line for line in lines if " E " in line), lines[-1])
        raise UserError(f"bench serve: {self.name} gives no answer: {complaint}")


@dataclass(frozen=True)
class Server:
    """A server that listens, and its process."""

    address: Address
    child: Child


@contextmanager
def start_server(checkpoint: Path, plan: ServePlan, sessions: Path) -> Iterator[Server]:
    """`turbos serve` on a free port of the loopback; it is told to stop when the context is left."""
    words = ["-m", "turbos", "serve", str(checkpoint), "--port", "0", "--name", NAME, "--sessions", str(sessions)]
    words += ["--memory", str(plan.memory), "--threads", str(plan.threads), "--precision", PRECISION]
    words += ["--max-running", str(plan.streams), "--snapshot-every", str(SNAPSHOT_EVERY)]
    with Child("turbos serve", words, plan.threads) as child:
        found = re.search(r"http://\S+(?=/ is the page)", child.line())
        assert found is not None, "its first line has its address"
        address = Address.of(found[0])
        try:
            await_health(address)
            yield Server(address, child)
        finally:
            child.stop()


@contextmanager
def start_engine(checkpoint: Path, plan: ServePlan) -> Iterator[Child]:
    """The engine alone; see `serve_engine` for what it is asked."""
    words = ["-m", "turbos.bench.serve_engine", str(checkpoint), str(plan.threads), str(plan.memory)]
    with Child("the engine", [*words, str(plan.streams)], plan.threads) as child:
        child.line()
        yield child


@contextmanager
def start_peer(path: Path, plan: ServePlan, context: int, states: Path) -> Iterator[Server]:
    """llama-server with a GGUF file, a slot of `context` tokens for each stream."""
    words = ["-I", str(PEER), str(path), str(plan.threads), str(plan.streams), str(context), str(states)]
    with Child("llama-server", words, plan.threads) as child:
        yield Server(Address.of(json.loads(child.line())["address"]), child)
