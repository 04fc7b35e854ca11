"""Answers as HTML: what is rendered, what no text can bring in, and what a hostile one costs."""

from __future__ import annotations

import asyncio
import re
import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbos.serve.page.formulas import ELEMENTS, mathml
from turbos.serve.page.render import TAGS, render_markdown, sanitised
from turbos.serve.page.worker import LONGEST_TEXT, Renderer, plain


class Elements(HTMLParser):
    """Collects elements with their attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.found]


def harmless(html: str) -> bool:
    """Whether a browser finds nothing in it that runs, loads or leads anywhere but to a web page or a mail."""
    for tag, attributes in Elements(html).found:
        if tag not in TAGS:
            return False
        for name, value in attributes.items():
            if name.startswith("on") or name in ("style", "src", "srcdoc", "id", "name"):
                return False
            if name in ("href", "xlink:href") and not re.match(r"(https?|mailto):", value or ""):
                return False
    return True


def test_markdown() -> None:
    html = render_markdown("# Head\n\nsome **bold**, ~~gone~~ and `code`\n\n- a\n- b\n\n> said\n")
    assert Elements(html).tags == ["h1", "p", "strong", "s", "code", "ul", "li", "li", "blockquote", "p"]


def test_tables_are_aligned_by_class() -> None:
    html = render_markdown("| a | b |\n|---|--:|\n| 1 | 2 |\n")
    assert html.count('class="align-right"') == 2 and "style" not in html


def test_code_is_coloured_and_named() -> None:
    html = render_markdown('```python\ndef f():\n    return "<b>"\n```\n')
    assert '<span class="k">def</span>' in html and '<div class="code-name">python</div>' in html
    assert "&lt;b&gt;" in html and "b" not in Elements(html).tags


def test_code_of_an_unknown_language_stays_text() -> None:
    html = render_markdown("```nonesuch\nx < 1\n```\n")
    assert "<code>x &lt; 1\n</code>" in html and '<div class="code-name">nonesuch</div>' in html


@pytest.mark.parametrize(
    ("text", "display"),
    [
        ("so $x^2$ it is", "inline"),
        (r"so \(x^2\) it is", "inline"),
        ("so\n\n$$\nx^2\n$$\n\nit is", "block"),
        ("so\n\n\\[\nx^2\n\\]\n\nit is", "block"),
        ("so $$x^2$$ it is", "block"),
        (r"so \[x^2\] it is", "block"),
    ],
)
def test_formulas(text: str, display: str) -> None:
    html = render_markdown(text)
    assert f'<math display="{display}" alttext="x^2">' in html and "<msup><mi>x</mi><mn>2</mn></msup>" in html


@pytest.mark.parametrize("text", ["costs $5 or $10", r"\\[x^2", r"\[x^2", r"\$x^2\$", "`$x^2$`", "    $x^2$"])
def test_what_is_no_formula(text: str) -> None:
    assert "math" not in Elements(render_markdown(text)).tags


@pytest.mark.parametrize("latex", [r"\frac{a", r"\begin{matrix} 1", "^^", r"\left(", "{" * 3000, "x" * 5000])
def test_broken_formulas_are_shown_as_written(latex: str) -> None:
    assert mathml(latex, block=False) is None
    assert latex in Elements(render_markdown(f"${latex}$")).text


@pytest.mark.parametrize(
    "latex",
    [
        r"\text{<script>alert(1)</script>}",
        r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}",
        r"\text{&#60;img src=x onerror=alert(1)&#62;}",
        r"\href{javascript:alert(1)}{x}",
        r"\color{red\" onclick=\"alert(1)}{x}",
        r"\style{position:fixed}{x}",
        r"\text{</math><script>alert(1)</script>}",
    ],
)
def test_a_formula_is_only_a_formula(latex: str) -> None:
    html = mathml(latex, block=False)
    assert html is None or set(Elements(html).tags) <= ELEMENTS
    assert harmless(render_markdown(f"${latex}$"))


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        '<a href="https://example.org" onclick="alert(1)">x</a>',
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](java\nscript:alert(1))",
        "[x](&#106;avascript:alert(1))",
        "[x](data:text/html,<script>alert(1)</script>)",
        "[x](vbscript:x)",
        "<javascript:alert(1)>",
        "![x](https://example.org/seen.png)",
        '![x](https://example.org/a.png "t\\" onload=\\"alert(1)")',
        "![<script>alert(1)</script>](x)",
        "```html\n<script>alert(1)</script>\n```",
        '```"><script>alert(1)</script>\nx\n```',
        "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
        "<svg><script>alert(1)</script></svg>",
        "x\n\n<style>*{display:none}</style>",
        "[x]: javascript:alert(1)\n\n[x]",
        "| <script>alert(1)</script> |\n|---|\n| <iframe src=//example.org></iframe> |",
        "\x00<script>\x00alert(1)</script>",
    ],
)
def test_nothing_in_a_text_runs_or_loads(text: str) -> None:
    assert harmless(render_markdown(text))


def test_the_judge_of_harm_sees_harm() -> None:
    for html in ("<script>", "<p onclick=x>", '<a href="javascript:x">', '<img src="x">', '<p style="x">'):
        assert not harmless(html)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="<>\"'/\\`$[](){}!|&;:=# \nascriptonmath", max_size=80))
def test_no_text_of_such_letters_harms(text: str) -> None:
    assert harmless(render_markdown(text))


def test_the_sanitiser_alone_holds() -> None:
    # The second wall: what no renderer makes at present.
    html = sanitised(
        '<script>x</script><p onclick="x" style="x" class="evil">a</p><span class="k evil">b</span>'
        '<a href="javascript:x">c</a><a href="/v1/sessions">d</a><iframe src="x"></iframe><form><input></form>'
    )
    assert html.startswith('<p>a</p><span class="k">b</span><a') and harmless(html)
    assert "href" not in html and set(Elements(html).tags) == {"p", "span", "a"}


def test_links_open_elsewhere_and_tell_nothing() -> None:
    (_, attributes) = Elements(render_markdown("[x](https://example.org/)")).found[1]
    assert attributes["target"] == "_blank" and attributes["rel"] == "noopener noreferrer nofollow"


def test_a_hostile_text_costs_one_child_and_a_moment() -> None:
    async def main() -> None:
        renderer = Renderer(patience=1.0)
        assert "<strong>2</strong>" in await renderer.html("**2**")
        # The reader of links looks for an end of each: minutes.
        start, text = time.monotonic(), "[" * 190_000
        assert await renderer.html(text) == plain(text)
        assert time.monotonic() - start < 15
        # The next one finds a new child.
        assert "<strong>3</strong>" in await renderer.html("**3**")
        await renderer.close()

    asyncio.run(main())


def test_who_gives_up_does_not_leave_an_answer_for_the_next() -> None:
    async def main() -> None:
        renderer = Renderer()
        await renderer.html("x")
        task = asyncio.create_task(renderer.html("[" * 20_000))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await renderer.html("*y*") == "<p><em>y</em></p>\n"
        await renderer.close()

    asyncio.run(main())


def test_a_text_beyond_all_bounds_stays_plain() -> None:
    async def main() -> str:
        return await Renderer().html("<" * (LONGEST_TEXT + 1))

    assert asyncio.run(main()) == plain("<" * (LONGEST_TEXT + 1))
