"""The demo's page: a process that shows the run while it trains, and at the end a server of the model it made.

Both listen on one socket, which stays open from the first to the second, so that the address in a browser stays good.
Nothing here is needed: without the packages of `turbos[serve]` the demo says so and goes on.

    listening = page_socket(None, tell)                 # None: no page
    with watched(Path("runs/demo"), listening): ...     # train
    serve_final(Path("runs/demo"), listening, tell)     # until Ctrl-C
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from turbos.cli.serve import LOCAL_NAMES, address, application, bound, missing_packages, serve_until_stopped

SERVE_VARIABLE = "SERVE"
LOOPBACK = "127.0.0.1"
MEMORY = 512 << 20
"""Bytes for a demo's model, its states and keys."""
MOST_ANSWERS = 12
SECONDS_TO_END = 5.0

Tell = Callable[[str], None]
"""Is given one line for the user to read."""


def wants_server() -> bool:
    """Whether the finished model is to be served: on a terminal, or as the variable SERVE (1 or 0) says."""
    said = os.environ.get(SERVE_VARIABLE, "")
    return sys.stdout.isatty() if said == "" else said != "0"


def page_socket(port: int | None, tell: Tell) -> socket.socket | None:
    """A listening socket of the loopback (any free port unless one is named), told of in one line; None without a page.

    UserError where a named port cannot be had.
    """
    if missing := missing_packages():
        tell(f"No live page: it needs {', '.join(missing)} (pip install 'turbos[serve]'); the demo goes on without")
        return None
    listening = bound(LOOPBACK, port or 0)
    # Whoever comes before the page's process does waits for it.
    listening.listen()
    tell(f"Live page: {address(listening)}/")
    return listening


@contextlib.contextmanager
def watched(run_dir: Path, listening: socket.socket | None) -> Iterator[None]:
    """Show a run's directory on a socket, from a process of its own, for as long as the context lasts."""
    if listening is None:
        yield
        return
    descriptor = listening.fileno()
    child = subprocess.Popen(
        [sys.executable, "-m", "turbos.serve.live", str(run_dir), "--fd", str(descriptor)],
        stdin=subprocess.PIPE,  # its end is the page's end, also where this process is killed
        stdout=subprocess.DEVNULL,
        pass_fds=(descriptor,),
        start_new_session=True,  # Ctrl-C is for the training, which then saves
    )
    try:
        yield
    finally:
        end(child)


def end(child: subprocess.Popen[bytes]) -> None:
    """End the page's process; one that does not listen is killed."""
    with contextlib.suppress(OSError):
        if child.stdin is not None:
            child.stdin.close()
    child.terminate()
    try:
        child.wait(SECONDS_TO_END)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def serve_final(run_dir: Path, listening: socket.socket, tell: Tell) -> None:
    """Serve a finished demo's model with the page to play with it, and the live page beside it, until Ctrl-C."""
    from turbos.engine.config import EngineConfig
    from turbos.serve.limits import ServeOptions
    from turbos.serve.live.app import live_router
    from turbos.serve.live.records import RunReader
    from turbos.serve.log import log_to
    from turbos.serve.service import Service

    final, options = str(run_dir / "final"), ServeOptions(allowed_hosts=LOCAL_NAMES, grace_seconds=1.0)
    with contextlib.suppress(KeyboardInterrupt), log_to(sys.stderr, logging.WARNING):
        service = Service.of_checkpoint(final, EngineConfig(memory=MEMORY, max_running=MOST_ANSWERS), None)
        app = application(final, service, options)
        app.include_router(live_router(RunReader(run_dir, service.model_name)))
        where = address(listening)
        tell(f"Play with the model: {where}/ (how it was made: {where}/live/). Ctrl-C ends.")
        serve_until_stopped(app, options, listening)
