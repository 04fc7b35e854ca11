"""The page's own files as they are sent: type, tag and a policy that lets nothing from elsewhere in.

They are read once, from the package. No build step made them.

>>> page_files()["style.css"].media_type, "unsafe" in POLICY
('text/css; charset=utf-8', False)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

INDEX = "index.html"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

POLICY = "; ".join(
    (
        "default-src 'self'",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types turbos",
    )
)
"""Scripts and styles from here alone, none inline. HTML enters the document through one policy of `dom.js`."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    # Asked for each time, and answered with a tag: an upgraded server never meets an old script.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class PageFile:
    """A file and what is said of it."""

    content: bytes
    media_type: str
    tag: str


def page_files() -> dict[str, PageFile]:
    """All files of the page that may be asked for, by name; there is no other way to a file from an address."""
    return read_files(__package__)


@cache
def read_files(package: str) -> dict[str, PageFile]:
    """The files of a package that a browser may have."""
    found = {}
    for entry in files(package).iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in MEDIA_TYPES:
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
            found[entry.name] = PageFile(content, MEDIA_TYPES[suffix], tag)
    return found


def file_response(request: Request, found: PageFile | None) -> Response:
    """A file under its policy, 304 for whoever has it, 404 where there is none."""
    if found is None:
        return Response("no such file of the page\n", 404, media_type="text/plain")
    headers = {**HEADERS, "ETag": found.tag}
    if request.headers.get("if-none-match") == found.tag:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)
