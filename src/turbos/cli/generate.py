"""`turbos generate CKPT --prompt TEXT`: continue a text, or answer a question with `--chat`, as it is written.

The text goes to stdout token by token; nothing else does. `--think on|off` opens or closes the model's thinking.

    turbos generate runs/demo/final --chat --think on --prompt "What is the greatest common divisor of 12 and 18?"
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from turbos.cli.terminal import printable
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from turbos.text.tokenizer import Tokenizer

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
LONGEST_CHARACTER = 4
"""Bytes of UTF-8: after so many tokens that make no character, the bytes are not going to."""


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("generate", help="continue a text or answer a question", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or hub id")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue, or with --chat a question")
    parser.add_argument("--chat", action="store_true", help="render the prompt as a user's turn")
    parser.add_argument("--think", choices=("auto", "on", "off"), help="with --chat: who decides on thinking")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    parser.add_argument("--seed", type=int, default=0, help="noise at temperature > 0")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most so many (default 256)")


def run(args: argparse.Namespace) -> int:
    """Load the checkpoint and write its continuation to stdout."""
    if args.think and not args.chat:
        raise UserError("--think needs --chat: only an answer has thinking")
    if not -(2**63) <= args.seed < 2**63:
        raise UserError(f"--seed must fit into 64 bits, not {args.seed}")
    if any("\ud800" <= letter <= "\udfff" for letter in args.prompt):
        raise UserError("--prompt is not valid text in this terminal's encoding")
    from turbos.model.generate import stream
    from turbos.model.package import load_package

    package = load_package(args.checkpoint)
    tokenizer, stop_ids = package.tokenizer, package.token_ids.eos
    prompt = chat_prompt(tokenizer, args.prompt, args.think) if args.chat else tokenizer.encode(args.prompt)
    ids = stream(
        package.model, prompt, args.max_new_tokens, temperature=args.temperature, seed=args.seed, stop_ids=stop_ids
    )
    encoding = sys.stdout.encoding or "utf-8"
    for text in texts(tokenizer, (token for token in ids if token not in stop_ids)):
        if sys.stdout.isatty():
            text = printable(text, keep="\n\t")
        # A terminal that cannot show a character shows a question mark.
        sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0


def chat_prompt(tokenizer: Tokenizer, question: str, think: str | None) -> list[int]:
    """Tokens of a user's question, in the layout that the checkpoint speaks."""
    from turbos.text.chat import Message, prompt_ids
    from turbos.text.foreign import foreign_prompt_ids

    turns = [Message("user", question)]
    if tokenizer.speaks_chat:
        return prompt_ids(tokenizer, turns, think or "auto")
    if think in ("on", "off"):
        raise UserError(f"--think {think}: this checkpoint's chats have no thinking to open or close")
    return foreign_prompt_ids(tokenizer, turns)


def texts(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Pieces of text as soon as they are whole characters (a character may take several tokens)."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending)
        if not text.endswith(INCOMPLETE) or len(pending) >= LONGEST_CHARACTER:
            yield text
            pending = []
    if pending:
        yield tokenizer.decode(pending)
