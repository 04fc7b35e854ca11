"""Sessions and their states on disk: a restart reads nothing again, and what is damaged costs time, never words."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import httpx
import pytest

from serve_cases import serving, tiny_engine, tiny_service
from session_cases import Talk, keeping
from tiny import tiny_model, tiny_tokenizer
from turbos.common.errors import UserError
from turbos.engine.engine import Engine
from turbos.serve.app import create_app
from turbos.serve.service import Service, Usage
from turbos.serve.sessions.directory import Directory
from turbos.serve.sessions.records import Turn
from turbos.serve.sessions.routes import sessions_router
from turbos.serve.sessions.sessions import Sessions
from turbos.serve.sessions.store import NoSession, Store
from turbos.text.messages import Message, ToolCall
from turbos.text.tokenizer import Tokenizer

QUESTION = "gcd of 12 and 18? " * 20
NEXT = "and of 6 and 12?"


def state_of(directory: Path, id: str) -> Path:
    """Where the state of a session lies."""
    return directory / "states" / f"{id}.state"


def saved_talk(directory: Path) -> tuple[str, int]:
    """A session that was saved by a server that stopped; its id, and all its tokens."""
    with keeping(directory) as server:
        talk = Talk.begin(server)
        usage = talk.say(QUESTION).usage
        saved = talk.post("save")
        assert saved["saved"] and saved["saved_turns"] == 2
        # What was cut off is ended by one token more.
        total = usage["prompt_tokens"] + usage["completion_tokens"] + 1
        assert saved["saved_tokens"] == total
        return talk.id, total


def next_answer(directory: Path) -> str:
    """What is answered to the next question where nothing was ever stopped."""
    with keeping(directory) as server:
        talk = Talk.begin(server)
        talk.say(QUESTION)
        return talk.say(NEXT).content


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer of a server that was never stopped."""
    return next_answer(tmp_path_factory.mktemp("never stopped"))


def test_a_saved_session_goes_on_without_being_read_again(tmp_path: Path, wanted: str) -> None:
    id, total = saved_talk(tmp_path)
    with keeping(tmp_path) as server:
        read = server.service.engine.metrics().read_tokens
        said = Talk(server, id).say(NEXT)
        assert said.usage["cached_tokens"] == total and said.content == wanted and not said.of("notice")
        assert server.service.engine.metrics().read_tokens - read == said.usage["prompt_tokens"] - total


def test_a_server_that_stops_saves_what_was_spoken_in(tmp_path: Path, wanted: str) -> None:
    with keeping(tmp_path) as server:
        talk, quiet = Talk.begin(server), Talk.begin(server)
        usage = talk.say(QUESTION).usage
        assert not state_of(tmp_path, talk.id).exists()
    assert state_of(tmp_path, talk.id).exists() and not state_of(tmp_path, quiet.id).exists()
    with keeping(tmp_path) as server:
        said = Talk(server, talk.id).say(NEXT)
        assert said.usage["cached_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] - 1
        assert said.content == wanted


def test_a_server_that_stops_ends_answers_and_keeps_them(tmp_path: Path) -> None:
    with keeping(tmp_path) as server:
        talk = Talk.begin(server)
        with talk.asking(QUESTION, max_tokens=4000) as events:
            next(events), next(events)
            server.uvicorn.should_exit = True
            with pytest.raises(httpx.RemoteProtocolError):
                list(events)
    with keeping(tmp_path) as server:
        turns = Talk(server, talk.id).get()["turns"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] and turns[1]["finish"] == "cancelled"
        usage = turns[1]["usage"]
        cached = Talk(server, talk.id).say(NEXT).usage["cached_tokens"]
        assert cached == usage["prompt_tokens"] + usage["completion_tokens"] - 1


def test_without_a_state_the_words_are_read_again(tmp_path: Path, wanted: str) -> None:
    id, _ = saved_talk(tmp_path)
    state_of(tmp_path, id).unlink()
    with keeping(tmp_path) as server:
        said = Talk(server, id).say(NEXT)
        assert said.usage["cached_tokens"] == 0 and said.content == wanted
        assert "no state on disk" in said.of("notice")[0]["message"]


@pytest.mark.parametrize("damage", ["a byte", "a half", "empty", "text"])
def test_a_damaged_state_is_refused_by_name(tmp_path: Path, wanted: str, damage: str) -> None:
    id, _ = saved_talk(tmp_path)
    path = state_of(tmp_path, id)
    data = path.read_bytes()
    changed = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
    path.write_bytes(
        {"a byte": changed, "a half": data[: len(data) // 2], "empty": b"", "text": b"hello " * 99}[damage]
    )
    with keeping(tmp_path) as server:
        talk = Talk(server, id)
        refused = server.post(f"{talk.path}/load", None)
        assert refused.status_code == 400
        for message in (refused.json()["error"]["message"], talk.say(NEXT).of("notice")[0]["message"]):
            assert f"states/{id}.state" in message and "corrupted" in message and str(tmp_path) not in message
        assert talk.contents()[-1] == ("assistant", wanted)
        # The engine has the state now, and the next save mends the file.
        assert not talk.say("and?").of("notice") and talk.post("save")["saved"]
        assert talk.post("load")["saved"]


def test_a_state_of_other_weights_is_refused(tmp_path: Path) -> None:
    id, _ = saved_talk(tmp_path)
    ends = tiny_engine().eos_ids
    other = Engine(tiny_model(seed=1), tiny_tokenizer(), tiny_engine().config, ends)
    with keeping(tmp_path, Service(other, "other")) as server:
        said = Talk(server, id).say(NEXT)
        assert "other weights" in said.of("notice")[0]["message"] and said.usage["cached_tokens"] == 0


def test_a_state_of_turns_that_were_taken_back_goes(tmp_path: Path, wanted: str) -> None:
    with keeping(tmp_path) as server:
        talk = Talk.begin(server)
        talk.say(QUESTION)
        talk.say("something else")
        talk.post("save")
        stale = state_of(tmp_path, talk.id).read_bytes()
        talk.post("undo")
        assert not state_of(tmp_path, talk.id).exists() and not talk.get()["saved"]
    # As a crash between the two halves of `undo` leaves it.
    state_of(tmp_path, talk.id).write_bytes(stale)
    with keeping(tmp_path) as server:
        said = Talk(server, talk.id).say(NEXT)
        assert said.content == wanted and "other turns" in said.of("notice")[0]["message"]
        assert not state_of(tmp_path, talk.id).exists()


def test_a_state_that_the_engine_forgot_is_read_from_disk(tmp_path: Path, wanted: str) -> None:
    with keeping(tmp_path) as server:
        talk = Talk.begin(server)
        talk.say(QUESTION)
        saved = talk.post("save")["saved_tokens"]
        server.service.engine.cache.clear()
        said = talk.say(NEXT)
        assert said.usage["cached_tokens"] == saved and said.content == wanted


def test_saving_reads_what_the_engine_forgot(tmp_path: Path, wanted: str) -> None:
    with keeping(tmp_path) as server:
        talk = Talk.begin(server)
        usage = talk.say(QUESTION).usage
        server.service.engine.cache.clear()
        assert talk.post("save")["saved_tokens"] >= usage["prompt_tokens"] + usage["completion_tokens"] - 1
    with keeping(tmp_path) as server:
        said = Talk(server, talk.id).say(NEXT)
        assert said.content == wanted and said.usage["cached_tokens"] > usage["prompt_tokens"]


def test_a_fork_shares_the_state_on_disk(tmp_path: Path, wanted: str) -> None:
    id, total = saved_talk(tmp_path)
    with keeping(tmp_path) as server:
        fork = Talk(server, id).fork(2)
        assert fork.get()["saved"] and not Talk(server, id).fork(1).get()["saved"]
        server.post(f"/v1/sessions/{id}/undo", None)
    with keeping(tmp_path) as server:
        said = Talk(server, fork.id).say(NEXT)
        assert said.usage["cached_tokens"] == total and said.content == wanted


def test_an_empty_session_has_no_state(tmp_path: Path) -> None:
    with keeping(tmp_path) as server:
        talk = Talk.begin(server)
        refused = server.post(f"{talk.path}/save", None)
        assert refused.status_code == 400 and "nothing was said" in refused.text
        assert server.post(f"{talk.path}/load", None).status_code == 400
        assert talk.say("gcd?").finish["turn"] == 1


def test_halves_and_orphans_are_swept(tmp_path: Path) -> None:
    id, _ = saved_talk(tmp_path)
    states = tmp_path / "states"
    (states / f".{id}.state.saving").write_bytes(b"half")
    (states / f"{'a' * 32}.state").write_bytes(b"of a session that is no more")
    with keeping(tmp_path):
        assert [file.name for file in states.iterdir()] == [f"{id}.state"]


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    with keeping(tmp_path), pytest.raises(UserError, match=r"another server \(process \d+\) keeps its sessions here"):
        Sessions.open(tiny_service(), tmp_path)
    with keeping(tmp_path) as server:
        assert Talk.begin(server).contents() == []


def test_a_directory_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="name another directory with --sessions"):
            Directory.open(path)
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "index.sqlite").write_bytes(b"no database" * 1000)
    for _ in range(2):  # the lock was let go
        with pytest.raises(UserError, match=r"garbage/index\.sqlite: .*not a database"):
            Sessions.open(tiny_service(), tmp_path / "garbage")


def test_only_its_owner_reads_it(tmp_path: Path) -> None:
    Directory.open(tmp_path / "new").close()
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


def test_a_state_has_no_other_name_than_an_id(tmp_path: Path) -> None:
    directory = Directory.open(tmp_path)
    for name in ("", "../x", "A" * 32, "a" * 31, "a" * 32 + "\n", "a" * 33, "/" + "a" * 32):
        with pytest.raises(ValueError, match="no id"):
            directory.state(name)
    directory.close()


# The index


def turn_examples() -> list[Turn]:
    """One of each kind."""
    calls = (ToolCall("add", '{"a": "x\\ny"}'), ToolCall("gcd"))
    usage = Usage(9, 4, 5, 2)
    return [
        Turn(Message("system", "be\0 brief\n又"), 1.0),
        Turn(Message("user", "\u2028 😀"), 2.0),
        Turn(Message("assistant", "6", "", (1, 0, 319), calls), 3.5, "stop", "", usage),
        Turn(Message("user", "and?"), 4.0),
        Turn(Message("assistant", "", None, ()), 5.0, "error", "no token allowed", Usage(20, 0, 1, 0)),
    ]


def test_turns_come_back_as_they_were(tmp_path: Path) -> None:
    store = Store(tmp_path / "index.sqlite", tiny_tokenizer())
    session = store.create("one")
    examples = turn_examples()
    assert [store.add(session.id, turn, "a title") for turn in examples] == [0, 1, 2, 3, 4]
    assert store.turns(session.id) == tuple(examples) and store.session(session.id).title == "one"
    store.close()
    store = Store(tmp_path / "index.sqlite", tiny_tokenizer())
    assert store.turns(session.id) == tuple(examples)
    assert store.turns(store.fork(session.id, 3, "two").id) == tuple(examples[:3])
    assert store.cut(session.id, 1).num_turns == 1 and store.turns(session.id) == tuple(examples[:1])
    store.close()


def test_tokens_of_another_tokenizer_are_texts(tmp_path: Path) -> None:
    store = Store(tmp_path / "index.sqlite", tiny_tokenizer())
    session = store.create()
    for turn in turn_examples():
        store.add(session.id, turn)
    store.close()
    store = Store(tmp_path / "index.sqlite", Tokenizer.train(["another one"] * 3, vocab_size=304))
    messages = [turn.message for turn in store.turns(session.id)]
    assert [message.ids for message in messages] == [None] * 5
    assert messages[2].content == "6" and len(messages[2].tool_calls) == 2
    # It said nothing, which only its tokens could say.
    assert messages[4].thinking == ""
    store.close()


def test_what_is_noted_of_a_state_follows_the_turns(tmp_path: Path) -> None:
    store = Store(tmp_path / "index.sqlite", tiny_tokenizer())
    id = store.create().id
    for turn in turn_examples():
        store.add(id, turn)
    store.mark_saved(id, 17, 3)
    assert store.fork(id, 2, "").saved_tokens is None
    assert store.fork(id, 3, "").saved_tokens == store.fork(id, 5, "").saved_tokens == 17
    assert store.cut(id, 3).saved_tokens == 17 and store.cut(id, 2).saved_tokens is None
    store.close()


def test_no_session_is_named_by_anything_else(tmp_path: Path) -> None:
    store = Store(tmp_path / "index.sqlite", tiny_tokenizer())
    store.create()
    for id in ("", "%", "' OR 1 = 1 --", "../index"):
        for act in (store.session, store.turns, store.delete):
            with pytest.raises(NoSession):
                act(id)
    assert len(store.recent(10)) == 1
    store.close()


def test_a_full_disk_is_told_and_keeps_what_there_was(tmp_path: Path) -> None:
    service = tiny_service()
    sessions = Sessions.open(service, tmp_path)
    database = sessions._store._database
    app = create_app(service, closing=[sessions.close])
    app.include_router(sessions_router(sessions))
    with serving(service, app=app) as server:
        talk = Talk.begin(server)
        talk.say(QUESTION)
        before = talk.contents()
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")
        said = talk.say("x" * 900, max_tokens=2)
        assert "disk is full" in said.of("error")[0]["message"] and str(tmp_path) not in str(said.events)
        assert said.of("error")[0]["code"] == "server_error" and talk.contents() == before
        refused = server.post("/v1/sessions", {"title": "y" * 200, "system": "z" * 9000})
        assert refused.status_code == 507 and refused.json()["error"]["code"] == "storage_failed"
        database.execute("PRAGMA max_page_count = 100000")
        assert talk.say("and?").finish["turn"] == 3 and server.wait_idle(1.0)
        (tmp_path / "states").rmdir()
        refused = server.post(f"/v1/sessions/{talk.id}/save", {})
        assert refused.status_code == 507 and refused.json()["error"]["code"] == "storage_failed"
        (tmp_path / "states").mkdir()
        assert server.post(f"/v1/sessions/{talk.id}/save", {}).status_code == 200


def test_a_transaction_that_fails_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "index.sqlite", tiny_tokenizer())
    id = store.create().id
    with pytest.raises(UnicodeEncodeError):
        store.add(id, Turn(Message("user", "\ud800"), 1.0))
    assert store.turns(id) == () and store.session(id).num_turns == 0
    store.close()
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("PRAGMA user_version = 9")
    with pytest.raises(UserError, match=r"index\.sqlite: written by another version \(9"):
        Store(tmp_path / "index.sqlite", tiny_tokenizer())
