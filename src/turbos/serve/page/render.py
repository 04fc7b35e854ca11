"""Answers as HTML: Markdown, tables, code with colours and formulas, with nothing in them that could run or load.

HTML in the text stays text. Whatever the renderers make is sanitised by `nh3` after a list of elements and classes, so
that an error in one of them is no hole. Links open elsewhere and pass nothing on; images are links. It is pure: how
long a hostile text may take is `worker.py`'s matter.

>>> render_markdown("**2** is <script>alert(2)</script>").strip()
'<p><strong>2</strong> is &lt;script&gt;alert(2)&lt;/script&gt;</p>'
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.texmath import texmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES
from pygments.util import ClassNotFound

from turbos.serve.page.formulas import ATTRIBUTES, ELEMENTS, mathml

LONGEST_CODE = 50_000
"""Characters of a block of code that is coloured."""

MARKS = {"math_inline", "math_block", "math_inline_double", "math_block_eqno"}
_TAGS = "p br hr h1 h2 h3 h4 h5 h6 strong em s blockquote ul ol li pre code span div a table thead tbody tr th td"
TAGS = {*_TAGS.split(), *ELEMENTS}
COLOURS = {name for name in STANDARD_TYPES.values() if name}
ALIGNMENTS = {"align-left", "align-center", "align-right"}
CLASSES = {
    "span": COLOURS,
    "div": {"code", "code-name", "formula"},
    "code": {"tex"},
    "th": ALIGNMENTS,
    "td": ALIGNMENTS,
    "a": {"image"},
}
ATTRIBUTES_OF: dict[str, set[str]] = {"a": {"href", "title"}, "ol": {"start"}, "math": {"alttext", *ATTRIBUTES}}
ATTRIBUTES_OF |= {name: set(ATTRIBUTES) for name in ELEMENTS if name != "math"}


def render_markdown(text: str) -> str:
    """A text's Markdown as sanitised HTML."""
    return sanitised(_MARKDOWN.render(text))


def sanitised(html: str) -> str:
    """Only elements, classes and addresses from the lists, whatever came in."""
    return nh3.clean(
        html,
        tags=TAGS,
        clean_content_tags={"script", "style"},
        attributes=ATTRIBUTES_OF,
        allowed_classes=CLASSES,
        url_schemes={"http", "https", "mailto"},
        url_relative="deny",
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
        strip_comments=True,
    )


def _markdown() -> MarkdownIt:
    """CommonMark with tables, strikethrough, line breaks kept, and formulas in dollars or backslash brackets."""
    markdown = MarkdownIt("commonmark", {"html": False, "breaks": False}).enable(["table", "strikethrough"])
    markdown.use(dollarmath_plugin, allow_labels=False, allow_space=False, allow_digits=False, double_inline=True)
    markdown.use(texmath_plugin, delimiters="brackets")
    markdown.inline.ruler.before("escape", "math_in_line", _bracketed)
    rules = {"fence": _code, "code_block": _code, "image": _image, "th_open": _cell, "td_open": _cell}
    for name, rule in {**rules, **dict.fromkeys(MARKS, _formula)}.items():
        markdown.add_render_rule(name, rule)
    return markdown


def _bracketed(state: StateInline, silent: bool) -> bool:
    r"""A formula in `\[` and `\]` in the midst of a line, which the plugin reads at its beginning only."""
    if not state.src.startswith(r"\[", state.pos) or (end := state.src.find(r"\]", state.pos)) < 0:
        return False
    if not silent:
        token = state.push("math_inline_double", "math", 0)
        token.content = state.src[state.pos + 2 : end]
    state.pos = end + 2
    return True


def _formula(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: OptionsDict, environment: EnvType
) -> str:
    token = tokens[place]
    block = token.type != "math_inline"
    found = mathml(token.content, block) or f'<code class="tex">{escape(token.content)}</code>'
    return f'<div class="formula">{found}</div>\n' if token.block else found


def _code(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: OptionsDict, environment: EnvType
) -> str:
    """A block of code under the name of its language; unknown languages stay without colours."""
    token = tokens[place]
    name = (token.info.split() or [""])[0]
    title = f'<div class="code-name">{escape(name)}</div>' if name else ""
    return f'<div class="code">{title}<pre><code>{_coloured(token.content, name)}</code></pre></div>\n'


def _coloured(code: str, name: str) -> str:
    if len(code) > LONGEST_CODE or not name:
        return escape(code)
    try:
        lexer = get_lexer_by_name(name, stripnl=False)
    except ClassNotFound:
        return escape(code)
    coloured: str = highlight(code, lexer, _COLOURS)
    return coloured


def _image(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: OptionsDict, environment: EnvType
) -> str:
    """A link: loading it would tell another server that the answer was read."""
    token = tokens[place]
    address = str(token.attrGet("src") or "")
    return f'<a class="image" href="{escape(address)}">{escape(token.content or address)}</a>'


def _cell(
    renderer: RendererHTML, tokens: Sequence[Token], place: int, options: OptionsDict, environment: EnvType
) -> str:
    """Alignment as a class: the page's policy forbids style attributes."""
    token = tokens[place]
    side = str(token.attrGet("style") or "").rpartition(":")[2]
    return f'<{token.tag} class="align-{side}">' if side else f"<{token.tag}>"


_COLOURS = HtmlFormatter(nowrap=True)
_MARKDOWN = _markdown()
