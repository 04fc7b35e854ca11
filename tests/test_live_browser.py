"""The live page in a real Chromium, over runs of tiny demos: while they train, after, when they go."""

from __future__ import annotations

import json
import os
import re
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
import torch
import uvicorn
from playwright.sync_api import Browser, Page, expect

from demo_cases import write_tiny_demo
from page_cases import browser, needs_chromium, visit
from serve_cases import PATIENCE, free_port
from turbos.cli.main import main
from turbos.common.metrics import MetricsLog
from turbos.serve.live.app import live_app
from turbos.serve.live.plan import Plan, PlannedStage, write_plan

pytestmark = needs_chromium


@dataclass(frozen=True)
class Live:
    """A live page's address, and what stops its server."""

    url: str
    server: uvicorn.Server


@contextmanager
def live(run_dir: Path) -> Iterator[Live]:
    """The live page of a directory on a free port."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(live_app(run_dir), port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + PATIENCE
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server did not start"
        time.sleep(0.01)
    try:
        yield Live(f"http://127.0.0.1:{port}", server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny demo that is done."""
    directory = tmp_path_factory.mktemp("demo")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        write_tiny_demo(directory)
        assert main(["demo", "--recipe", "demo.yaml", "--run", "run", "--threads", "1", "--json"]) == 0
    torch.set_num_threads(threads)
    return directory / "run"


def is_in_width(page: Page) -> bool:
    """Whether nothing sticks out at the side."""
    fits: bool = page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
    return fits


def test_a_finished_run_is_shown_whole(chromium: Browser, finished: Path) -> None:
    with live(finished) as server, visit(chromium, server) as page:
        expect(page.locator("#status")).to_have_text(re.compile(r"^Done in .+\.$"))
        expect(page.locator("#plan li.done")).to_have_count(9)
        expect(page.locator("#curves figure svg[role=img]")).to_have_count(4)
        expect(page.locator("#thinking figure svg[role=img]")).to_have_count(2)
        expect(page.locator("#scores tbody tr")).to_have_count(4)
        assert re.search(r"\d+ ± \d+", page.locator("#scores td.figure").first.inner_text())
        expect(page.locator("#samples .sample")).to_have_count(2)
        expect(page.locator("#samples .verdict")).to_have_text(["Wrong"] * 4)
        expect(page.locator("#ready")).to_be_hidden()
        # The points of a curve are the log's.
        steps = [json.loads(line) for line in (finished / "pretrain" / "metrics.jsonl").read_text().splitlines()]
        last = next(record["loss"] for record in reversed(steps) if "loss" in record)
        assert float(page.locator("#curves .legend").first.inner_text().split()[-1]) == pytest.approx(last, rel=1e-2)
        # Another stage's answers, by keys.
        page.focus("#samples-of input[value=rl]")
        page.keyboard.press("ArrowLeft")
        expect(page.locator("#samples-of input[value=sft]")).to_be_checked()
        expect(page.locator("#samples .sample")).to_have_count(2)
        page.click("#language")
        expect(page.locator("#curves-title")).to_have_text("训练")
        expect(page.locator("#samples-of input[value=sft]")).to_be_checked()


def test_a_phone_in_the_dark_and_in_chinese(chromium: Browser, finished: Path) -> None:
    with live(finished) as server:
        with visit(chromium, server, width=390, language="zh-CN", dark=True) as page:
            expect(page.locator("#status")).to_have_text(re.compile("完成"))
            dark = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            assert is_in_width(page)
        with visit(chromium, server, width=390) as page:
            assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != dark
            unnamed = page.evaluate(
                """() => [
                    ...document.querySelectorAll("button, input, a, progress:not([aria-hidden]), [role=img]")
                ].filter((one) =>
                    !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.[0]?.textContent.trim())
                ).map((one) => one.outerHTML)"""
            )
            assert unnamed == [] and is_in_width(page)


def test_the_page_follows_a_run_by_itself(chromium: Browser, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with live(run_dir) as server:
        with visit(chromium, server) as page:
            expect(page.locator("#status")).to_have_text("Nothing has begun yet.")
            expect(page.locator("#curves .none")).to_have_count(4)
            log = MetricsLog(run_dir / "pretrain" / "metrics.jsonl")
            (run_dir / "pretrain" / "recipe.yaml").write_text("train:\n  steps: 4\n")
            write_plan(Plan(0, (PlannedStage("pretrain", 1.0, "running", 1e9), PlannedStage("sft", 1.0))), run_dir)
            log.log(1, {"loss": 3.0})
            expect(page.locator("#plan li.running small")).to_have_text("step 1 of 4")
            expect(page.locator("#curves .legend")).to_have_text("training 3")
            log.log(2, {"loss": 2.0})
            log.close()
            write_plan(Plan(0, (PlannedStage("pretrain", 1.0, "done"), PlannedStage("sft", 1.0, "running"))), run_dir)
            expect(page.locator("#announce")).to_have_text("Pretraining is done")
            expect(page.locator("#curves .legend")).to_have_text("training 2")
        # A page whose server has gone says so. The browser notes that, too: a visit would take it for a fault.
        page = chromium.new_page()
        page.goto(f"{server.url}/live/")
        expect(page.locator("#curves .legend")).to_have_text("training 2")
        server.server.should_exit = True
        expect(page.locator("#trouble")).to_contain_text("does not answer any more")
        expect(page.locator("#curves .legend")).to_have_text("training 2")
        page.close()


def address_in(line: str) -> str:
    """The address that a line tells."""
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found is not None, line
    return found[0]


def next_line(running: subprocess.Popen[str], word: str) -> str:
    """The first line of stderr that has a word in it."""
    assert running.stderr is not None
    for line in running.stderr:
        if word in line:
            return line
    pytest.fail(f"the demo ended without {word!r}")


@pytest.mark.slow
def test_a_demo_shows_itself_and_then_serves_its_model(chromium: Browser, tmp_path: Path) -> None:
    write_tiny_demo(tmp_path)
    words = [sys.executable, "-m", "turbos", "demo", "--recipe", "demo.yaml", "--run", "run", "--threads", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(words, cwd=tmp_path, env={**os.environ, "SERVE": "1"}, **pipes)  # type: ignore[call-overload]
    try:
        url = address_in(next_line(running, "Live page"))
        page = chromium.new_page()
        page.goto(url)
        expect(page.locator("#plan li.running")).to_have_count(1)
        assert address_in(next_line(running, "Play with the model")) == url
        # The page that was open all the time finds the model.
        expect(page.locator("#status")).to_have_text(re.compile("^Done"))
        page.click("#ready a")
        expect(page.locator("#view-play")).to_be_visible()
        expect(page.locator(".verdict:not(:empty)")).to_have_count(3)
        assert httpx.get(f"{url}/live/api/run").json()["model"]
        assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
        page.close()
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE) == 0
        assert running.stdout is not None and "Held-out accuracy" in running.stdout.read()
    finally:
        running.kill()
        running.wait()


@pytest.mark.slow
def test_a_demo_in_a_pipe_ends_and_a_finished_one_at_once(tmp_path: Path) -> None:
    write_tiny_demo(tmp_path)
    words = [sys.executable, "-m", "turbos", "demo", "--recipe", "demo.yaml", "--run", "run", "--threads", "1"]
    variables = {name: value for name, value in os.environ.items() if name != "SERVE"}
    for is_first in (True, False):
        done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=2 * PATIENCE)
        assert done.returncode == 0 and "Held-out accuracy" in done.stdout
        assert ("Live page" in done.stderr) is is_first and "Play with" not in done.stderr
    served = subprocess.run(
        [*words, "--json"],
        cwd=tmp_path,
        env={**variables, "SERVE": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    outcome = json.loads(served.stdout)
    assert "http" not in served.stderr and sorted(outcome["thinking_rates"]) == ["pretrain", "rl", "sft"]
    assert len(outcome["thinking_rates"]["rl"]) == 6
