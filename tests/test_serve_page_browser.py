"""The page in a real Chromium, over a real server with a tiny model: what one can do there, what must not happen."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from page_cases import ask, browser, needs_chromium, send, serving_page, set_options, set_thinking, visit, wait_over
from serve_cases import Server
from tiny import tiny_tokenizer
from turbos.common.records import Finish
from turbos.serve.limits import ServeOptions
from turbos.serve.sessions.directory import Directory
from turbos.serve.sessions.records import Turn
from turbos.serve.sessions.store import Store
from turbos.text.messages import Message

pytestmark = needs_chromium

QUESTION = "gcd of 12 and 18?"
HOSTILE = """
<script>window.ran = 1</script> <img src=x onerror="window.ran = 1"> [x](javascript:window.ran=1)

$\\text{<script>window.ran = 1</script>}$

```html
<script>window.ran = 1</script>
```
"""


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


def turns(page: Page) -> list[str]:
    """What the turns on the page say, without their buttons."""
    return [text.strip() for text in page.locator(".turn :is(.words, .answer)").all_inner_texts()]


def session_of(page: Page) -> str:
    """The id of the conversation that is open."""
    return page.url.rpartition("#")[2]


def kept(page: Page) -> list[dict[str, Any]]:
    """The turns that the server has of it."""
    turns: list[dict[str, Any]] = page.request.get(page.url.replace("#", "v1/sessions/")).json()["turns"]
    return turns


def kept_before(path: Path, *messages: Message, title: str = "") -> str:
    """A session that an earlier server kept; returns its id."""
    directory = Directory.open(path)
    store = Store(directory.index, tiny_tokenizer())
    session = store.create(title)
    for number, message in enumerate(messages):
        finish: Finish | None = "stop" if message.role == "assistant" else None
        store.add(session.id, Turn(message, created=float(number), finish=finish))
    store.close()
    directory.close()
    return session.id


# Talking


def test_a_message_is_sent_and_answered(page: Page) -> None:
    expect(page.locator("#welcome")).to_be_visible()
    set_options(page, longest=24)
    answer = ask(page, QUESTION)
    assert answer.strip() and turns(page)[0] == QUESTION
    expect(page.locator("#welcome")).to_be_hidden()
    expect(page.locator("#sessions .title")).to_contain_text([QUESTION])
    assert re.fullmatch(
        r"read \d+ new of \d+ tokens · wrote \d+ at [\d.]+ tokens/s · state [\d.]+ kB", page.inner_text("#gauge")
    )


def test_an_answer_comes_piece_by_piece(page: Page) -> None:
    set_options(page, longest=300)
    send(page, QUESTION)
    answer = page.locator(".turn.model.writing .answer")
    expect(answer).not_to_have_text("")
    lengths = set()
    while page.locator(".turn.model.writing").count():
        lengths.add(len(page.locator(".turn.model .answer").inner_text()))
        time.sleep(0.02)
    assert len(lengths) > 3
    wait_over(page)


@pytest.mark.slow
def test_shift_enter_begins_a_line(page: Page) -> None:
    set_options(page, longest=4)
    page.fill("#question", "gcd of 12")
    page.press("#question", "Shift+Enter")
    page.type("#question", "and 18?")
    assert page.input_value("#question") == "gcd of 12\nand 18?"
    assert page.locator(".turn").count() == 0


@pytest.mark.slow
def test_an_empty_message_is_not_sent(page: Page) -> None:
    page.press("#question", "Enter")
    expect(page.locator("#trouble")).to_have_text("Write something first.")
    assert page.locator(".turn").count() == 0


def test_thinking_is_folded_under_its_count(page: Page) -> None:
    set_options(page, longest=60)
    set_thinking(page, "budget", 12)
    ask(page, QUESTION)
    thinking = page.locator(".thinking")
    expect(thinking.locator("summary")).to_have_text(f"Thought for {kept(page)[1]['thinking_tokens']} tokens")
    assert 8 < kept(page)[1]["thinking_tokens"] <= 12
    expect(thinking.locator(".thought")).to_be_hidden()
    thinking.locator("summary").press("Enter")
    expect(thinking.locator(".thought")).to_be_visible()
    assert thinking.locator(".thought").inner_text().strip()


@pytest.mark.slow
def test_the_dial_decides_on_thinking(page: Page) -> None:
    set_options(page, longest=16)
    set_thinking(page, "off")
    ask(page, QUESTION)
    expect(page.locator(".thinking")).to_be_hidden()
    set_thinking(page, "on")
    ask(page, QUESTION)
    expect(page.locator(".thinking").last.locator("summary")).to_have_text(re.compile(r"Thought for \d+ tokens"))


@pytest.mark.parametrize("how", ["button", "key"])
def test_an_answer_is_stopped_and_kept(page: Page, how: str) -> None:
    set_options(page, longest=900)
    send(page, QUESTION)
    expect(page.locator(".turn.model.writing .answer")).not_to_have_text("")
    if how == "button":
        page.click("#stop")
    else:
        page.keyboard.press("Escape")
    wait_over(page)
    expect(page.locator(".turn.model .note")).to_have_text("stopped")
    said = turns(page)
    page.reload()
    expect(page.locator(".turn.model .note")).to_have_text("stopped")
    assert turns(page) == said and len(said[1]) < 2000


# Going back and aside


def test_a_message_is_edited_in_a_fork(page: Page) -> None:
    set_options(page, longest=12)
    ask(page, QUESTION)
    ask(page, "and 24?")
    before, said = session_of(page), turns(page)
    page.locator(".turn.user").last.hover()
    page.locator(".turn.user .edit").last.click()
    page.fill(".turn .edit textarea", "and 34?")
    page.press(".turn .edit textarea", "Enter")
    expect(page.locator(".turn.user .words").last).to_have_text("and 34?")
    wait_over(page)
    assert session_of(page) != before
    assert turns(page)[:2] == said[:2] and len(turns(page)) == 4
    expect(page.locator("#sessions .session").first.locator(".fork")).to_be_visible()
    # The first one is as it was.
    page.locator(f'#sessions a[href="#{before}"]').click()
    expect(page.locator(".turn.user .words").last).to_have_text("and 24?")
    assert turns(page) == said


@pytest.mark.slow
def test_editing_is_given_up(page: Page) -> None:
    set_options(page, longest=4)
    ask(page, QUESTION)
    before, said = session_of(page), turns(page)
    page.fill("#question", "")
    page.press("#question", "ArrowUp")
    page.fill(".turn .edit textarea", "other")
    page.press(".turn .edit textarea", "Escape")
    assert turns(page) == said and session_of(page) == before


def test_the_last_question_is_taken_back(page: Page) -> None:
    set_options(page, longest=8)
    ask(page, QUESTION)
    said = turns(page)
    ask(page, "and 24?")
    page.locator(".turn.model .undo").click()
    expect(page.locator(".turn")).to_have_count(2)
    assert turns(page) == said and page.input_value("#question") == "and 24?"
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    assert turns(page) == said


@pytest.mark.slow
def test_another_answer_is_asked_for(page: Page) -> None:
    set_options(page, longest=8, temperature=1.5)
    ask(page, QUESTION)
    page.locator(".turn.model .retry").click()
    expect(page.locator(".turn.user .words")).to_have_text(QUESTION)
    wait_over(page)
    assert len(turns(page)) == 2


@pytest.mark.slow
def test_an_answer_is_copied(page: Page) -> None:
    set_options(page, longest=12)
    ask(page, QUESTION)
    page.locator(".turn.model .copy").click()
    expect(page.locator(".turn.model .copy.done")).to_be_visible()
    assert page.evaluate("() => navigator.clipboard.readText()") == kept(page)[1]["content"]


# Conversations


def test_a_reload_shows_the_same(page: Page) -> None:
    set_options(page, longest=12)
    set_thinking(page, "budget", 4)
    ask(page, QUESTION)
    said, url = turns(page), page.url
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    assert turns(page) == said and page.url == url
    expect(page.locator(".thinking summary")).to_have_text(f"Thought for {kept(page)[1]['thinking_tokens']} tokens")


@pytest.mark.slow
def test_conversations_are_renamed_saved_and_deleted(page: Page) -> None:
    set_options(page, longest=8)
    ask(page, QUESTION)
    here = page.locator(f'#sessions li:has(a[href="#{session_of(page)}"])')
    here.locator("summary").click()
    here.locator(".rename").click()
    page.fill("#sessions input", "Divisors <b>")
    page.press("#sessions input", "Enter")
    expect(here.locator(".title")).to_have_text("Divisors <b>")
    here.locator("summary").click()
    here.locator(".save").click()
    expect(here.locator(".dot")).to_have_count(1)
    page.once("dialog", lambda dialog: dialog.accept())
    here.locator("summary").click()
    here.locator(".remove").click()
    expect(here).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()


@pytest.mark.slow
def test_a_conversation_that_is_gone_is_told(chromium: Browser, server: Server) -> None:
    with visit(chromium, server) as page:
        page.evaluate("() => { location.hash = '0'.repeat(32) }")
        expect(page.locator("#trouble")).to_have_text("This conversation is not on the server any more.")
        expect(page.locator("#welcome")).to_be_visible()


def test_a_saved_conversation_goes_on_after_a_restart(chromium: Browser, tmp_path: Path) -> None:
    options = ServeOptions(sessions=tmp_path / "sessions")
    with serving_page(options) as server, visit(chromium, server) as page:
        set_options(page, longest=40)
        ask(page, f"{QUESTION} {'add 12 and 34 ' * 20}")
        said, id = turns(page), session_of(page)
    with serving_page(options) as server, visit(chromium, server, path=f"/#{id}") as page:
        expect(page.locator(".turn")).to_have_count(2)
        assert turns(page) == said
        set_options(page, longest=8)
        ask(page, "6")
        found = re.match(r"read (\d+) new of (\d+) tokens", page.inner_text("#gauge"))
        assert found is not None and int(found[1]) < 16 < 150 < int(found[2])


def test_a_question_that_was_never_answered_can_be(chromium: Browser, tmp_path: Path) -> None:
    id = kept_before(tmp_path, Message("user", QUESTION))
    with serving_page(ServeOptions(sessions=tmp_path)) as server, visit(chromium, server, path=f"/#{id}") as page:
        set_options(page, longest=8)
        page.get_by_role("button", name="Answer this").click()
        expect(page.locator(".turn.model")).to_have_count(1)
        wait_over(page)
        assert [turn["role"] for turn in kept(page)] == ["user", "assistant"]
        assert turns(page)[0] == QUESTION and len(turns(page)) == 2


# What must not happen


def test_a_script_in_a_message_does_not_run(page: Page) -> None:
    set_options(page, longest=4)
    ask(page, HOSTILE)
    assert page.locator(".turn.user .words").inner_text().strip() == HOSTILE.strip()
    page.reload()
    expect(page.locator(".turn")).to_have_count(2)
    assert page.evaluate("() => window.ran") is None


def test_a_script_in_an_answer_does_not_run(chromium: Browser, tmp_path: Path) -> None:
    # A tiny model will not write it; a directory of sessions has it from elsewhere.
    answer = Message("assistant", HOSTILE, thinking=HOSTILE)
    id = kept_before(tmp_path, Message("user", "go on"), answer, title="<img src=x onerror='window.ran = 1'>")
    with serving_page(ServeOptions(sessions=tmp_path)) as server, visit(chromium, server, path=f"/#{id}") as page:
        expect(page.locator(".answer .code")).to_be_visible()
        page.locator(".thinking summary").click()
        expect(page.locator(".thought")).to_contain_text("<script>window.ran = 1</script>")
        assert page.locator(".answer math").count() == 1
        assert page.locator("#turns :is(script, img, iframe, object, [onerror], [style])").count() == 0
        assert page.locator('#turns a[href^="javascript"]').count() == 0
        assert page.evaluate("() => window.ran") is None


def test_html_that_slipped_through_would_not_run_either(chromium: Browser, server: Server) -> None:
    page = chromium.new_page()
    page.goto(f"{server.url}/")
    page.locator("body.ready").wait_for()
    # No script can put HTML into the page past its one policy, and what that policy lets in runs nothing inline.
    script = "document.body.innerHTML = '<img src=x onerror=window.ran=1>'"
    assert page.evaluate(f"() => {{ try {{ {script} }} catch (error) {{ return error.name }} }}") == "TypeError"
    page.evaluate(
        """async () => {
            const { setHtml } = await import("/page/dom.js");
            const html = "<img src=x onerror='window.ran = 1'><a href='javascript:ran=1'>x</a>";
            setHtml(document.querySelector("#turns"), html);
        }"""
    )
    page.click("#turns a")
    page.wait_for_timeout(200)
    assert page.evaluate("() => window.ran") is None
    page.close()


def test_a_refusal_is_told_in_the_servers_words(chromium: Browser) -> None:
    with serving_page(ServeOptions(max_prompt_tokens=40)) as server, visit(chromium, server) as page:
        send(page, "add 12 and 34 " * 40)
        expect(page.locator("#trouble")).to_contain_text("this server takes at most 40")
        # The words are not lost.
        assert page.input_value("#question").startswith("add 12 and 34")


@pytest.mark.slow
def test_a_key_is_asked_for_once(chromium: Browser) -> None:
    with serving_page(ServeOptions(api_keys=("a-good-key",))) as server:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(f"{server.url}/")
        page.fill("#key", "a-good-key")
        page.press("#key", "Enter")
        expect(page.locator("body.ready")).to_be_attached()
        page.reload()
        expect(page.locator("body.ready")).to_be_attached()
        expect(page.locator("#key-dialog")).to_be_hidden()
        context.close()
