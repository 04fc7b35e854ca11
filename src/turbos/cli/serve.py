"""`turbos serve CKPT`: a model over HTTP, as OpenAI's interface, with sessions and a page to chat with it.

Only this machine reaches it unless `--host` says otherwise; whoever reaches it may ask unless `--api-key-file` names
keys. The first Ctrl-C lets open answers end, the second one does not. stdout has the address, stderr what the engine is
and a line of JSON for each request, without what was said.

    turbos serve runs/demo/final --port 8000 --open
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is the greatest common divisor of 12 and 18?"}]}'
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import ipaddress
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.cli.browser import open_page
from turbos.cli.engine_options import add_engine_options, engine_config, read_bytes
from turbos.cli.stages import use_threads
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from turbos.serve.limits import ServeOptions
    from turbos.serve.service import Service
    from turbos.serve.sessions.directory import Directory

NEEDED = ("fastapi", "uvicorn", "pydantic", "markdown_it", "mdit_py_plugins", "pygments", "latex2mathml", "nh3")
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or hub id")
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1: this machine only")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    parser.add_argument("--name", metavar="TEXT", help="what the model is called (default: the run's or hub's name)")
    parser.add_argument("--sessions", type=Path, metavar="DIR", help="keep sessions here (default: until it stops)")
    _add_access(parser.add_argument_group("access"))
    _add_limits(parser.add_argument_group("limits"))
    # A message that is edited in its middle is read again from the last of them.
    add_engine_options(parser, snapshot_every=512)


def _add_access(group: Any) -> None:
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys, one a line; requests must carry one")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that requests may call this server by (repeatable)",
    )
    group.add_argument("--log-prompts", action="store_true", help="log what is said, too")


def _add_limits(group: Any) -> None:
    group.add_argument("--max-running", type=int, default=64, metavar="N", help="answers written at once (default 64)")
    group.add_argument("--max-open", type=int, default=512, metavar="N", help="answers that run or wait (default 512)")
    group.add_argument("--max-body", default="16MiB", metavar="SIZE", help="of a request (default 16MiB)")
    group.add_argument("--max-prompt-tokens", type=int, metavar="N", help="default: what memory holds")
    group.add_argument("--max-completion-tokens", type=int, metavar="N", help="default: what memory holds")
    group.add_argument("--grace", type=float, default=30.0, metavar="SECONDS", help="for open answers, when it stops")


def run(args: argparse.Namespace) -> int:
    """Load the checkpoint and serve it until the process is told to stop."""
    if missing := missing_packages():
        raise UserError(f"turbos serve needs {', '.join(missing)}: pip install 'turbos[serve]'")
    options = _options(args)
    config = engine_config(args, max_running=args.max_running)
    use_threads(args.threads)
    from turbos.serve.log import log_to
    from turbos.serve.service import Service

    level = logging.WARNING if args.quiet else logging.INFO
    # Before the checkpoint is loaded, which takes a while: a port or a directory that is taken should not.
    with bound(args.host, args.port) as listening, _held(options.sessions) as held, log_to(sys.stderr, level):
        service = Service.of_checkpoint(args.checkpoint, config, args.name)
        if not args.quiet:
            print(*service.engine.describe(), sep="\n", file=sys.stderr)
        app = application(args.checkpoint, service, options, held)
        where = address(listening)
        print(f"{service.model_name}: {where}/ is the page, {where}/v1 the interface; Ctrl-C stops", flush=True)
        if not options.api_keys and not _is_local(args.host):
            print("whoever reaches this address may ask: --api-key-file names keys", file=sys.stderr)
        if args.open:
            _open(listening)
        serve_until_stopped(app, options, listening)
    return 0


def missing_packages() -> list[str]:
    """What has to be installed before anything can be served."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def _options(args: argparse.Namespace) -> ServeOptions:
    from turbos.serve.limits import ServeOptions, read_keys

    names = [*LOCAL_NAMES, _spelt(args.host), *args.allow_host] if _is_local(args.host) else args.allow_host
    return ServeOptions(
        api_keys=() if args.api_key_file is None else read_keys(args.api_key_file),
        max_body=read_bytes(args.max_body),
        max_prompt_tokens=args.max_prompt_tokens,
        max_completion_tokens=args.max_completion_tokens,
        max_open=args.max_open,
        grace_seconds=args.grace,
        allowed_hosts=tuple(names),
        sessions=args.sessions,
        log_prompts=args.log_prompts,
    )


@contextlib.contextmanager
def _held(sessions: Path | None) -> Iterator[Directory | None]:
    """The sessions' directory, held; None where there is none."""
    from turbos.serve.sessions.directory import Directory

    with contextlib.nullcontext() if sessions is None else contextlib.closing(Directory.open(sessions)) as held:
        yield held


def application(checkpoint: str, service: Service, options: ServeOptions, held: Directory | None = None) -> FastAPI:
    """All that is served of a service's checkpoint; the page plays where the checkpoint is a demo's.

    `held` is the sessions' directory where it is held already.
    """
    from turbos.model.hub import resolve_checkpoint
    from turbos.serve.assembly import assemble
    from turbos.serve.page.play import demo_families

    known = demo_families(resolve_checkpoint(checkpoint), service.engine.model.config)
    return assemble(service, options, known, held)


def serve_until_stopped(app: FastAPI, options: ServeOptions, listening: socket.socket) -> None:
    """Run the server on a bound socket until a signal ends it."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(options.grace_seconds)),
    )
    uvicorn.Server(config).run(sockets=[listening])


def address(listening: socket.socket) -> str:
    """A bound socket's address as a browser has it, without the last slash."""
    host, port = listening.getsockname()[:2]
    return f"http://{_spelt(host)}:{port}"


def _open(listening: socket.socket) -> None:
    """Open the page; an address that stands for all of this machine's is no place to go to."""
    # From here on the browser's request waits until the server takes it.
    listening.listen()
    host, port = listening.getsockname()[:2]
    url = f"http://127.0.0.1:{port}/" if host in ("0.0.0.0", "::") else f"{address(listening)}/"
    if not open_page(url):
        print("no display here: open the address in a browser yourself", file=sys.stderr)


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet; UserError where the address cannot be had."""
    if not 0 <= port < 1 << 16:
        raise UserError(f"cannot listen on port {port}: choose one from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot listen on {host} port {port}: {why}; choose with --host and --port") from error
    return bound


def _is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _spelt(host: str) -> str:
    """A host as an address in the browser has it."""
    return f"[{host}]" if ":" in host else host
