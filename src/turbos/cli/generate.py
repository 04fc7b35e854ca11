"""`turbos generate CKPT --prompt TEXT`: continue a text, or answer a question with `--chat`, as it is written.

The text goes to stdout token by token; nothing else does. What the engine is and how fast it was goes to stderr, where
somebody watches. `--think on|off|N` opens, closes or bounds the model's thinking; `--json-schema` and `--regex` make
the answer follow a grammar (after the thinking, if there is any).

    turbos generate runs/demo/final --chat --think 64 --prompt "What is the greatest common divisor of 12 and 18?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbos.cli.engine_options import (
    ThinkOption,
    add_engine_options,
    add_sampling_options,
    engine_config,
    is_talkative,
    read_grammar,
    read_think,
    sampling_params,
)
from turbos.cli.speed import Stopwatch
from turbos.cli.stages import use_threads
from turbos.cli.terminal import printable, write
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from turbos.engine.sequence import Delta
    from turbos.text.tokenizer import Tokenizer

MOST_RUNNING = 64
"""Answers that are written at once; with `-n` more, the rest waits."""


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("generate", help="continue a text or answer a question", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or hub id")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue, or with --chat a question")
    parser.add_argument("--chat", action="store_true", help="render the prompt as a user's turn")
    parser.add_argument(
        "--think",
        metavar="auto|on|off|N",
        help="with --chat: who decides on thinking; a number: at most so many tokens",
    )
    parser.add_argument("-n", type=int, default=1, metavar="N", help="so many answers, with seeds SEED, SEED + 1, ...")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    grammar = parser.add_mutually_exclusive_group()
    grammar.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON that this schema allows")
    grammar.add_argument("--regex", metavar="TEXT", help="the whole answer matches this regular expression")
    add_sampling_options(parser, max_new_tokens=256)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Load the checkpoint and write its continuation to stdout."""
    if args.think and not args.chat:
        raise UserError("--think needs --chat: only an answer has thinking")
    for name, text in (("--prompt", args.prompt), ("--regex", args.regex or "")):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"{name} is not valid text in this terminal's encoding")
    think = read_think(args.think or "auto")
    grammar = read_grammar(args.json_schema, args.regex)
    params = sampling_params(args, think.budget, n=args.n, stop=tuple(args.stop), grammar=grammar)
    config = engine_config(args, max_running=min(args.n, MOST_RUNNING))
    use_threads(args.threads)
    from turbos.engine.engine import Engine

    engine = Engine.from_checkpoint(args.checkpoint, config)
    tokenizer = engine.tokenizer
    assert tokenizer is not None, "a checkpoint has a tokenizer"
    prompt = chat_prompt(tokenizer, args.prompt, think) if args.chat else tokenizer.encode(args.prompt)
    talkative = is_talkative(args)
    if talkative:
        print(*engine.describe(), sep="\n", file=sys.stderr)
    watch = Stopwatch(engine)
    write_answers(measured(engine.stream(prompt, params), watch), args.n)
    if talkative:
        print(watch.speed(), file=sys.stderr)
    return 0


def chat_prompt(tokenizer: Tokenizer, question: str, think: ThinkOption) -> list[int]:
    """Tokens of a user's question, in the layout that the checkpoint speaks."""
    from turbos.text.chat import Message, prompt_ids
    from turbos.text.foreign import foreign_prompt_ids

    turns = [Message("user", question)]
    if tokenizer.speaks_chat:
        return prompt_ids(tokenizer, turns, think.mode)
    if think.mode.mode != "auto":
        raise UserError(f"--think {think}: this checkpoint's chats have no thinking to open or close")
    return foreign_prompt_ids(tokenizer, turns)


def measured(deltas: Iterable[Delta], watch: Stopwatch) -> Iterator[Delta]:
    """The deltas, each a lap of the watch."""
    for delta in deltas:
        watch.lap()
        yield delta


def write_answers(deltas: Iterable[Delta], count: int) -> None:
    """Write answers one after the other to stdout: the first unfinished one as it comes, the others when it is over.

    UserError for an answer that could not be finished (a grammar that led nowhere).
    """
    held: dict[int, list[Delta]] = {place: [] for place in range(count)}
    failure, current = "", 0
    try:
        _head(current, count)
        for delta in deltas:
            held[delta.index].append(delta)
            while current < count and held[current]:
                written, held[current] = held[current], []
                _write_text("".join(one.text for one in written))
                if written[-1].finish is None:
                    break
                failure = failure or written[-1].reason
                current += 1
                write(sys.stdout, "\n")
                _head(current, count)
    except KeyboardInterrupt:
        write(sys.stdout, "\n")
        raise
    if failure:
        raise UserError(f"an answer could not be finished: {failure}")


def _head(place: int, count: int) -> None:
    """Which of several answers begins."""
    if count > 1 and place < count:
        write(sys.stdout, f"--- answer {place + 1} of {count} ---\n")


def _write_text(text: str) -> None:
    write(sys.stdout, printable(text, keep="\n\t") if sys.stdout.isatty() else text)
