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


@cache
def page_files() -> dict[str, PageFile]:
    """All files that may be asked for, by name; there is no other way to a file from an address."""
    found = {}
    for entry in files(__package__).iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in MEDIA_TYPES:
            content = entry.read_bytes()
            tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
            found[entry.name] = PageFile(content, MEDIA_TYPES[suffix], tag)
    return found
