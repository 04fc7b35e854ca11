"""Sessions of servers that are processes of their own: killed, started again, two on one directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from serve_cases import PATIENCE, tiny_checkpoint
from session_cases import Talk

QUESTION = "gcd of 12 and 18? " * 30
TRIES = 5
"""A kill may come when the new state is just in its place."""


@dataclass(frozen=True)
class Process:
    """`turbos serve` as somebody starts it."""

    url: str
    child: subprocess.Popen[str]

    def post(self, path: str, body: object) -> httpx.Response:
        """As the server of `serve_cases` does."""
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE)

    def kill(self) -> None:
        """kill -9."""
        self.child.send_signal(signal.SIGKILL)
        self.child.wait(PATIENCE)


def command(checkpoint: Path, directory: Path) -> list[str]:
    """A small server on any free port."""
    options = ["--port", "0", "--memory", "64MiB", "--threads", "1", "--quiet", "--precision", "fp32"]
    return [sys.executable, "-m", "turbos", "serve", str(checkpoint), "--sessions", str(directory), *options]


@contextmanager
def started(checkpoint: Path, directory: Path) -> Iterator[Process]:
    """A server until the context ends, if it was not killed before."""
    child = subprocess.Popen(command(checkpoint, directory), stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        url = next(word.rstrip("/") for word in line.split() if word.startswith("http://"))
        end = time.monotonic() + PATIENCE
        while True:
            try:
                httpx.get(f"{url}/health", timeout=PATIENCE).raise_for_status()
                break
            except httpx.TransportError:
                assert child.poll() is None and time.monotonic() < end
                time.sleep(0.05)
        yield Process(url, child)
    finally:
        child.send_signal(signal.SIGINT)
        try:
            child.wait(PATIENCE)
        finally:
            child.kill()
            if child.stdout is not None:
                child.stdout.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def killed_while_saving(server: Process, talk: Talk, directory: Path) -> bool:
    """Kill the server as soon as a half of a state lies on disk; whether the half is what it left."""
    half = directory / "states" / f".{talk.id}.state.saving"
    saving = threading.Thread(target=_save, args=(server, talk), daemon=True)
    saving.start()
    end = time.monotonic() + PATIENCE
    while not half.exists() and saving.is_alive() and time.monotonic() < end:
        pass
    server.kill()
    saving.join(PATIENCE)
    return half.exists()


def _save(server: Process, talk: Talk) -> None:
    try:
        server.post(f"{talk.path}/save", None)
    # The server dies under it.
    except httpx.TransportError:
        return


@pytest.mark.slow
def test_a_server_killed_while_it_saves_leaves_the_earlier_state(checkpoint: Path, tmp_path: Path) -> None:
    hit, id, saved = False, "", 0
    for number in range(TRIES):
        with started(checkpoint, tmp_path) as server:
            talk = Talk.begin(server) if not id else Talk(server, id)
            if not id:
                id = talk.id
                talk.say(QUESTION)
                saved = talk.post("save")["saved_tokens"]
            before = (tmp_path / "states" / f"{id}.state").read_bytes()
            talk.say(f"and of {number} and 12?")
            said = talk.contents()
            hit = killed_while_saving(server, talk, tmp_path)
        if hit:
            break
        with started(checkpoint, tmp_path) as server:
            saved = Talk(server, id).post("load")["saved_tokens"]
    assert hit, "no kill came between the first byte and the last"
    assert (tmp_path / "states" / f"{id}.state").read_bytes() == before
    with started(checkpoint, tmp_path) as server:
        talk = Talk(server, id)
        assert talk.contents() == said and talk.get()["saved_tokens"] == saved
        again = talk.say("add 12 and 34")
        assert again.usage["cached_tokens"] == saved and not again.of("notice")
        assert sorted(file.name for file in (tmp_path / "states").iterdir()) == [f"{id}.state"]


@pytest.mark.slow
def test_a_server_killed_while_it_answers_keeps_all_that_was_said(checkpoint: Path, tmp_path: Path) -> None:
    with started(checkpoint, tmp_path) as server:
        talk = Talk.begin(server)
        talk.say(QUESTION)
        said = talk.contents()
        with talk.asking("and?", max_tokens=5000) as events:
            for _ in range(9):
                next(events)
            server.kill()
            with pytest.raises(httpx.TransportError):
                list(events)
    with started(checkpoint, tmp_path) as server:
        talk = Talk(server, talk.id)
        assert talk.contents() == [*said, ("user", "and?")] and not talk.get()["answering"]
        assert talk.say(None).finish["turn"] == 3


@pytest.mark.slow
def test_a_server_that_is_told_to_stop_goes_on_where_it_was(checkpoint: Path, tmp_path: Path) -> None:
    with started(checkpoint, tmp_path) as server:
        talk = Talk.begin(server)
        usage = talk.say(QUESTION).usage
        server.child.send_signal(signal.SIGTERM)
        server.child.wait(PATIENCE)
    with started(checkpoint, tmp_path) as server:
        cached = Talk(server, talk.id).say("and?").usage["cached_tokens"]
        assert cached == usage["prompt_tokens"] + usage["completion_tokens"] - 1


@pytest.mark.slow
def test_a_second_server_on_one_directory_is_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    with started(checkpoint, tmp_path) as server:
        second = subprocess.run(command(checkpoint, tmp_path), capture_output=True, text=True, timeout=PATIENCE)
        assert second.returncode != 0 and not second.stdout
        # A line about the step that is compiled once for a processor may come before.
        *before, line = second.stderr.splitlines()
        assert f"another server (process {server.child.pid}) keeps its sessions here" in line
        assert not any(line.startswith("engine:") for line in before), "nothing is loaded for that"
        assert "Traceback" not in second.stderr
        server.kill()
    # A lock dies with its holder.
    with started(checkpoint, tmp_path) as server:
        assert os.path.exists(tmp_path / "lock") and httpx.get(f"{server.url}/v1/sessions").json()["data"] == []
