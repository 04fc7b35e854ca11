"""`turbos chat CKPT`: talk with a model in the terminal; the answer streams, its thinking is one line that counts.

The conversation's state stays in the engine, so of each prompt only what is new is read; the line after an answer says
how much. Ctrl-C stops an answer, once more leaves; /help lists the commands. Without a terminal it answers each line of
stdin on stdout, which makes it a tool for scripts.

    turbos chat runs/demo/final --think 64
    printf 'What is 2 plus 2?\\nAnd 3 more?\\n' | turbos chat runs/demo/final
"""

from __future__ import annotations

import argparse
import difflib
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from turbos.cli.chat_screen import Screen, open_screen
from turbos.cli.engine_options import (
    add_engine_options,
    add_sampling_options,
    engine_config,
    is_talkative,
    read_think,
    sampling_params,
)
from turbos.cli.stages import use_threads
from turbos.common.errors import UserError

if TYPE_CHECKING:
    from turbos.cli.chat_session import Answer, ChatSession
    from turbos.text.stream import Delta

COMMAND = re.compile(r"/[a-z]+(\s|$)")
"""What is taken for a command; a path at the beginning of a message is none."""


def add_parser(subparsers: Any) -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("chat", help="talk with a model in the terminal", allow_abbrev=False)
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint directory or hub id")
    parser.add_argument("--system", default="", metavar="TEXT", help="the system's message at the beginning")
    parser.add_argument(
        "--think",
        default="auto",
        metavar="auto|on|off|N",
        help="who decides on thinking; a number: at most so many tokens",
    )
    parser.add_argument(
        "--show-thinking", action="store_true", help="thinking as text instead of a line that counts it"
    )
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a conversation that /save wrote")
    add_sampling_options(parser, max_new_tokens=2048)
    add_engine_options(parser)


def run(args: argparse.Namespace) -> int:
    """Load the checkpoint and talk until the input ends."""
    think = read_think(args.think)
    params = sampling_params(args, think.budget)
    config = engine_config(args, max_running=1)
    use_threads(args.threads)
    screen = open_screen(is_talkative(args), args.show_thinking)
    from turbos.cli.chat_session import ChatSession
    from turbos.engine.engine import Engine

    engine = Engine.from_checkpoint(args.checkpoint, config)
    session = ChatSession(engine, params, think, args.system)
    for line in engine.describe():
        screen.aside(line)
    chat = Chat(session, screen)
    if args.load is not None:
        chat.load(str(args.load))
    if screen.is_terminal:
        screen.note("/help lists the commands, Ctrl-D ends")
    chat.talk()
    return 0


class Interrupts:
    """Ctrl-C as a wish that is heard between steps: raised in the midst of one it would leave the engine torn.

    Within the context the first one sets `asked`; the next one raises KeyboardInterrupt after all, for the impatient.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupts:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class Chat:
    """The loop: a line is a command or a question, an answer is shown, until the input ends."""

    def __init__(self, session: ChatSession, screen: Screen) -> None:
        self._session, self._screen = session, screen
        self._is_over = False
        self._patience = 0
        self._commands = {command.name: command for command in COMMANDS}

    def talk(self) -> None:
        """Read, do, show. What the user can mend is told and the chat goes on."""
        while not self._is_over:
            line = self._next_line()
            if line is None:
                return
            if line.strip():
                try:
                    self._do(line)
                except UserError as error:
                    self._screen.note(f"error: {' '.join(str(error).split())}")

    def _next_line(self) -> str | None:
        """A line; Ctrl-C drops what was typed, and leaves the chat if nothing was said since the one before."""
        while True:
            try:
                line = self._screen.ask()
            except KeyboardInterrupt:
                if self._patience or not self._screen.is_terminal:
                    raise
                self._patience = 1
                self._screen.note("\nCtrl-C again leaves")
                continue
            self._patience = 0
            return line

    def _do(self, line: str) -> None:
        if not COMMAND.match(line) or "\n" in line:
            self._show(lambda show, stopped: self._session.ask(line, show, stopped))
            return
        name, _, rest = line.strip().partition(" ")
        command = self._commands.get(name)
        if command is None:
            nearest = difflib.get_close_matches(name, self._commands, n=1, cutoff=0.0)[0]
            raise UserError(f"unknown command {name}; did you mean {nearest}? (/help lists all)")
        if bool(rest.strip()) and not command.argument:
            raise UserError(f"{name} takes nothing after it")
        command.do(self, rest.strip())

    def _show(self, answer: Callable[[Callable[[Delta, int], None], Callable[[], bool]], Answer]) -> None:
        """Let an answer come, and say how it went."""
        with Interrupts() as interrupts:
            try:
                done = answer(self._show_part, lambda: interrupts.asked)
            finally:
                self._screen.end_answer()
        self._patience = int(interrupts.asked)
        if done.message is None:
            self._screen.note("nothing was written: the question is taken back")
        elif done.finish == "error":
            self._screen.note(f"the answer could not be finished: {done.reason}")
        how = {"length": ", cut off: no room for more", "cancelled": ", stopped (Ctrl-C again leaves)"}
        self._screen.aside(f"[{done.speed}{how.get(done.finish, '')}]")

    def _show_part(self, part: Delta, thinking_tokens: int) -> None:
        from turbos.text.stream import ContentDelta, ReasoningDelta, ToolCallDelta

        if isinstance(part, ReasoningDelta):
            self._screen.thinking(part.text, thinking_tokens)
        elif isinstance(part, ContentDelta):
            self._screen.content(part.text)
        elif isinstance(part, ToolCallDelta):
            self._screen.content(f"[calls {part.call.text}]")
        else:
            self._screen.note("(what stands above was thinking)")

    # Commands

    def help(self, rest: str) -> None:
        """List the commands."""
        lines = [f"{f'{command.name} {command.argument}':<24}{command.help}" for command in COMMANDS]
        self._screen.note("\n".join([*lines, '"""                     begins and ends a message of many lines']))

    def set_think(self, rest: str) -> None:
        """Say or change who decides on thinking."""
        if rest:
            self._session.set_think(read_think(rest))
        self._screen.note(f"thinking: {self._session.think}")

    def unfold(self, rest: str) -> None:
        """Show thinking, that of the last answer first, or fold it again."""
        self._screen.unfolded = not self._screen.unfolded
        last = self._session.messages[-1] if self._session.messages else None
        if self._screen.unfolded and last is not None and last.thinking:
            self._screen.note(f"thinking: {last.thinking}")
        self._screen.note("thinking is shown from here on" if self._screen.unfolded else "thinking is folded again")

    def undo(self, rest: str) -> None:
        """Take the last exchange back."""
        self._screen.note(f"taken back: {self._session.undo()}")

    def retry(self, rest: str) -> None:
        """Another answer to the last question."""
        self._show(self._session.retry)

    def save(self, rest: str) -> None:
        """Write the conversation, with the engine's state of it, to a file."""
        self._screen.note(self._session.save(_path(rest)))

    def load(self, rest: str) -> None:
        """Go on with a saved conversation, whose last answer is shown."""
        self._screen.note(self._session.load(_path(rest)))
        last = self._session.messages[-1] if self._session.messages else None
        if last is not None and self._screen.is_terminal:
            self._screen.content(last.content)
            self._screen.end_answer()

    def stats(self, rest: str) -> None:
        """What the engine did and holds."""
        metrics = self._session.engine.metrics()
        cache = metrics.cache
        lines = [
            f"conversation: {len(self._session.messages)} messages, {self._session.num_tokens} tokens",
            f"since the start: read {metrics.read_tokens} tokens, {metrics.cached_tokens} from kept states, "
            f"wrote {metrics.written_tokens}",
            f"kept states: {cache.snapshots}, {cache.scan_bytes / 1e6:.1f} MB; "
            f"found {cache.hits} times, missed {cache.misses}, given up {cache.evictions}",
            *self._session.engine.describe(),
        ]
        self._screen.note("\n".join(lines))

    def quit(self, rest: str) -> None:
        """End the chat."""
        self._is_over = True


def _path(text: str) -> Path:
    """The file that a command names; UserError for none."""
    if not text or "\0" in text:
        raise UserError("name a file, such as talk.json")
    return Path(text).expanduser() if text.startswith("~/") else Path(text)


@dataclass(frozen=True)
class Command:
    """A word that begins with a slash; `argument` names what may stand after it, empty where nothing may."""

    name: str
    argument: str
    help: str
    do: Callable[[Chat, str], None]


COMMANDS = (
    Command("/think", "auto|on|off|N", "who decides on thinking; a number: at most so many tokens", Chat.set_think),
    Command("/thinking", "", "show the thinking, the last answer's first; again: fold it", Chat.unfold),
    Command("/undo", "", "take the last question and its answer back", Chat.undo),
    Command("/retry", "", "another answer to the last question (at temperature 0: drawn at 0.7)", Chat.retry),
    Command("/save", "FILE", "keep the conversation, with the model's state of it", Chat.save),
    Command("/load", "FILE", "go on with a conversation that was kept", Chat.load),
    Command("/stats", "", "what was read, kept and written", Chat.stats),
    Command("/help", "", "this list", Chat.help),
    Command("/quit", "", "end (as Ctrl-D does)", Chat.quit),
)
