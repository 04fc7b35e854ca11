"""Plain text out of markup: reStructuredText, Perl's POD, HTML of known programs. `troff.py` has manual pages.

The inputs are pinned packages, so known templates are enough here; pages from anywhere are a matter of curation.

>>> pod_text("=head1 Why C<$x> and L<perlref/Use>?\\n\\nB<Because>.")
'Why $x and perlref?\\n\\nBecause.\\n'
>>> html_text("<h1>Two &lt; 3</h1><p>One<br>line</p><pre>a\\n  b</pre>")
'Two < 3\\n\\nOne\\nline\\n\\na\\n  b\\n'
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

from turbos.data.sources.texts import tidy

DROPPED_DIRECTIVES = frozenset(
    (
        *("toctree", "contents", "index", "raw", "image", "figure", "include", "kernel-doc", "literalinclude"),
        *("tabularcolumns", "highlight", "module", "currentmodule", "only", "sectionauthor", "moduleauthor"),
        *("testsetup", "testcleanup", "doctest", "availability", "meta", "math", "kernel-figure", "kernel-render"),
        *("kernel-include", "kernel-abi", "kernel-feat", "maintainers-include", "graphviz", "default-role"),
        *("default-domain", "rst-class", "seealso", "cssclass", "productionlist", "versionchanged", "versionadded"),
        *("deprecated", "deprecated-removed", "impl-detail"),
    )
)
"""Directives that go with their content: navigation, pictures, history."""

DESCRIBED = frozenset(
    (
        *("function", "method", "class", "data", "attribute", "exception", "module", "classmethod", "staticmethod"),
        *("describe", "decorator", "coroutinefunction", "opcode", "option", "cmdoption", "envvar", "program"),
        *("pdbcommand", "rubric", "object", "term", "macro", "type", "member", "var", "struct", "enum"),
        *("enumerator", "union", "property", "confval", "2to3fixer"),
    )
)
"""Directives whose argument is a heading of what follows; their domain (`c:`, `py:`) is left out."""

CONTACTS = re.compile(
    r"^:?(?:Original|Authors?|Maintainers?|Translators?|Copyright|Date|Version|Last[ -]updated?|Contact|Reviewers?"
    r"|E-?mail|翻译|译者|校译|校对|作者|原文|原作者|版本|日期|中文版维护者|中文版翻译者|中文版校译者)\s*[:：].*$",
    re.IGNORECASE | re.MULTILINE,
)


def rst_text(source: str) -> str:
    """Prose, headings and code of a reStructuredText file; navigation, comments and roles' marks are left out.

    >>> rst_text(".. _top:\\n\\nTitle\\n=====\\n\\nSee :func:`open` and ``x``::\\n\\n    code\\n")
    'Title\\n\\nSee open and x:\\n\\n    code\\n'
    """
    text = "\n".join(_without_directives(CONTACTS.sub("", source).expandtabs().splitlines()))
    # Borders of tables go with their lines, those of headings leave a blank one.
    text = re.sub(r"^ *(?:\+[-=+]+|[=-]{2,}(?: +[=-]{2,})+) *\n", "", text, flags=re.MULTILINE)
    text = re.sub(r"^([=*#~-]{3,})\n +(\S.*)\n\1$", r"\2", text, flags=re.MULTILINE)
    text = re.sub(r"^[-=~^\"'#*.:_+`]{3,}\s*$", "", text, flags=re.MULTILINE)
    return tidy(_without_roles(text))


def _without_roles(text: str) -> str:
    """Inline marks resolved to the words that a reader would see."""
    text = re.sub(r":(pep|rfc|issue):`(\d+)`", lambda found: f"{found[1].upper()} {found[2]}", text)
    text = re.sub(r":[\w:+.-]+:`!?~?([^`<]*?)(?:\s*<[^`]*>)?`", r"\1", text)
    # A name with an underscore behind it is a reference, unless it stands between literal marks.
    text = re.sub(r"(``.*?``)|\b([A-Za-z][\w.-]*[A-Za-z0-9])__?(?=[\s,.;:)]|$)", r"\1\2", text)
    text = re.sub(r"``([^`\n]*(?:\n[^`\n]+)?)``", r"\1", text)
    text = re.sub(r"`([^`<\n]+?)\s*<[^`>]*>`__?", r"\1", text)
    text = re.sub(r"`([^`\n]+)`_{0,2}", r"\1", text)
    text = re.sub(r"(?<![\w*])\*\*?([^\s*](?:[^*\n]*[^\s*])?)\*\*?(?![\w*])", r"\1", text)
    text = re.sub(r" ?\[#\w*\]_|(?<=\])_\b", "", text)
    text = re.sub(r"\\([*|_`<])", r"\1", text.replace("\\ ", ""))
    return re.sub(r"::$", ":", re.sub(r"^\s*::$", "", text, flags=re.MULTILINE), flags=re.MULTILINE)


def _without_directives(lines: list[str]) -> Iterator[str]:
    """Lines without directives' first lines and options, and without the blocks of those that are dropped whole."""
    dropped_below: int | None = None
    options_below: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if dropped_below is not None:
            if not line.strip() or indent > dropped_below:
                continue
            dropped_below = None
        if options_below is not None:
            if indent > options_below and line.lstrip().startswith(":"):
                continue
            options_below = None
        if not line.lstrip().startswith(".."):
            yield line
            continue
        found = re.match(r"\s*\.\. (?:\|.*?\| )?([\w:.-]+?)\s?::\s*(.*)", line)
        if found is None:
            footnote = re.match(r"\s*\.\. (\[.*)", line)
            if footnote:
                yield " " * indent + footnote[1].replace("[#", "[")
            else:
                # A comment, a target or a substitution, with what is indented below it.
                dropped_below = indent
            continue
        name, argument = found[1].split(":")[-1], found[2]
        if name in DROPPED_DIRECTIVES or argument == "toc-title":
            dropped_below = indent
            continue
        options_below = indent
        if name in DESCRIBED:
            yield " " * indent + argument
        elif name not in ("code-block", "code", "parsed-literal", "sourcecode", "table", "list-table", "flat-table"):
            yield " " * indent + (f"{name.capitalize()}: {argument}" if argument else f"{name.capitalize()}:")


POD_ENTITIES = {"lt": "<", "gt": ">", "verbar": "|", "sol": "/"}


def pod_text(source: str) -> str:
    """Text and code of a Perl documentation file (perlpod(1))."""
    paragraphs = re.split(r"\n[ \t]*\n", source.replace("\r\n", "\n"))
    kept: list[str] = []
    hidden = False
    for paragraph in paragraphs:
        if paragraph[:1] in (" ", "\t"):
            if not hidden:
                kept.append(paragraph.expandtabs())
            continue
        command = re.match(r"=(\w+)\s*(.*)", paragraph.strip(), re.DOTALL)
        if command is None:
            if not hidden:
                kept.append(_without_codes(paragraph))
        elif command[1] in ("begin", "end"):
            hidden = command[1] == "begin"
        elif command[1].startswith(("head", "item")) and not hidden:
            kept.append(_without_codes(command[2]))
    # Bullets stand alone as items, and are put before their texts.
    return tidy(re.sub(r"^([*]|\d+\.?)\n\n", r"\1 ", "\n\n".join(kept), flags=re.MULTILINE))


def _without_codes(text: str) -> str:
    """A paragraph with its formatting codes (`B<..>`, `C<< .. >>`, `L<text|page>`) resolved, innermost first."""
    text = re.sub(r"E<(\w+)>", lambda found: _held(POD_ENTITIES.get(found[1]) or _entity(found[1])), text)
    text = re.sub(r"\b([A-Z])(<<+)\s(.*?)\s>>+", lambda found: _code(found[1], _held(found[3])), text, flags=re.DOTALL)
    while (simpler := re.sub(r"\b([A-Z])<([^<>]*)>", lambda found: _code(found[1], found[2]), text)) != text:
        text = simpler
    return text.replace("\x01", "<").replace("\x02", ">")


def _entity(name: str) -> str:
    return chr(int(name, 0)) if name.isdigit() or name.startswith("0x") else html.unescape(f"&{name};")


def _held(text: str) -> str:
    """Angle brackets that are no marks, put aside until all marks are resolved."""
    return text.replace("<", "\x01").replace(">", "\x02")


def _code(letter: str, content: str) -> str:
    if letter in "XZ":
        return ""
    if letter == "L":
        words, bar, _ = content.partition("|")
        if bar or "://" in content:
            return words
        return content.split("/", 1)[0].strip('"') or content.lstrip("/").strip('"')
    return content


BLOCKS = "p|div|h[1-6]|ul|ol|dl|dt|table|blockquote|section|caption|hr|center|form|fieldset|article"
HIDDEN = re.compile(
    r"<!--.*?-->|<(script|style|head|nav|header|footer|aside|noscript|button)\b[^>]*>.*?</\1\s*>", re.DOTALL | re.I
)


def html_text(page: str) -> str:
    """Text of an HTML page or a part of one: blocks parted by blank lines, list items by `- `, `pre` as it stands."""
    page = HIDDEN.sub("", page)
    kept = []
    for number, part in enumerate(re.split(r"<pre\b[^>]*>(.*?)</pre\s*>", page, flags=re.DOTALL | re.I)):
        if number % 2:
            kept.append("\n\n" + re.sub(r"<[^>]*>", "", part).strip("\n") + "\n\n")
        else:
            kept.append(_flowing(part))
    return tidy(html.unescape("".join(kept)).replace("\u00a0", " "))


def _flowing(part: str) -> str:
    """HTML outside of `pre`: blanks count once, tags make the lines."""
    part = re.sub(r"\s+", " ", part)
    # A cell or an item that holds a paragraph reads like one that does not.
    part = re.sub(r" ?(?:</(?:p|div)> ?)+(?=</(?:td|th|li|dd)\b)", "", part, flags=re.I)
    part = re.sub(r"(<(?:td|th)\b[^>]*>) ?(?:<(?:p|div)\b[^>]*> ?)+", r"\1", part, flags=re.I)
    part = re.sub(r" ?<br\b[^>]*> ?", "\n", part, flags=re.I)
    part = re.sub(r" ?<li\b[^>]*>(?: ?<(?:p|div)\b[^>]*>)? ?", "\n- ", part, flags=re.I)
    part = re.sub(r" ?<dd\b[^>]*>(?: ?<p\b[^>]*>)? ?", "\n    ", part, flags=re.I)
    part = re.sub(r" ?</(?:td|th)\s*>(?: ?<(?:td|th)\b[^>]*>)?(?: ?<(?:p|div)\b[^>]*>)? ?", "\t", part, flags=re.I)
    part = re.sub(r" ?(?:</tr\s*>)? ?<tr\b[^>]*> ?", "\n", part, flags=re.I)
    part = re.sub(rf"\s*</?(?:{BLOCKS})\b[^>]*>\s*", "\n\n", part, flags=re.I)
    part = re.sub(r"<[^>]*>", "", part)
    part = re.sub(r"^ +| +$", "", re.sub(r"(?<=\S) {2,}", " ", part), flags=re.MULTILINE)
    return re.sub(r"\s*\n\s*\t\s*", "\t", part)
