"""`turbos chat`: what is read again, commands, files, hostile text, foreign templates, and a real terminal."""

from __future__ import annotations

import doctest
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from terminals import CTRL_D, Terminal
from tiny import save_tiny, tiny_model, tiny_tokenizer
from turbos.cli import chat_screen, engine_options, speed, terminal
from turbos.cli.chat import COMMANDS
from turbos.cli.chat_file import load_messages
from turbos.cli.chat_session import ChatSession
from turbos.cli.engine_options import read_think
from turbos.cli.main import main
from turbos.cli.terminal import printable
from turbos.common.errors import UserError
from turbos.engine.config import EngineConfig
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.model.card import Card
from turbos.model.generate import generate
from turbos.model.package import load_package, write_package
from turbos.model.token_ids import TokenIds
from turbos.text.chat import Message, parse, prompt_ids
from turbos.text.foreign import foreign_prompt_ids
from turbos.text.thinking import Thinking
from turbos.text.tokenizer import Tokenizer

PLAIN = ("--path", "torch", "--precision", "fp32", "--memory", "256MiB")
SPEED = re.compile(r"\[read (\d+) new of (\d+) tokens(?: \((\d+) kept\))?.*, wrote (\d+)")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("chat") / "ckpt"))


@dataclass(frozen=True)
class Talk:
    """What a scripted chat printed; `reads` are (new, all, kept, written) tokens of each answer."""

    code: int
    out: str
    notes: str

    @property
    def reads(self) -> list[tuple[int, int, int, int]]:
        return [tuple(int(number or 0) for number in found) for found in SPEED.findall(self.notes)]  # type: ignore[misc]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talker:
    return Talker(capsys, monkeypatch)


class Talker:
    """Runs `turbos chat` in this process over lines of input."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, checkpoint: str, lines: Sequence[str], *words: str) -> Talk:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        code = main(["chat", checkpoint, "--verbose", *PLAIN, *words])
        printed = self._capsys.readouterr()
        return Talk(code, printed.out, printed.err)


def plain_answers(questions: Sequence[str], thinking: Thinking, count: int, temperature: float) -> list[Message]:
    """The conversation by the plain loop, which reads all of it each time."""
    tokenizer, turns = tiny_tokenizer(), []
    ends = [tokenizer.special("<|end|>"), tokenizer.special("<|endoftext|>")]
    for question in questions:
        turns.append(Message("user", question))
        prompt = prompt_ids(tokenizer, turns, thinking)
        (answer,) = generate(tiny_model(), [prompt], count, temperature=temperature, stop_ids=ends)
        opened = prompt[len(prompt) - list(reversed(prompt)).index(tokenizer.special("<|assistant|>")) :]
        turns.append(parse(tokenizer, [*opened, *answer.ids]))
    return [turn for turn in turns if turn.role == "assistant"]


def letters(text: str) -> str:
    return text.replace("\n", "")


QUESTIONS = ("gcd of 12 and 18?", "and of 6?", "add 12 and 34")


@pytest.mark.parametrize("mode", ["auto", "off", "on"])
def test_answers_are_those_of_the_plain_loop_and_only_news_are_read(checkpoint: str, talk: Talker, mode: str) -> None:
    words = ("--max-new-tokens", "50", "--temperature", "1.5", "--think", mode, "--show-thinking")
    found = talk(checkpoint, QUESTIONS, *words)
    want = plain_answers(QUESTIONS, Thinking.parse(mode), 50, 1.5)
    said = "".join((message.thinking or "") + message.content for message in want)
    # Where thinking ends a line begins; content that turns out to be thinking is shown as it was.
    assert letters(found.out.replace("thinking: ", "")) == letters(printable(said, keep="\n\t"))
    assert found.code == 0
    total = 0
    for place, (new, whole, kept, written) in enumerate(found.reads):
        assert new + kept == whole > total
        # All but the last token of the last answer was read already.
        assert kept == (0 if place == 0 else total + found.reads[place - 1][3] - 1)
        total = whole
        assert 0 < written <= 50
    assert len(found.reads) == 3


def test_generated_turns_carry_their_ids(checkpoint: str, talk: Talker, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    talk(checkpoint, [*QUESTIONS, f"/save {file}"], "--max-new-tokens", "30", "--temperature", "2")
    saved = json.loads(file.read_text(encoding="utf-8"))["messages"]
    want = plain_answers(QUESTIONS, Thinking(), 30, 2.0)
    assert [tuple(one["ids"]) for one in saved[1::2]] == [message.ids for message in want]
    # Some of them are not what their texts would be encoded as: the ids were worth keeping.
    assert any(tuple(tiny_tokenizer().encode(message.content)) != message.ids for message in want)
    assert load_messages(file, tiny_tokenizer())[1::2] == tuple(want)


def test_undo_retry_and_modes_go_on_from_kept_states(checkpoint: str, talk: Talker) -> None:
    lines = ["gcd of 12?", "and 18?", "/retry", "/undo", "/think 3", "and 18?", "/think", "/think 0", "/retry"]
    found = talk(checkpoint, lines, "--max-new-tokens", "20")
    first, second, retried, bounded, closed = found.reads
    assert first[2] == 0 and 0 < second[0] < second[1]
    assert retried[:2] == (0, second[1])  # the same prompt, nothing to read
    # Only the tags are new: the one that opens thinking, then the one that closes it.
    assert bounded[:2] == (1, second[1] + 1) and closed[:2] == (1, second[1] + 2)
    assert "taken back: and 18?" in found.notes and "thinking: 3" in found.notes and "thinking: 0" in found.notes
    assert len(set(found.out.splitlines()[1:])) > 1


def test_a_budget_bounds_the_thinking(checkpoint: str, talk: Talker) -> None:
    found = talk(checkpoint, QUESTIONS, "--max-new-tokens", "40", "--think", "5")
    thought = [int(number) for number in re.findall(r"thought for (\d+) tokens", found.notes)]
    assert len(thought) == 3 and all(0 < number <= 5 for number in thought)


def test_a_message_may_switch_thinking_off_and_a_path_is_no_command(checkpoint: str, talk: Talker) -> None:
    lines = ["gcd of 12?", "/undo", "gcd of 12? /no_think", "/undo", "/usr/bin holds?", '"""two', 'lines"""']
    found = talk(checkpoint, lines, "--max-new-tokens", "3")
    plain, switched = found.reads[0][1], found.reads[1][1]
    assert switched == plain + len(tiny_tokenizer().encode(" /no_think")) + 2
    assert len(found.reads) == 4 and found.code == 0


def test_commands_answer_and_mistakes_do_not_end_the_chat(checkpoint: str, talk: Talker, tmp_path: Path) -> None:
    lines = ["/help", "/undo", "/retry", "/thinkin", "/quit now", "/think maybe", "/save", "/load x\0y", "a\udcffb"]
    lines += [
        f"/load {tmp_path}",
        f"/save {tmp_path}/none/x",
        "",
        "  ",
        "/stats",
        "gcd",
        "/thinking",
        "/thinking",
        "/quit",
    ]
    found = talk(checkpoint, [*lines, "never read"], "--max-new-tokens", "5", "--think", "on")
    assert found.code == 0 and len(found.reads) == 1
    assert all(command.name in found.notes and command.help in found.notes for command in COMMANDS)
    errors = re.findall("error: (.*)", found.notes)
    begins = ["nothing was asked yet", "nothing was asked yet", "unknown command /thinkin; did you mean /thinking?"]
    begins += [
        "/quit takes nothing after it",
        "--think must be",
        "name a file",
        "name a file",
        "message 0, content at 1",
    ]
    begins += [f"{tmp_path}: Is a directory", f"cannot save the conversation {tmp_path}/none/x: No such file"]
    assert [error[: len(begin)] for error, begin in zip(errors, begins, strict=True)] == begins
    assert "conversation: 0 messages, 0 tokens" in found.notes
    assert "thinking is shown from here on" in found.notes and "thinking is folded again" in found.notes


def test_hostile_text_does_not_reach_the_terminal(checkpoint: str, talk: Talker) -> None:
    words = ("--max-new-tokens", "600", "--temperature", "50", "--system", "add")
    assert main(["generate", checkpoint, "--prompt", "gcd", *words[:4], *PLAIN]) == 0
    raw = talk(checkpoint, [])
    assert "\x1b" in raw.out  # such a model does write escapes
    for options in ((), ("--show-thinking", "--think", "on")):
        found = talk(checkpoint, ["gcd", "/retry", "/thinking"], *words, *options)
        assert len(found.out) > 500 and "·" in found.out
        assert all(letter.isprintable() or letter in "\n\t" for letter in found.out + found.notes)


def test_a_conversation_goes_on_in_another_process(checkpoint: str, talk: Talker, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    whole = talk(checkpoint, QUESTIONS, "--max-new-tokens", "20")
    talk(checkpoint, [*QUESTIONS[:2], f"/save {file}"], "--max-new-tokens", "20")
    assert {path.name for path in tmp_path.iterdir()} == {"talk.json", "talk.json.state"}
    again = talk(checkpoint, [QUESTIONS[2]], "--max-new-tokens", "20", "--load", str(file))
    assert whole.out.endswith(again.out) and again.out.strip()
    assert again.reads[0][:3] == whole.reads[2][:3] and again.reads[0][2] > 0
    # Without the state, or with a damaged one, it is all read again; the words are the same.
    state = tmp_path / "talk.json.state"
    content = bytearray(state.read_bytes())
    content[-9] ^= 1
    state.write_bytes(content)
    damaged = talk(checkpoint, [f"/load {file}", QUESTIONS[2]], "--max-new-tokens", "20")
    assert "they are read again" in damaged.notes and "talk.json.state: corrupted session" in damaged.notes
    assert damaged.out == again.out and damaged.reads[0][:3] == (whole.reads[2][1], whole.reads[2][1], 0)
    state.unlink()
    assert "no such session file" in talk(checkpoint, [f"/load {file}"]).notes


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\xff\xfe", "no conversation"),
        (b"[" * 100_000, "no conversation"),
        (b"[]", "no conversation that this version can read"),
        (b'{"format": "turbos chat 1"}', "the messages cannot be read (KeyError"),
        (b'{"format": "turbos chat 1", "messages": 5}', "the messages cannot be read (TypeError"),
        (b'{"format": "turbos chat 1", "messages": [5]}', "the messages cannot be read"),
        (b'{"format": "turbos chat 1", "messages": [{"role": "user"}]}', "the messages cannot be read (KeyError"),
        (b'{"format": "turbos chat 1", "messages": [{"role": "user", "content": 5}]}', "must be texts"),
        (b'{"format": "turbos chat 1", "messages": [{"role": "boss", "content": "x"}]}', "unknown role 'boss'"),
        (b'{"format": "turbos chat 1", "messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"format": "turbos chat 1", "tokenizer": "OURS", "messages": [BAD]}', "ids must be a list"),
    ],
)
def test_broken_conversations_are_refused_by_name(tmp_path: Path, content: bytes, what: str) -> None:
    file = tmp_path / "talk.json"
    bad = b'{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "ids": [5, -1]}'
    file.write_bytes(content.replace(b"OURS", tiny_tokenizer().fingerprint.encode()).replace(b"BAD", bad))
    with pytest.raises(UserError, match=re.escape(str(file))) as caught:
        load_messages(file, tiny_tokenizer())
    assert what in str(caught.value)


def test_another_tokenizers_ids_are_not_taken(tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    turns = '{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "ids": [99999]}'
    file.write_text(f'{{"format": "turbos chat 1", "tokenizer": "other", "messages": [{turns}]}}')
    assert load_messages(file, tiny_tokenizer()) == (Message("user", "x"), Message("assistant", "y"))


def test_a_conversation_longer_than_memory_is_told(checkpoint: str, talk: Talker) -> None:
    found = talk(checkpoint, ["add 12 and 34 " * 4000, "gcd"], "--max-new-tokens", "5", "--memory", "4MiB")
    assert "error: " in found.notes and "more than fit into memory" in found.notes
    assert len(found.reads) == 1 and found.code == 0


def test_a_wish_to_stop_is_heard_while_a_long_question_is_read(checkpoint: str) -> None:
    engine = Engine.from_checkpoint(checkpoint, EngineConfig(path="torch", memory=1 << 26, segment=64))
    session = ChatSession(engine, SamplingParams(max_new_tokens=4), read_think("auto"))
    shown: list[object] = []
    asked = iter([False, False, True, True])
    answer = session.ask("add 12 and 34 " * 300, lambda part, _: shown.append(part), lambda: next(asked))
    assert (answer.message, answer.finish, shown, session.messages) == (None, "cancelled", [], ())
    assert answer.speed.read == 2 * 64 and not engine.busy
    answer = session.ask("gcd", lambda part, _: shown.append(part), lambda: False)
    assert answer.message is not None and session.messages == (Message("user", "gcd"), answer.message)


@pytest.mark.parametrize("module", [chat_screen, engine_options, speed, terminal])
def test_examples_hold(module: ModuleType) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted and not outcome.failed


# Foreign layouts


def foreign_checkpoint(directory: Path, template: str) -> str:
    """A checkpoint whose chats are laid out by a template of its own."""
    source = directory / "tokenizer"
    tiny_tokenizer().save(source)
    for path in source.iterdir():
        path.write_text(path.read_text().replace("<|user|>", "<|im_start|>"))
    (source / "chat_template.jinja").write_text(template)
    out = directory / "ckpt"
    out.mkdir()
    write_package(out, tiny_model(), Tokenizer.load(source), Card(), token_ids=TokenIds(eos=(6,)))
    return str(out)


LAYOUT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_foreign_template_chats_and_only_news_are_read(tmp_path: Path, talk: Talker) -> None:
    checkpoint = foreign_checkpoint(tmp_path, LAYOUT)
    found = talk(checkpoint, [*QUESTIONS, "/think on", "/think"], "--max-new-tokens", "25", "--temperature", "2")
    first, second, third = found.reads
    assert second[2] == first[1] + first[3] - 1 and third[2] == second[1] + second[3] - 1
    assert "this checkpoint's chats have no thinking to open or close" in found.notes
    assert "thinking: auto" in found.notes and found.out.count("\n") >= 3
    file = tmp_path / "talk.json"
    talk(checkpoint, [*QUESTIONS[:2], f"/save {file}"], "--max-new-tokens", "25", "--temperature", "2")
    again = talk(checkpoint, [QUESTIONS[2]], "--max-new-tokens", "25", "--temperature", "2", "--load", str(file))
    assert again.reads[0] == third and found.out.endswith(again.out)


def test_a_foreign_prompt_carries_generated_ids_verbatim(tmp_path: Path) -> None:
    tokenizer = load_package(foreign_checkpoint(tmp_path, LAYOUT)).tokenizer
    turns = [Message("user", " gcd "), Message("assistant", "<|end|> ?", ids=(6, 70, 71)), Message("user", "and 18?")]
    first = foreign_prompt_ids(tokenizer, turns[:1])
    whole = foreign_prompt_ids(tokenizer, turns)
    assert whole[: len(first) + 3] == [*first, 6, 70, 71]
    plain = [turns[0], Message("assistant", "12"), turns[2]]
    tail = foreign_prompt_ids(tokenizer, plain)[len(first) + len(tokenizer.encode("12")) :]
    assert whole[len(first) + 3 :] == tail
    with pytest.raises(UserError, match=r"message 1: the text spells <\|end\|>"):
        foreign_prompt_ids(tokenizer, [turns[0], Message("assistant", "<|end|> ?"), turns[2]])


def test_a_template_that_rewrites_turns_gets_their_texts(tmp_path: Path) -> None:
    rewriting = LAYOUT.replace("m.content | trim", "m.content | tojson")
    tokenizer = load_package(foreign_checkpoint(tmp_path, rewriting)).tokenizer
    turns = [Message("user", "gcd"), Message("assistant", "12", ids=(70, 71)), Message("user", "and 18?")]
    plain = [turns[0], Message("assistant", "12"), turns[2]]
    assert foreign_prompt_ids(tokenizer, turns) == foreign_prompt_ids(tokenizer, plain)
    assert '"12"' in tokenizer.decode(foreign_prompt_ids(tokenizer, turns))


def test_a_checkpoint_without_chats_is_refused(tmp_path: Path, talk: Talker) -> None:
    checkpoint = Path(foreign_checkpoint(tmp_path, LAYOUT))
    (checkpoint / "chat_template.jinja").unlink()
    (checkpoint / "tokenizer_config.json").write_text("{}")
    found = talk(str(checkpoint), ["gcd"])
    assert found.code == 2 and "no chat template" in found.notes and found.out == ""


# A real process, and a real terminal


def test_a_real_process_answers_lines_and_ends_with_them(checkpoint: str) -> None:
    command = [sys.executable, "-m", "turbos", "chat", checkpoint, "--max-new-tokens", "6", "--think", "off", *PLAIN]
    done = subprocess.run(command, input=b"gcd\nbad \xff byte\n/quit\n", capture_output=True, check=False)
    want = plain_answers(["gcd"], Thinking("off"), 6, 0.0)[0].content
    assert (done.returncode, done.stdout.decode()) == (0, printable(want, keep="\n\t") + "\n")
    assert done.stderr.decode().startswith("error: message 2, content at 4: half a surrogate pair")


def test_a_terminal_folds_thinking_and_stops_on_ctrl_c(checkpoint: str) -> None:
    with Terminal(["chat", checkpoint, "--think", "on", "--max-new-tokens", "5000", *PLAIN]) as terminal:
        assert "weights fp32" in terminal.expect("> ")
        terminal.send("gcd of 12?\r")
        terminal.expect("\r\x1b[K\x1b[2mthinking ... ")
        terminal.interrupt()
        assert "thought for " in terminal.expect("tokens\x1b[0m\r\n\x1b[2m[read ")
        assert "stopped (Ctrl-C again leaves)" in terminal.expect("\x1b[?2004h> ")
        # The chat goes on from what was kept.
        terminal.send("/think off\r")
        terminal.expect("thinking: off")
        terminal.expect("> ")
        terminal.send("half")
        terminal.expect("half")
        terminal.interrupt()
        terminal.expect("Ctrl-C again leaves")
        terminal.expect("> ")
        terminal.send("/think on\r")
        terminal.expect("thinking: on")
        terminal.expect("> ")
        # One that was answered by a question counts no more; two in a row leave. An answer may end by itself before
        # the first one is heard: then that was the first at the prompt.
        terminal.send("and 18?\r")
        terminal.expect("\r\x1b[K\x1b[2mthinking ... ")
        terminal.interrupt()
        terminal.expect("Ctrl-C again leaves")
        terminal.expect("> ")
        terminal.interrupt()
        assert terminal.wait() == 130
        assert terminal.printed.endswith("turbos: stopped\r\n") and "Traceback" not in terminal.printed


def test_a_paste_of_many_lines_is_one_message(checkpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    with Terminal(["chat", checkpoint, "--max-new-tokens", "3", *PLAIN]) as terminal:
        terminal.expect("> ")
        terminal.send("\x1b[200~gcd of 12\n/quit\n\tand 18?\x1b[201~")
        terminal.expect("18?")
        terminal.send("\r")
        terminal.expect("tokens/s")
        terminal.expect("> ")
        terminal.send(f"/save {file}\r")
        terminal.expect("saved 2 messages")
        terminal.expect("> ")
        terminal.send(CTRL_D)
        assert terminal.wait() == 0
    assert load_messages(file, tiny_tokenizer())[0] == Message("user", "gcd of 12\n/quit\n\tand 18?")
