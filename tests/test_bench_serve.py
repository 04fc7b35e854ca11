"""The server's benchmark: real processes with a tiny model, what the client reads from the wire, rows and picture."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from gguf_cases import gguf_model
from serve_cases import tiny_service
from tiny import save_tiny
from turbos.bench import collect
from turbos.bench import serve as bench
from turbos.bench.guidellm import LATENCIES, RATES, guidellm_rows
from turbos.bench.peers import Times
from turbos.bench.rows import Row
from turbos.bench.serve import bench_serve, require_same_model
from turbos.bench.serve_chart import PANELS, draw_serve, values_of
from turbos.bench.serve_client import Address, ask_all, ask_one
from turbos.bench.serve_engine import Prompt
from turbos.bench.serve_load import ENGINE, OURS, PEER, Heard, Load, chat_body, load_rows, text_body
from turbos.bench.serve_plan import ServePlan, make_checkpoint, open_checkpoint
from turbos.bench.serve_processes import start_engine, start_server
from turbos.bench.serve_reread import CASES, ChatTalk, Reread, SessionTalk, hold_chat, hold_session, reread_rows
from turbos.cli import main as cli
from turbos.common.errors import UserError
from turbos.text.messages import Message

TINY = ServePlan(
    threads=1, streams=4, rounds=1, shortest=3, longest=12, answer=8, turns=3, question=6, reply=5, changed=1,
    document=40, memory=1 << 26, peer=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", gguf_model("granite, wide"))


@asynccontextmanager
async def saying(*pieces: bytes) -> AsyncIterator[Address]:
    """A server that says the same to everyone, piece by piece."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield Address(*server.sockets[0].getsockname()[:2])


def chunked(*events: object) -> list[bytes]:
    """Events as a server sends them, each in a chunk of its own."""
    lines = [b"data: " + (one if isinstance(one, bytes) else json.dumps(one).encode()) + b"\n\n" for one in events]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(b"%x\r\n%s\r\n" % (len(line), line) for line in lines), b"0\r\n\r\n"]


def text_event(text: str) -> object:
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


async def heard(*pieces: bytes) -> object:
    async with saying(*pieces) as address:
        (streamed,) = await ask_all(address, "/v1/chat/completions", [{}])
        return streamed


def test_the_client_stamps_parts_as_they_come() -> None:
    usage = {"choices": [], "usage": {"completion_tokens": 7}}
    pieces = chunked(text_event(""), text_event("2 plus"), text_event(" 2"), usage, b"[DONE]")
    streamed = asyncio.run(heard(*pieces))
    assert (streamed.text, streamed.tokens, len(streamed.parts)) == ("2 plus 2", 7, 2)
    assert 0.03 < streamed.first < streamed.parts[1] < streamed.end and streamed.gaps[0] > 0.01
    # However the bytes are cut, the same is read.
    whole = b"".join(pieces)
    again = asyncio.run(heard(*(whole[start : start + 11] for start in range(0, len(whole), 11))))
    assert (again.text, again.tokens) == ("2 plus 2", 7)


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 4\r\n\r\nslow"], r"no whole answer \(429\): slow"),
        (chunked(text_event("2"))[:-1], r"no whole answer \(200\)"),
        (chunked(text_event("2"), {"error": {"message": "lost"}}, b"[DONE]"), "an answer failed: .*lost"),
        (chunked(text_event(""), b"[DONE]"), "has no text"),
    ],
)
def test_what_is_no_answer_is_not_measured(pieces: list[bytes], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        asyncio.run(heard(*pieces))


def test_every_round_asks_otherwise_and_every_run_the_same() -> None:
    plan = ServePlan()
    first, second = plan.requests(0), plan.requests(1)
    assert first == ServePlan().requests(0) and not set(first) & set(second)
    assert len({text.split()[0] for text in first}) > 40, "they must not begin alike"
    lengths = [len(text.split()) for text in first]
    assert min(lengths) == plan.shortest and max(lengths) == plan.longest - 1
    kept, edited = plan.edited()
    question = plan.questions()[plan.changed]
    assert question.startswith(kept) and edited.startswith(kept) and question != edited
    assert len(kept.split()) == plan.question // 2 and len(edited.split()) == plan.question


def test_the_engine_alone_is_given_what_the_server_gives_it() -> None:
    service = tiny_service()
    expected = service.prompt([Message("user", "gcd of 12 and 18?")])
    prompt = Prompt.of(service.tokenizer, "gcd of 12 and 18?")
    assert (prompt.ids, (prompt.mark,)) == (expected.ids, expected.marks)


def test_rows_of_a_load() -> None:
    times = Times({OURS: [2.0, 4.0, 3.0], ENGINE: [1.8, 3.6, 2.7], PEER: [6.0, 8.0, 9.0]})
    ours, engine, peer = Heard([1.0, 2.0], [0.1], [1.5]), Heard([0.5, 1.0]), Heard([4.0, 3.0], [0.2], [3.0])
    rows = {row.name: row for row in load_rows(Load(300, times, {OURS: ours, ENGINE: engine, PEER: peer}), 64)}
    whole = rows["serve aggregate 64"]
    assert whole.value == 100.0 and whole.ratios == pytest.approx({ENGINE: 0.9, PEER: 3.0})
    assert rows["serve first token p50 64"] == Row("serve first token p50 64", 1000, "ms", {ENGINE: 0.5, PEER: 3.0})
    assert rows["serve between tokens p99"].ratios == {PEER: 2.0}
    assert rows["serve longest / median 64"].ratios == {PEER: 2.0}


def test_rows_of_what_is_read_again() -> None:
    ours, theirs = {"repeated": Reread(90, 0, 0)}, {"repeated": Reread(90, 4, 0)}
    assert list(reread_rows(ours, theirs)) == [
        Row("serve reread repeated", 0.0, "tokens of 90, 0 new", {"llama-server": 4.0}),
        Row("llama-server reread repeated", 4.0, "tokens of 90, 0 new"),
    ]
    assert list(reread_rows(ours, {})) == [Row("serve reread repeated", 0.0, "tokens of 90, 0 new")]


def test_a_picture_shows_what_was_counted(tmp_path: Path) -> None:
    rows = [
        Row("serve aggregate 64", 600.0, "tok/s", {"engine": 0.9, "llama-server": 2.0}),
        Row("serve first token p50 64", 100.0, "ms", {"engine": 0.5}),
        *reread_rows({"repeated": Reread(90, 0, 0)}, {"repeated": Reread(90, 4, 0)}),
    ]
    assert values_of(PANELS[3], rows[2:3], rows) == {"turbos serve": [0.0], "llama-server": [4.0]}
    assert values_of(PANELS[1], rows[1:2], rows) == {"turbos serve": [100.0], "engine": [50.0]}
    assert draw_serve(rows, tmp_path / "new" / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_a_server_under_load_and_read_again(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = open_checkpoint(checkpoint).tokenizer
    with start_engine(checkpoint, TINY) as engine, start_server(checkpoint, TINY, tmp_path / "sessions") as server:
        texts = TINY.requests(0)
        alone = engine.ask({"texts": texts, "answer": TINY.answer})
        assert alone["tokens"] == TINY.streams * TINY.answer and len(alone["firsts"]) == TINY.streams
        bodies = [chat_body(text, TINY.answer) for text in texts]
        chats = asyncio.run(ask_all(server.address, "/v1/chat/completions", bodies))
        assert [chat.tokens for chat in chats] == [TINY.answer] * TINY.streams
        # The chats become the tokens that the engine alone is given.
        continued = [text_body(ids, TINY.answer) for ids in alone["prompts"]]
        again = asyncio.run(ask_all(server.address, "/v1/completions", continued))
        assert [one.text for one in again] == [chat.text for chat in chats]

        held = hold_chat(ChatTalk(server.address, TINY.reply), TINY, tokenizer)
        assert list(held.cases) == ["repeated", "appended", "edited", "document"]
        assert held.cases["repeated"].read == 0 and held.cases["repeated"].new == 0
        for case in ("appended", "edited"):
            one = held.cases[case]
            assert 0 < one.new <= one.read < one.prompt, case
        # An edit is read from the beginning of its message on, and not from earlier.
        assert held.cases["edited"].read <= held.cases["edited"].new + len(tokenizer.encode(TINY.edited()[0])) + 3
        session = hold_session(SessionTalk(server.address, TINY.reply), TINY)
        assert 0 < session.cases["forked"].read <= session.cases["forked"].new + 2
        with pytest.raises(RuntimeError, match="404"):
            ask_one(server.address, "/v1/nothing", {})


def test_servers_of_unlike_models_are_not_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tops = {f"token {place}": -float(place) for place in range(20)}
    shift = 0.01

    def ask_one(address: Address, path: str, body: object) -> object:
        if path == "/v1/completions":
            return {"choices": [{"logprobs": {"top_logprobs": [tops]}}]}
        ranks = [{"token": token, "logprob": logprob + shift} for token, logprob in tops.items()]
        return {"completion_probabilities": [{"top_logprobs": ranks}]}

    monkeypatch.setattr(bench, "ask_one", ask_one)
    address = Address("here", 1)
    require_same_model(address, address, [[1], [2]])
    assert "0.010 nats apart, the likeliest token is the same after 2 of 2" in capsys.readouterr().err
    shift = 0.5
    with pytest.raises(RuntimeError, match="not serve the same model"):
        require_same_model(address, address, [[1], [2]])


def test_a_program_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    says_why = pytest.raises(UserError, match=r"turbos serve gives no answer: .*nothing")
    with says_why, start_server(tmp_path / "nothing", TINY, tmp_path / "sessions"):
        pass


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["serve", "--threads", "0"], "--threads must be at least 1"),
        (["serve", "--checkpoint", "no/such"], "no/such"),
        (["serve", "--lengths", "64"], "--lengths says nothing with serve"),
        (["decode", "--checkpoint", "runs"], "--checkpoint says nothing with decode"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1


def test_a_peer_that_is_not_there_is_left_out_in_a_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "xllamacpp" else found(name))
    assert bench._peer_file(open_checkpoint(checkpoint), tmp_path) is None
    assert "llama-server is left out: not installed" in capsys.readouterr().err


def test_key_figures_of_guidellm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    percentiles = {"p50": 10.0, "p90": 20.0, "p99": 30.0}
    names = (*(key for key, _ in RATES.values()), *(key for key, _ in LATENCIES.values()))
    metrics = {name: {"successful": {"mean": 12.0, "percentiles": percentiles}} for name in names}
    metrics["request_totals"] = {"successful": 99, "errored": 1, "incomplete": 0}
    run = {"metrics": metrics, "config": {"strategy": {"streams": 64}}, "duration": 60.2}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"metadata": {"guidellm_version": "0.8"}, "benchmarks": [run]}))
    rows = guidellm_rows(report)
    assert rows[0] == ("written", 12.0, None, None, None, "tok/s")
    assert rows[2] == ("first token", 12.0, 10.0, 20.0, 30.0, "ms") and rows[-2][:2] == ("errored requests", 1)
    assert collect.guidellm_result(report, "guidellm run").command == "guidellm run (guidellm 0.8, 64 streams, 60 s)"
    report.write_text("{}")
    assert collect.main(["guidellm", str(report)]) == 2
    assert "is no JSON report of guidellm" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_prints_rows_and_draws(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "serve.png"
    monkeypatch.setattr("turbos.bench.serve_plan.ServePlan", lambda: TINY)
    assert cli.main(["bench", "serve", "--checkpoint", str(checkpoint), "--json", "--png", str(out)]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert {f"serve reread {case}" for case in CASES} < set(rows) and out.exists()
    assert rows["serve aggregate 4"]["ratios"].keys() == {"engine"}
    restarted = rows["serve reread restarted"]
    assert 0 < restarted["value"] < 60 and "new" in restarted["unit"]


@pytest.mark.slow
def test_rows_against_llama_server(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    plan = ServePlan(**{**vars(TINY), "peer": True})
    rows = {row.name: row for row in bench_serve(plan, model=gguf_model("granite, wide"))}
    assert rows["serve aggregate 4"].ratios.keys() == {"engine", "llama-server"}
    for case in CASES:
        assert f"llama-server reread {case}" in rows and "llama-server" in rows[f"serve reread {case}"].ratios
    assert all(row.value >= 0 and all(ratio > 0 for ratio in row.ratios.values()) for row in rows.values())


def test_a_checkpoint_of_another_layout_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbos.text.tokenizer.Tokenizer.speaks_chat", False)
    with pytest.raises(UserError, match="its chat template is its own"):
        open_checkpoint(save_tiny(tmp_path / "foreign"))
