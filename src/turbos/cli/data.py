"""`turbos data fetch|show`: the texts that models are trained on. Lists size and licence first, fetches, shows samples.

Nothing is installed, and what is fetched stays in the cache (`--cache`, else $TURBOS_CACHE, else ~/.cache/turbos). A
source that this machine cannot have is skipped with a line; the same command goes on where a broken one ended.

    turbos data show                       # every source and group: size, language, licence
    turbos data fetch english-prose code
    turbos data show bible --samples 2     # its card, what it really gives, and the first texts
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from turbos.cli.curate import add_curate_parser
from turbos.cli.terminal import printable
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from turbos.data.sources import Source
    from turbos.data.sources.outcomes import WatchSource

SAMPLE_CHARACTERS = 600
STREAMED_DOCUMENTS = 1000
"""Of a `datasets:` source, which may be endless, only so many documents are read to show it."""


def add_parser(subparsers: Any) -> None:
    """Declare the verb and its actions."""
    parser = subparsers.add_parser("data", help="fetch and show texts to train on", allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    fetch = actions.add_parser("fetch", help="bring sources into the cache", allow_abbrev=False)
    fetch.add_argument("names", nargs="*", metavar="SOURCE|GROUP", help="what to fetch (default: the group `default`)")
    fetch.add_argument("--dry-run", action="store_true", help="list sizes and licences, fetch nothing")
    fetch.set_defaults(act=fetch_sources)
    show = actions.add_parser("show", help="list all sources, or show one", allow_abbrev=False)
    show.add_argument("source", nargs="?", metavar="SOURCE", help="a source, a group, a path or datasets:OWNER/NAME")
    show.add_argument("--samples", type=int, default=3, metavar="N", help="how many texts to print (default: 3)")
    show.add_argument("--json", action="store_true", help="stdout holds one JSON object and nothing else")
    show.set_defaults(act=show_sources)
    add_curate_parser(actions)
    for action in (fetch, show):
        action.add_argument("--cache", metavar="DIR", help="where fetched packages lie")


def run(args: argparse.Namespace) -> int:
    """Do the action."""
    code: int = args.act(args)
    return code


def fetch_sources(args: argparse.Namespace) -> int:
    """List what is asked for, fetch it, and say how each source ended; UserError where some failed."""
    from turbos.data.sources import DEFAULT_GROUP, SOURCES, expand
    from turbos.data.sources.outcomes import fetch_each, is_there

    names = expand(args.names or [DEFAULT_GROUP])
    require_known(names)
    missing = [name for name in names if not is_there(SOURCES[name].package, args.cache)]
    print_cards([SOURCES[name] for name in names], set(missing))
    if args.dry_run:
        return 0
    counts: dict[str, int] = {}
    with progress_of([SOURCES[name] for name in missing]) as watch:
        for outcome in fetch_each(names, args.cache, tell=lambda line: print(f"note: {line}"), watch=watch):
            counts[outcome.state] = counts.get(outcome.state, 0) + 1
            watch(outcome.name, -1)
            if outcome.name in missing:
                print(f"{outcome.name}: {outcome.state}{': ' if outcome.said else ''}{outcome.said}", flush=True)
    print("; ".join(f"{count} {state}" for state, count in counts.items()))
    if counts.get("failed"):
        raise UserError(
            f"{counts['failed']} of {len(names)} sources failed (see above): give the command again to go on"
        )
    return 0


def require_known(names: Iterable[str]) -> None:
    """Raises UserError for the first name that is no source."""
    import difflib

    from turbos.data.sources import GROUPS, SOURCES

    for name in names:
        if name not in SOURCES:
            near = difflib.get_close_matches(name, [*SOURCES, *GROUPS], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "turbos data show lists all"
            raise UserError(f"no source or group {name!r}: {hint}")


def print_cards(sources: Sequence[Source], missing: set[str]) -> None:
    """A table of cards, a line each, and what is still to be fetched in all."""
    packages = {source.package for source in sources if source.name in missing}
    print(f"{'source':<20} {'language':<8} {'text MB':>8} {'fetch MB':>8}  {'through':<7} {'licence':<32} what it is")
    for source in sources:
        size = "-" if source.megabytes is None else f"{source.megabytes:.1f}"
        download = f"{source.download_megabytes:.1f}" if source.name in missing else "there"
        channel = "-" if source.package is None else source.package.channel
        row = f"{source.name:<20} {source.language:<8} {size:>8} {download:>8}  {channel:<7} {source.licence:<32}"
        print(f"{row} {source.what}")
    megabytes = sum(package.megabytes for package in packages if package is not None)
    print(f"{len(packages)} packages to fetch, {megabytes:.1f} MB")


@contextmanager
def progress_of(sources: Sequence[Source]) -> Iterator[WatchSource]:
    """A bar over the megabytes of these sources on a terminal's stderr; elsewhere nothing is drawn.

    The watcher takes a source's name and the bytes that came; -1 says that the source is done with.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    # Sources that share a package wait for it once.
    first = {source.package: source for source in reversed(sources)}
    sizes = {source.name: round(source.download_megabytes * 1e6) for source in first.values()}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(file=sys.stderr)
    done = 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("fetch", total=sum(sizes.values()))

        def watch(name: str, size: int) -> None:
            nonlocal done
            whole = sizes.pop(name, 0) if size < 0 else sizes.get(name, 0)
            done += whole if size < 0 else 0
            # Clients keep more than the package while they work.
            bar.update(task, completed=done if size < 0 else done + min(size, whole), description=name)

        yield watch


def show_sources(args: argparse.Namespace) -> int:
    """List every source, or show one: its card, its counts as measured here, and its first texts."""
    if args.samples < 0:
        raise UserError(f"--samples must be at least 0, got {args.samples}")
    return show_one(args) if args.source else list_all(args)


def list_all(args: argparse.Namespace) -> int:
    """Every source and every group."""
    from turbos.data.sources import GROUPS, SOURCES
    from turbos.data.sources.outcomes import is_there

    missing = {name for name, source in SOURCES.items() if not is_there(source.package, args.cache)}
    if args.json:
        cards = [{**card(source), "is_there": source.name not in missing} for source in SOURCES.values()]
        print(json.dumps({"sources": cards, "groups": [dataclasses.asdict(group) for group in GROUPS.values()]}))
        return 0
    print_cards(list(SOURCES.values()), missing)
    for group in GROUPS.values():
        print(f"group {group.name}: {', '.join(group.sources)}")
    return 0


def card(source: Source) -> dict[str, object]:
    """A card as JSON has it."""
    return {
        "name": source.name,
        "what": source.what,
        "language": source.language,
        "licence": source.licence,
        "rights_are_clear": source.rights_are_clear,
        "documents": source.documents,
        "megabytes": source.megabytes,
        "package": None if source.package is None else dataclasses.asdict(source.package),
    }


def show_one(args: argparse.Namespace) -> int:
    """A source's card, measured counts and first texts."""
    from turbos.data.sources import SOURCES, documents
    from turbos.data.sources.measure import measure

    limit = STREAMED_DOCUMENTS if args.source.startswith("datasets:") else None
    counts = measure(documents(args.source, args.cache), args.samples, limit)
    source = SOURCES.get(args.source)
    if args.json:
        print(json.dumps({"card": card(source) if source else None, "measured": dataclasses.asdict(counts)}))
        return 0
    for key, value in (card(source) if source else {"name": args.source}).items():
        if key != "package":
            print(f"{key.replace('_', ' '):<18}{'-' if value is None else value}")
    if source and source.package:
        package = source.package
        print(f"{'package':<18}{package.project} {package.version} ({package.channel}), {package.megabytes:.1f} MB")
    part = f" (the first {limit})" if limit and counts.documents == limit else ""
    print(
        f"{'measured':<18}{counts.documents:,} documents{part}, {counts.distinct:,} distinct, {counts.megabytes:.2f} MB"
    )
    print(f"{'':<18}characters: median {counts.median_characters:,}, longest {counts.longest_characters:,}")
    for number, sample in enumerate(counts.samples, 1):
        cut = sample[:SAMPLE_CHARACTERS]
        print(f"--- document {number}{'' if len(cut) == len(sample) else f' (first {SAMPLE_CHARACTERS} characters)'}")
        print(printable(cut.rstrip("\n"), keep="\n\t"))
    return 0
