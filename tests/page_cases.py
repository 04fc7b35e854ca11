"""What the tests of the page share: the whole application on a free port, and a real Chromium that watches its manners.

Not a test file. Chromium comes from the system (Debian: `apt install chromium`); where it is missing, tests that want
it are skipped. A visit fails at its end for any error of a script, any refusal of the page's policy, and any request
that goes anywhere but to the server.

    with serving_page() as server, browser() as chromium, visit(chromium, server) as page:
        ask(page, "gcd of 12 and 18?")
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

from serve_cases import PATIENCE, Server, serving, tiny_service
from turbos.serve.assembly import assemble
from turbos.serve.limits import ServeOptions
from turbos.serve.page.play import KnownFamily

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


class Served(Protocol):
    """Whatever has an address."""

    @property
    def url(self) -> str:
        """Without the last slash."""


@contextmanager
def serving_page(options: ServeOptions | None = None, known: Sequence[KnownFamily] = ()) -> Iterator[Server]:
    """A server of the whole application over a tiny model, for as long as the context lasts."""
    service = tiny_service()
    with serving(service, app=assemble(service, options or ServeOptions(), known)) as server:
        yield server


@contextmanager
def browser() -> Iterator[Browser]:
    """A Chromium without a window."""
    expect.set_options(timeout=1e3 * PATIENCE)
    with sync_playwright() as playwright:
        # Tests may run as root in a container, where Chromium's own sandbox cannot.
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def visit(
    chromium: Browser,
    server: Served,
    *,
    path: str = "/",
    width: int = 1200,
    language: str = "en-US",
    dark: bool = False,
) -> Iterator[Page]:
    """A page of the server in a profile of its own; its manners are judged at the end."""
    context = chromium.new_context(
        viewport={"width": width, "height": 800}, locale=language, color_scheme="dark" if dark else "light"
    )
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.set_default_timeout(1e3 * PATIENCE)
    faults = watched(page, server)
    try:
        page.goto(f"{server.url}{path}")
        page.locator("body.ready").wait_for()
        yield page
        assert not faults, "\n".join(faults)
    finally:
        context.close()


def watched(page: Page, server: Served) -> list[str]:
    """Faults of a page, which come as they happen."""
    faults: list[str] = []

    def look(request: Request) -> None:
        if not request.url.startswith(f"{server.url}/"):
            faults.append(f"asked {request.url}")

    page.on("request", look)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.on("console", lambda message: faults.append(message.text) if is_fault(message) else None)
    return faults


def is_fault(message: ConsoleMessage) -> bool:
    """Whether the console says that something went wrong; a refusal of the server's, which it notes too, is none."""
    return message.type == "error" and "responded with a status of 4" not in message.text


def set_options(page: Page, longest: int, temperature: float = 0.0) -> None:
    """Greedy answers of at most so many tokens."""
    page.click("#options summary")
    page.fill("#temperature", str(temperature))
    page.fill("#longest", str(longest))
    page.keyboard.press("Escape")


def set_thinking(page: Page, mode: str, budget: int | None = None) -> None:
    """Turn the dial."""
    page.locator(f"#dial label:has([value={mode}])").click()
    if budget is not None:
        page.fill("#budget", str(budget))


def send(page: Page, text: str) -> None:
    """Write a message and press Enter."""
    page.fill("#question", text)
    page.press("#question", "Enter")


def wait_over(page: Page) -> None:
    """Wait until no answer comes any more, and the page has read what the server kept of it."""
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".turn.model.writing")).to_have_count(0)


def ask(page: Page, text: str) -> str:
    """Send a message and wait for its answer; returns the answer's text."""
    answers = page.locator(".turn.model").count()
    send(page, text)
    expect(page.locator(".turn.model")).to_have_count(answers + 1)
    wait_over(page)
    return page.locator(".turn.model .answer").last.inner_text()
