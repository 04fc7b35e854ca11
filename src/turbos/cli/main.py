"""`turbos <verb>`: finds the verb's module, imports only that, and turns errors into one line and an exit code.

Exit codes: 0 done, 2 a mistake that the user can mend (`UserError`, wrong arguments), 130 stopped by Ctrl-C, 141 the
reader of the output went away. Anything else is a defect and keeps its traceback. This module knows no verb's options:
each verb's module declares its own with `add_parser(subparsers)` and does its work in `run(args) -> int`.

    turbos --help                                     # imports no torch
    turbos pretrain demo --train.steps 50 --dry-run   # prints the recipe
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from turbos import __version__
from turbos.common.errors import UserError

USER_ERROR, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG),
)
"""What the disk, its owner or a wrong path refuses: for the user to mend, so one line instead of a traceback."""


@dataclass(frozen=True)
class Verb:
    """A word after `turbos`: the module that does it, and whether it takes `--dotted.key value` overrides.

    A verb that `resumes` goes on from its last checkpoint when the same command is given again.
    """

    name: str
    module: str
    help: str
    takes_overrides: bool = False
    resumes: bool = False


VERBS = (
    Verb("demo", "turbos.cli.demo", "the whole life of a small reasoning model, from text to a table", resumes=True),
    Verb("pretrain", "turbos.cli.stages", "train a model on text and problems", takes_overrides=True, resumes=True),
    Verb(
        "anneal", "turbos.cli.stages", "go on pretraining with conversations, to the rate's floor", True, resumes=True
    ),
    Verb("sft", "turbos.cli.stages", "teach a model to answer, with and without thinking", True, resumes=True),
    Verb("rl", "turbos.cli.stages", "improve a model by checked answers (GRPO)", takes_overrides=True, resumes=True),
    Verb("data", "turbos.cli.data", "fetch and show texts to train on", resumes=True),
    Verb("generate", "turbos.cli.generate", "continue a text or answer a question"),
    Verb("chat", "turbos.cli.chat", "talk with a model in the terminal"),
    Verb("serve", "turbos.cli.serve", "serve a model over HTTP, with a page to chat with it"),
    Verb("plot", "turbos.cli.plot", "draw the curves of a run"),
    Verb("describe", "turbos.cli.describe", "count a model's parameters, work and memory", takes_overrides=True),
    Verb("verify", "turbos.cli.verify", "prove that a checkpoint gives the same numbers however it is run"),
    Verb("import", "turbos.cli.import_", "take over a checkpoint from elsewhere"),
    Verb("export", "turbos.cli.export", "write a checkpoint for other programs"),
    Verb("bench", "turbos.cli.bench", "measure speed and memory against peers"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line (default: this process's) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = dispatch(words)
        # Here and not at the interpreter's end, where a full disk or a closed pipe would be an ugly message.
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"turbos: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        resumes = any(verb.resumes for verb in VERBS if verb.name in words[:1])
        how = f"; resume with: turbos {shlex.join(words)}" if resumes else ""
        print(f"turbos: stopped{how}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough (`turbos generate ... | head`). Nothing more may be flushed into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"turbos: error: {error.strerror}{where}; what was saved before is whole", file=sys.stderr)
        return USER_ERROR


def dispatch(words: Sequence[str]) -> int:
    """Parse the words and run their verb."""
    name = words[0] if words else "--help"
    verb = next((verb for verb in VERBS if verb.name == name), None)
    if verb is None and not name.startswith("-"):
        nearest = difflib.get_close_matches(name, [verb.name for verb in VERBS], n=1, cutoff=0.0)[0]
        raise UserError(f"unknown verb {name!r}; did you mean {nearest!r}? (turbos --help lists all)")
    parser = build_parser(verb)
    if verb is None:
        parser.parse_args(words or ["--help"])
        return 0
    args, rest = parser.parse_known_args(join_overrides(words) if verb.takes_overrides else words)
    if verb.takes_overrides:
        args.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (turbos {verb.name} --help lists the options)")
    return importlib.import_module(verb.module).run(args)


def build_parser(verb: Verb | None) -> argparse.ArgumentParser:
    """The parser of all verbs, with options for one of them only, so that the others need no import."""
    description = "Train, reason with and serve hybrid Mamba-Transformer mixture-of-experts language models."
    parser = argparse.ArgumentParser(prog="turbos", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"turbos {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    if verb is None:
        for listed in VERBS:
            subparsers.add_parser(listed.name, help=listed.help)
    else:
        importlib.import_module(verb.module).add_parser(subparsers)
    return parser


def join_overrides(words: Sequence[str]) -> list[str]:
    """Join `--dotted.key value` into one word, so that argparse never takes the value for a positional argument."""
    joined: list[str] = []
    for word in words:
        pending = joined and re.fullmatch(r"--[A-Za-z_][\w-]*(\.[\w-]+)+", joined[-1])
        if pending and not re.match(r"--[A-Za-z_]", word):
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined


if __name__ == "__main__":
    sys.exit(main())
