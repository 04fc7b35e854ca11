"""The live page as a process: `python -m turbos.serve.live RUN --fd N` serves on a socket that was bound before.

It ends when its stdin does, so also when whoever started it is killed. It steps back for the training beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

import uvicorn

from turbos.serve.live.app import live_app

NICENESS = 5


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(prog="python -m turbos.serve.live", allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--fd", type=int, required=True, metavar="N", help="descriptor of a bound socket")
    args = parser.parse_args()
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    config = uvicorn.Config(
        live_app(args.run_dir), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        server.should_exit = True

    threading.Thread(target=wait_for_end, daemon=True).start()
    server.run(sockets=[socket.socket(fileno=args.fd)])


if __name__ == "__main__":
    main()
