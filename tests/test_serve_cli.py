"""`turbos serve` as a process of its own: its address, its signals, and what it refuses before it loads anything."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest

from serve_cases import PATIENCE, free_port, tiny_checkpoint
from turbos.cli.main import main

ASK = [{"role": "user", "content": "gcd of 12 and 18?"}]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoints"))


@contextmanager
def process(checkpoint: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A server's address and its process, which is ended if it still runs."""
    words = [sys.executable, "-m", "turbos", "serve", str(checkpoint), "--port", "0", "--memory", "64MiB"]
    words += ["--path", "torch", *options]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert running.stdout is not None
        line = running.stdout.readline()
        found = re.search(r"http://\S+(?=/ is the page)", line)
        assert found, (line, running.stderr.read() if running.stderr is not None else "")
        wait_for(found[0])
        yield found[0], running
    finally:
        running.kill()
        running.wait()


def wait_for(url: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.05)
    pytest.fail("the server does not answer")


def test_a_served_checkpoint_answers_and_stops_in_order(checkpoint: Path) -> None:
    with process(checkpoint, "--name", "small") as (url, running):
        assert url.startswith("http://127.0.0.1:")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["small"]
        stream = client.chat.completions.create(
            model="small", messages=ASK, max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        running.send_signal(signal.SIGTERM)
        # The open answer ends as it should; nobody new is let in.
        assert [part.choices[0].finish_reason for part in stream][-1] == "length"
        running.wait(PATIENCE)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/health")
        lines = [json.loads(line) for line in (running.stderr.read() if running.stderr else "").splitlines()[2:]]
    requests = [line for line in lines if line["event"] == "request"]
    assert [line["path"] for line in requests][-1] == "/v1/chat/completions"
    assert requests[-1]["completion_tokens"] == 200 and not any("gcd" in json.dumps(line) for line in lines)
    assert not any("trace" in line for line in lines)


def test_a_second_interrupt_does_not_wait(checkpoint: Path) -> None:
    with process(checkpoint, "--quiet") as (url, running):
        body = {"messages": ASK, "max_tokens": 8000, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=PATIENCE) as reply:
            next(reply.iter_bytes())
            running.send_signal(signal.SIGINT)
            time.sleep(0.3)
            running.send_signal(signal.SIGINT)
            running.wait(PATIENCE)


def test_keys_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("correct-horse\n")
    with process(checkpoint, "--api-key-file", str(keys)) as (url, _):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="correct-horse")
        assert len(list(client.models.list())) == 1
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 403


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["serve", "no/such/checkpoint", "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "99999999"], "from 0 to 65535"),
        (["--host", "not a host"], "cannot listen"),
        (["--api-key-file", "no-such-file"], "cannot be read"),
        (["--max-body", "many"], "no size of memory"),
        (["--max-open", "0"], "max_open must be at least 1"),
        (["--max-running", "0"], "max_running must be at least 1"),
        (["--grace", "-1"], "grace_seconds"),
        ([], "no/such/checkpoint"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    port = [] if "--port" in words else ["--port", str(free_port())]
    assert main(["serve", "no/such/checkpoint", *port, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1, error


def test_open_asks_the_browser_for_the_page(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The browser is a script that notes which address it was given and what it found there."""
    program, seen = tmp_path / "browser", tmp_path / "seen"
    get = "import sys, urllib.request; print(sys.argv[1], urllib.request.urlopen(sys.argv[1]).status)"
    program.write_text(f'#!/bin/sh\n{sys.executable} -c "{get}" "$1" > {seen}.part && mv {seen}.part {seen}\n')
    program.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{program} %s")
    with process(checkpoint, "--open") as (url, _):
        end = time.monotonic() + PATIENCE
        while not seen.exists():
            assert time.monotonic() < end, "no browser was asked"
            time.sleep(0.05)
        assert seen.read_text() == f"{url}/ 200\n"


def test_open_without_a_display_says_so(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with process(checkpoint, "--open", "--quiet") as (url, running):
        assert httpx.get(f"{url}/").status_code == 200
        assert running.stderr is not None and "no display here" in running.stderr.readline()
