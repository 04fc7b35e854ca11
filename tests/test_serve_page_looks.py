"""The page's looks in a real Chromium: widths, colours, languages, keys, a screen reader, and its other two tabs."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect

from page_cases import ask, browser, needs_chromium, serving_page, set_options, visit, wait_over
from serve_cases import Server
from turbos.serve.page.play import KnownFamily

pytestmark = needs_chromium

QUESTION = "gcd of 12 and 18?"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving_page() as running:
        yield running


@pytest.fixture
def page(chromium: Browser, server: Server) -> Iterator[Page]:
    with visit(chromium, server) as found:
        yield found


def test_a_phone_shows_one_column(chromium: Browser, server: Server) -> None:
    with visit(chromium, server, width=390) as page:
        expect(page.locator("#side")).not_to_be_in_viewport()
        set_options(page, longest=60)
        ask(page, QUESTION)
        assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
        page.click("#open-side")
        expect(page.locator("#new")).to_be_in_viewport()
        expect(page.locator("#open-side")).to_have_attribute("aria-expanded", "true")
        page.keyboard.press("Escape")
        expect(page.locator("#side")).not_to_be_in_viewport()


def background(page: Page) -> str:
    colour: str = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    return colour


@pytest.mark.slow
def test_light_and_dark(chromium: Browser, server: Server) -> None:
    with visit(chromium, server) as page:
        light = background(page)
        page.click("#theme")  # light, then dark
        assert background(page) == light
        page.click("#theme")
        dark = background(page)
        assert dark != light
        page.reload()
        page.locator("body.ready").wait_for()
        assert background(page) == dark
    with visit(chromium, server, dark=True) as page:
        assert background(page) == dark


@pytest.mark.slow
def test_chinese(chromium: Browser, server: Server) -> None:
    with visit(chromium, server, language="zh-CN") as page:
        assert page.get_attribute("html", "lang") == "zh-CN"
        expect(page.locator("#new")).to_have_text("新对话")
        assert page.get_attribute("#question", "placeholder") == "输入消息"
        page.click("#language")
        expect(page.locator("#new")).to_have_text("New chat")
        page.reload()
        page.locator("body.ready").wait_for()
        expect(page.locator("#new")).to_have_text("New chat")


@pytest.mark.slow
def test_all_can_be_done_with_keys(page: Page) -> None:
    set_options(page, longest=4)
    page.keyboard.press("Control+k")
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    wait_over(page)
    page.focus("#tab-chat")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#view-meter")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#view-chat")).to_be_visible()
    # Whatever Tab reaches is seen to be reached, and has a name.
    page.focus("#new")
    for _ in range(12):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            """() => {
                const found = document.activeElement;
                if (found === document.body) return true;
                const label = found.getAttribute("aria-label") || found.labels?.[0]?.textContent;
                return Boolean((label || found.textContent.trim()) && found.offsetParent !== null);
            }"""
        )
        assert seen


@pytest.mark.slow
def test_a_screen_reader_hears_the_answer(page: Page) -> None:
    set_options(page, longest=16)
    answer = ask(page, QUESTION)
    assert page.get_attribute("#announce", "role") == "status"
    expect(page.locator("#announce")).to_contain_text(f"Answer: {answer.strip()[:5]}")
    assert page.get_attribute("#turns", "aria-busy") == "false"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, summary, input, select, textarea, a")].filter((one) =>
            !(one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.[0]?.textContent.trim())
        ).map((one) => one.outerHTML)"""
    )
    assert unnamed == []


# The other tabs


def test_a_demo_model_plays_instead(chromium: Browser) -> None:
    known = (KnownFamily("addition", 3, (1,)), KnownFamily("gcd", 3, (0,)))
    with serving_page(known=known) as server, visit(chromium, server) as page:
        expect(page.locator("#tab-chat")).to_be_hidden()
        expect(page.locator("#only")).to_contain_text("it knows only these 2 families of problems")
        expect(page.locator(".verdict:not(:empty)")).to_have_count(3)
        page.select_option("#family", "gcd")
        expect(page.locator("#level")).to_have_value("0")
        expect(page.locator("#problem")).to_contain_text("gcd of")
        expect(page.locator(".verdict:not(:empty)")).to_have_count(3)
        texts = page.locator(".hand").all_inner_texts()
        assert [text.partition("\n")[0] for text in texts] == ["It decides", "Thinking on", "Thinking off"]
        assert all(re.search(r"\d+ thinking \+ \d+ answer tokens", text) for text in texts)
        expect(page.locator(".tally").first).to_have_text(re.compile(r"\d of 1 right"))
        page.click("#deal")
        expect(page.locator(".tally").first).to_have_text(re.compile(r"\d of 2 right"))


@pytest.mark.slow
def test_the_meter(page: Page) -> None:
    page.click("#tab-meter")
    page.click("#measure")
    expect(page.locator("#meter-trouble")).to_have_text("Write something first.")
    page.fill("#text", "gcd of 12 and 18? " * 500)
    page.click("#measure")
    expect(page.locator(".readings tbody tr")).to_have_count(2)
    expect(page.locator(".chart")).to_be_visible()
    memory, one_more = page.locator(".readings tbody tr").all_inner_texts()
    assert re.search(r"[\d.]+ kB.*[\d.]+ (kB|MB).*times less memory", memory, re.DOTALL)
    assert re.search(r"[\d.]+ ms.*[\d.]+ ms", one_more, re.DOTALL)
