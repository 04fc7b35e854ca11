"""`turbos generate`: the plain loop's texts, several answers, stops, grammars, budgets, mistakes, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import save_tiny, tiny_model, tiny_tokenizer
from turbos.cli.engine_options import read_bytes, read_think
from turbos.cli.main import main
from turbos.common.errors import UserError
from turbos.model.generate import generate
from turbos.text.chat import Message, prompt_ids
from turbos.text.thinking import Thinking

PLAIN = ("--path", "torch", "--precision", "fp32")
SPEED = re.compile(r"read \d+ new of \d+ tokens.* tokens/s, wrote \d+ at [\d.]+ tokens/s\n")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("generate") / "ckpt"))


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command that succeeds writes to stdout."""
    assert main(["generate", *words, *PLAIN]) == 0
    return capsys.readouterr().out


def plain_text(prompt: list[int], count: int, temperature: float = 0.0, seed: int = 0) -> str:
    """What the plain loop writes."""
    tokenizer = tiny_tokenizer()
    ends = [tokenizer.special("<|end|>"), tokenizer.special("<|endoftext|>")]
    (answer,) = generate(tiny_model(), [prompt], count, temperature=temperature, seeds=[seed], stop_ids=ends)
    return tokenizer.decode([id for id in answer.ids if id not in ends])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_the_text_is_the_plain_loops(checkpoint: str, capsys: pytest.CaptureFixture[str], temperature: float) -> None:
    words = (checkpoint, "--prompt", "gcd of 12", "--max-new-tokens", "90", "--temperature", str(temperature))
    want = plain_text(tiny_tokenizer().encode("gcd of 12"), 90, temperature, seed=4)
    assert printed(capsys, *words, "--seed", "4") == want + "\n"
    chat = prompt_ids(tiny_tokenizer(), [Message("user", "gcd of 12")], "on")
    want = plain_text(chat, 90, temperature, seed=4)
    assert printed(capsys, *words, "--seed", "4", "--chat", "--think", "on") == want + "\n"


def test_several_answers_are_those_of_their_seeds(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (checkpoint, "--prompt", "gcd", "--temperature", "2", "--max-new-tokens", "40")
    alone = [printed(capsys, *words, "--seed", str(seed)) for seed in (5, 6, 7)]
    assert len(set(alone)) == 3
    heads = [f"--- answer {place} of 3 ---\n" for place in (1, 2, 3)]
    want = "".join(head + text for head, text in zip(heads, alone, strict=True))
    assert printed(capsys, *words, "--seed", "5", "-n", "3") == want


def test_stops_and_cuts(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = (checkpoint, "--prompt", "gcd", "--temperature", "3", "--max-new-tokens", "80", "--seed", "1")
    whole = printed(capsys, *words)
    stop = whole[20:23]
    cut = printed(capsys, *words, "--stop", "never in it", "--stop", stop)
    assert cut == whole[: whole.index(stop)] + "\n"
    greedy = printed(capsys, *words[:3], "--max-new-tokens", "80")
    # Whatever leaves only the likeliest token is greedy.
    for options in (["--top-k", "1"], ["--top-p", "0"], ["--min-p", "1"]):
        assert printed(capsys, *words, *options) == greedy != whole
    assert printed(capsys, *words[:3], "--max-new-tokens", "80", "--repetition-penalty", "1.5") != greedy


def test_grammars_hold(checkpoint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    properties = {"fruit": {"enum": ["apple", "pear"]}, "ripe": {"type": "boolean"}}
    asked = {"type": "object", "properties": properties, "required": ["fruit", "ripe"], "additionalProperties": False}
    schema.write_text(json.dumps(asked))
    words = (checkpoint, "--prompt", "gcd", "--temperature", "2", "--max-new-tokens", "200")
    for seed in ("1", "2"):
        found = json.loads(printed(capsys, *words, "--seed", seed, "--json-schema", str(schema)))
        assert found["fruit"] in ("apple", "pear") and found["ripe"] in (True, False)
        assert re.fullmatch(
            r"[0-9]{3}-[a-f]+x\n", printed(capsys, *words, "--seed", seed, "--regex", "[0-9]{3}-[a-f]+x")
        )
    thought = printed(capsys, *words, "--chat", "--think", "6", "--regex", "yes|no")
    assert re.fullmatch(r"(?s).*</think>(yes|no)\n", thought)


@pytest.mark.parametrize("budget", [1, 9])
def test_a_number_bounds_the_thinking(checkpoint: str, capsys: pytest.CaptureFixture[str], budget: int) -> None:
    words = (checkpoint, "--chat", "--prompt", "gcd", "--max-new-tokens", "60")
    thinking, closed, _ = printed(capsys, *words, "--think", str(budget)).partition("</think>")
    opened = prompt_ids(tiny_tokenizer(), [Message("user", "gcd")], "on")
    assert closed and thinking in [plain_text(opened, count) for count in range(1, budget + 1)]
    assert "</think>" not in plain_text(opened, budget)
    assert "think>" not in printed(capsys, *words, "--think", "0")


def test_what_the_engine_does_is_said_on_request(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", checkpoint, "--prompt", "gcd of 12 and 18", "--max-new-tokens", "20", *PLAIN]
    assert main([*words, "--verbose", "--memory", "64MiB", "--threads", "1"]) == 0
    engine, memory, speed = capsys.readouterr().err.splitlines(keepends=True)
    assert engine.startswith("engine: plain torch step (path is 'torch'), weights fp32")
    assert memory.startswith("memory: state 0.0 MB, KV ") and SPEED.fullmatch(speed)
    assert main([*words, "--precision", "int8", "--verbose"]) == 0
    assert "weights int8" in capsys.readouterr().err
    for quiet in ([], ["--quiet"]):
        assert main([*words, *quiet]) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--temperature", "-1"], "temperature must lie between"),
        (["--top-p", "1.5"], "top_p must lie between"),
        (["--top-k", "-1"], "top_k must be at least 0"),
        (["--min-p", "nan"], "min_p must lie between"),
        (["--repetition-penalty", "0"], "repetition_penalty must lie between"),
        (["--max-new-tokens", "0"], "max_new_tokens must be at least 1"),
        (["-n", "0"], "n must be between 1"),
        (["--stop", ""], "stop holds an empty string"),
        (["--seed", str(2**63)], "seed must be between"),
        (["--chat", "--think", "maybe"], "--think must be auto, on, off or a number of tokens, not 'maybe'"),
        (["--chat", "--think", "-3"], "--think must be"),
        (["--think", "3"], "--think needs --chat"),
        (["--memory", "4 parsecs"], "'4 parsecs' is no size of memory"),
        (["--memory", "1kB"], "give the engine more memory"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--precision", "int3"], "precision 'int3' is none of auto, "),
        (
            ["--path", "graphs"],
            "engine: CUDA graphs need a model on a CUDA device, this one is on cpu; set device 'cuda'",
        ),
        (["--device", "abacus"], "engine: device 'abacus' is not here"),
        (["--path", "scenic"], "path 'scenic' is none of auto, fused, graphs, static, torch"),
        (["--regex", "[0-9"], "grammar (regex) cannot be compiled"),
        (["--regex", "a\udcff"], "--regex is not valid text"),
        (["--regex", "a", "--stop", "b"], "stop strings would cut an answer that a grammar constrains"),
        (["--json-schema", "absent.json"], "--json-schema absent.json: cannot be read"),
        (["--max-new-tokens", str(2**40)], "that fit into memory"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: str, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    assert main(["generate", checkpoint, "--prompt", "gcd", "--path", "torch", *words]) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1 and line in found.err, found.err


def test_an_empty_prompt_and_two_grammars_are_refused(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", checkpoint, "--prompt", ""]) == 2
    assert "a prompt has no tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["generate", checkpoint, "--prompt", "a", "--regex", "a", "--json-schema", "x"])


def test_ctrl_c_ends_with_the_text_so_far(checkpoint: str) -> None:
    words = ["generate", checkpoint, "--prompt", "gcd", "--max-new-tokens", "8000", *PLAIN]
    command = [sys.executable, "-m", "turbos", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout is not None and process.stderr is not None
        first = process.stdout.read(8)
        process.send_signal(signal.SIGINT)
        rest, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"turbos: stopped\n")
    text = (first + rest).decode()
    assert text.endswith("\n") and plain_text(tiny_tokenizer().encode("gcd"), 60).startswith(text[:-1][:30])


def test_sizes_and_thinking_are_read() -> None:
    assert [read_bytes(text) for text in ("1", "2B", "1.5kB", "3 KiB", "1gib", "2TB")] == [
        *(1, 2, 1500, 3072, 2**30),
        2 * 10**12,
    ]
    for text in ("", "GiB", "-1GiB", "1e9", "4G", "١GiB", "1.GiB", "4GiBs", "nan"):
        with pytest.raises(UserError, match="no size of memory"):
            read_bytes(text)
    assert (read_think("on").mode, read_think("12").budget) == (Thinking("on"), 12)
    for text in ("", "On", "1.5", "٣", "9" * 5000, "budget 3"):
        with pytest.raises(UserError, match="--think must be"):
            read_think(text)
