"""Opening a page in this machine's browser, where there is a display to open it on.

A browser that runs in the terminal itself is none: it would take the terminal from the command that shows the page. A
person's own choice, the variable BROWSER, always counts.

>>> can_open({"DISPLAY": ":0"}, "linux"), can_open({"BROWSER": "firefox"}, "linux"), can_open({}, "linux")
(True, True, False)
"""

from __future__ import annotations

import os
import sys
import threading
import webbrowser
from collections.abc import Mapping


def can_open(variables: Mapping[str, str], platform: str) -> bool:
    """Whether a process with these variables has a display, or a browser that somebody named."""
    named = any(variables.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return named or platform in ("darwin", "win32")


def open_page(url: str) -> bool:
    """Ask the browser for a page without waiting for it; False where there is no display."""
    if not can_open(os.environ, sys.platform):
        return False
    # Some browsers return only when they are closed.
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
    return True
