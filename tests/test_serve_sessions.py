"""Sessions over HTTP, on a real server with a tiny model: said, forked, taken back, listed, stopped, refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve_cases import PATIENCE, Server
from session_cases import Talk, keeping
from turbos.serve.limits import ServeOptions

LONG = {"max_tokens": 600, "temperature": 0}
SOON = 1.0
"""Seconds in which a slot must be free after its client vanished."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with keeping(tmp_path_factory.mktemp("sessions")) as server:
        yield server


def fresh(server: Server) -> Talk:
    """A session with two turns."""
    talk = Talk.begin(server)
    talk.say("gcd of 12 and 18?")
    return talk


def test_a_turn_is_kept_as_it_was_streamed(server: Server) -> None:
    talk = Talk.begin(server)
    said = talk.say("gcd of 12 and 18?\nplease", thinking="budget 4")
    session = talk.get()
    assert session["title"] == "gcd of 12 and 18?" and session["turns_count"] == 2 and not session["answering"]
    question, answer = session["turns"]
    assert (question["index"], question["role"], question["content"]) == (0, "user", "gcd of 12 and 18?\nplease")
    assert (answer["index"], answer["role"], answer["content"]) == (1, "assistant", said.content)
    assert answer["thinking"] == said.thinking and answer["thinking_tokens"] == 4 == said.usage["reasoning_tokens"]
    assert answer["usage"] == said.usage and answer["finish"] == said.finish["reason"] == "length"
    assert said.usage["completion_tokens"] == 12 and said.usage["cached_tokens"] == 0
    kinds = [event["type"] for event in said.events]
    assert kinds[0] == "start" and kinds[-2:] == ["html", "finish"] and said.events[0]["turn"] == 1
    assert said.of("html")[0]["html"] == answer["html"] == f"<p>{len(said.content)}</p>" and question["html"] is None
    assert said.finish["turn"] == 1 and said.finish["session"] == talk.id and said.finish["state_bytes"] > 0
    assert said.finish["seconds"]["reading"] > 0 and said.finish["tokens_per_second"] > 0


def test_only_what_is_new_is_read(server: Server) -> None:
    """All tokens before the new question but the one that ended the last answer."""
    talk = Talk.begin(server)
    before = 0
    for question in ("gcd of 12 and 18? " * 20, "and of 18 and 27?", "add 12 and 34"):
        usage = talk.say(question, thinking="budget 3").usage
        assert usage["cached_tokens"] == max(0, before - 1)
        before = usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("thinking", ["on", "off", "budget 3"])
def test_a_session_answers_as_the_chat_interface_does(server: Server, thinking: str) -> None:
    talk, client, messages = Talk.begin(server), server.client(), []
    for question in ("gcd of 12 and 18?", "and?"):
        said = talk.say(question, thinking=thinking)
        messages.append({"role": "user", "content": question})
        options = {"max_tokens": 12, "temperature": 0, "extra_body": {"thinking": thinking}}
        answer = client.chat.completions.create(model="tiny", messages=messages, **options).choices[0].message
        assert answer.content == said.content and (answer.model_extra or {}).get("reasoning", "") == said.thinking
        messages.append({"role": "assistant", "content": answer.content, "reasoning": said.thinking})


def test_a_switch_in_the_message_is_heard(server: Server) -> None:
    def length(question: str, **options: object) -> int:
        return Talk.begin(server).say(question, **options).usage["prompt_tokens"]

    # Each tag is a token of the prompt.
    plain = length("gcd? /thinK")
    assert (
        length("gcd? /think")
        == length("gcd? /think", thinking="auto")
        == length("gcd? /thinK", thinking="on")
        == plain + 1
    )
    assert length("gcd? /no_think") == length("gcd? /no_think", thinking="off") == length("gcd? /no_thinK") + 2


def test_a_fork_goes_on_from_before_a_turn(server: Server) -> None:
    talk = Talk.begin(server)
    first = talk.say("gcd of 12 and 18? " * 10)
    talk.say("and of 6 and 12?")
    kept = talk.contents()
    fork, other = talk.fork(2), talk.fork(2)
    assert fork.contents() == kept[:2] and fork.get()["parent"] == talk.id
    said = fork.say("add 12 and 34")
    assert said.usage["cached_tokens"] == first.usage["prompt_tokens"] + first.usage["completion_tokens"] - 1
    assert other.say("add 12 and 34").content == said.content and talk.contents() == kept
    assert talk.fork().contents() == kept and talk.fork(0).contents() == []
    talk.server.post(f"{fork.path}/undo", None)
    assert talk.contents() == kept


def test_a_fork_before_an_answer_is_answered_without_a_question(server: Server) -> None:
    talk = fresh(server)
    fork = talk.fork(1)
    said = fork.say(None)
    assert said.content == talk.get()["turns"][1]["content"] and fork.contents() == talk.contents()
    refused = server.post(f"{fork.path}/messages", {})
    assert refused.status_code == 400 and "after a assistant turn" in refused.json()["error"]["message"]


def test_an_unanswered_question_is_read_with_the_next(server: Server) -> None:
    talk = fresh(server).fork(1)
    usage = talk.say("and?").usage
    assert usage["prompt_tokens"] == Talk.begin(server).say("gcd of 12 and 18?\n\nand?").usage["prompt_tokens"]
    assert [role for role, _ in talk.contents()] == ["user", "user", "assistant"]


def test_undo_takes_the_last_question_back(server: Server) -> None:
    talk = fresh(server)
    before = talk.contents()
    said = talk.say("and of 6 and 12?")
    undone = talk.post("undo")
    assert undone["undone"] == "and of 6 and 12?" and talk.contents() == before
    assert [turn["content"] for turn in undone["turns"]] == [content for _, content in before]
    again = talk.say("and of 6 and 12?")
    assert again.content == said.content and again.usage["cached_tokens"] > 0
    talk.post("undo")
    talk.post("undo")
    refused = server.post(f"{talk.path}/undo", None)
    assert refused.status_code == 400 and "nothing was asked" in refused.text and talk.contents() == []


def test_a_system_message_comes_first_and_stays(server: Server) -> None:
    talk = Talk.begin(server, system="add 12 and 34")
    talk.say("gcd?")
    talk.post("undo")
    assert talk.contents() == [("system", "add 12 and 34")]
    assert talk.say("gcd?").usage["prompt_tokens"] > Talk.begin(server).say("gcd?").usage["prompt_tokens"]


def test_the_list_has_the_last_one_first(tmp_path: Path) -> None:
    with keeping(tmp_path) as server:
        made = [Talk.begin(server, title=f"number {number}") for number in range(4)]
        made[1].say("gcd?")
        answer = httpx.get(f"{server.url}/v1/sessions").json()
        assert answer["object"] == "list"
        assert [one["title"] for one in answer["data"]] == ["number 1", "number 3", "number 2", "number 0"]
        page = httpx.get(f"{server.url}/v1/sessions?limit=2&offset=1").json()["data"]
        assert [one["id"] for one in page] == [made[3].id, made[2].id]
        renamed = httpx.patch(f"{server.url}{made[0].path}", json={"title": "../../x <b>"}).json()
        assert renamed["title"] == made[0].get()["title"] == "../../x <b>" and renamed["id"] == made[0].id
        made[1].post("save")
        assert httpx.delete(f"{server.url}{made[1].path}").json()["deleted"] and not list(
            (tmp_path / "states").iterdir()
        )
        assert httpx.get(f"{server.url}{made[1].path}").status_code == 404
        assert len(httpx.get(f"{server.url}/v1/sessions").json()["data"]) == 3
        assert made[0].get()["turns"] == []


def test_one_answer_at_a_time(server: Server) -> None:
    talk = fresh(server)
    other = fresh(server)
    before = talk.contents()
    with talk.asking("go on", **LONG) as events:
        next(events), next(events)
        assert talk.get()["answering"] and talk.contents() == [*before, ("user", "go on")]
        for path, body in (("messages", {"content": "and?"}), ("undo", None), ("save", None), ("load", None)):
            refused = server.post(f"{talk.path}/{path}", body)
            assert refused.status_code == 409 and refused.json()["error"]["code"] == "session_busy", path
        assert talk.fork(2).contents() == before
        assert other.say("and?").finish["turn"] == 3
        stopped = talk.post("stop")
        rest = list(events)
    assert rest[-1]["type"] == "finish" and rest[-1]["reason"] == "cancelled" == stopped["turns"][-1]["finish"]
    assert stopped["turns"][-1]["content"] and len(stopped["turns"]) == 4 and not stopped["answering"]
    assert talk.say("and?").usage["cached_tokens"] >= stopped["turns"][-1]["usage"]["prompt_tokens"]


def test_who_stops_an_answer_goes_on_from_there(server: Server) -> None:
    talk = Talk.begin(server)
    with talk.asking("gcd of 12 and 18?", **LONG) as events:
        for _ in range(20):
            next(events)
        talk.post("stop")
    usage = talk.get()["turns"][-1]["usage"]
    assert usage["completion_tokens"] >= 15
    assert talk.say("and?").usage["cached_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] - 1


def test_a_client_that_vanishes_leaves_what_was_written(server: Server) -> None:
    talk = Talk.begin(server)
    with talk.asking("gcd of 12 and 18?", **LONG) as events:
        for _ in range(5):
            next(events)
    vanished = time.monotonic()
    assert server.wait_idle(SOON)
    while talk.get()["answering"]:
        assert time.monotonic() < vanished + SOON
    question, answer = talk.get()["turns"]
    assert question["content"] == "gcd of 12 and 18?" and answer["finish"] == "cancelled" and answer["content"]
    assert talk.say("and?").finish["turn"] == 3


def test_many_that_vanish_leave_no_slot_and_no_half_turn(server: Server) -> None:
    talks = [Talk.begin(server) for _ in range(20)]
    for number, talk in enumerate(talks):
        with talk.asking("gcd of 12 and 18?", **LONG) as events:
            for _ in range(number % 4):
                next(events)
    assert server.wait_idle(SOON)
    for talk in talks:
        deadline = time.monotonic() + PATIENCE
        while talk.get()["answering"]:
            assert time.monotonic() < deadline
        roles = [role for role, _ in talk.contents()]
        assert roles in ([], ["user"], ["user", "assistant"])
        assert talk.say("and?").finish["turn"] == len(roles) + 1


def test_sessions_side_by_side_are_as_alone(server: Server) -> None:
    alone = Talk.begin(server).say("gcd of 12 and 18?", **LONG).content
    talks = [Talk.begin(server) for _ in range(3)]
    with talks[0].asking("gcd of 12 and 18?", **LONG) as one, talks[1].asking("gcd of 12 and 18?", **LONG) as two:
        next(one), next(two)
        assert talks[2].say("add 12 and 34").content
        assert not talks[2].get()["answering"]
        list(one), list(two)
    assert alone == talks[0].get()["turns"][1]["content"] == talks[1].get()["turns"][1]["content"]


BAD = [
    ("POST", "", {"title": "x" * 201}, 400, "title"),
    ("POST", "", {"title": 3}, 400, "title"),
    ("POST", "", {"name": "x"}, 400, "unknown option name"),
    ("POST", "", {"system": ""}, 400, "system"),
    ("POST", "", [], 400, ""),
    ("GET", "?limit=0", None, 400, "limit"),
    ("GET", "?limit=x", None, 400, "limit"),
    ("GET", "?offset=-1", None, 400, "offset"),
    ("GET", "/nothing", None, 404, "no such session"),
    ("GET", "/" + "0" * 32, None, 404, "no such session"),
    ("GET", "/..%2F..%2Findex.sqlite", None, 404, ""),
    ("GET", "/%2e%2e", None, 404, ""),
    ("DELETE", "/%00", None, 404, "no such session"),
    ("DELETE", "/" + "a" * 300, None, 400, "id"),
    ("PATCH", "/nothing", {"title": "x"}, 404, "no such session"),
    ("POST", "/nothing/save", None, 404, "no such session"),
    ("POST", "/nothing/load", None, 404, "no such session"),
    ("POST", "/nothing/undo", None, 404, "no such session"),
    ("POST", "/nothing/stop", None, 404, "no such session"),
    ("POST", "/nothing/fork", {}, 404, "no such session"),
    ("POST", "/nothing/messages", {"content": "x"}, 404, "no such session"),
    ("PATCH", "/ID", {}, 400, "title"),
    ("PUT", "/ID", {}, 405, ""),
    ("POST", "/ID/fork", {"turn": 3}, 400, "turn must lie between 0 and 2"),
    ("POST", "/ID/fork", {"turn": -1}, 400, "turn"),
    ("POST", "/ID/fork", {"turn": "1"}, 400, "turn"),
    ("POST", "/ID/messages", {"content": ""}, 400, "content"),
    ("POST", "/ID/messages", {"content": 7}, 400, "content"),
    ("POST", "/ID/messages", {"content": "x", "thinking": "maybe"}, 400, "thinking must be"),
    ("POST", "/ID/messages", {"content": "x", "thinking": "budget 0"}, 400, "thinking"),
    ("POST", "/ID/messages", {"content": "x", "temperature": -1}, 400, "temperature"),
    ("POST", "/ID/messages", {"content": "x", "top_p": 1.5}, 400, "top_p"),
    ("POST", "/ID/messages", {"content": "x", "max_tokens": 0}, 400, "max_tokens"),
    ("POST", "/ID/messages", {"content": "x", "seed": 1.5}, 400, "seed"),
    ("POST", "/ID/messages", {"content": "x", "n": 2}, 400, "unknown option n"),
    ("POST", "/ID/messages", {"content": "gcd of 12 and 18? " * 40000}, 400, "tokens"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "words"), BAD)
def test_what_cannot_be_is_refused_by_name(
    server: Server, method: str, path: str, body: object, status: int, words: str
) -> None:
    talk = fresh(server)
    before = talk.contents()
    url = f"{server.url}/v1/sessions{path.replace('ID', talk.id)}"
    answer = httpx.request(method, url, json=body, timeout=PATIENCE)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"] and set(answer.json()["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }
    assert talk.contents() == before and not talk.get()["answering"]


@pytest.mark.parametrize("body", [b'{"title": "\\ud800"}', b'{"title": "\xff"}', b"{", b'{"system": "a\\udfffb"}'])
def test_texts_that_are_none_are_refused(server: Server, body: bytes) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/sessions", content=body, headers=headers)
    assert answer.status_code == 400 and answer.json()["error"]["message"]
    talk = fresh(server)
    body = body.replace(b"title", b"content").replace(b"system", b"content")
    assert httpx.post(f"{server.url}{talk.path}/messages", content=body, headers=headers).status_code == 400
    assert len(talk.contents()) == 2


def test_letters_of_all_kinds_are_kept(server: Server) -> None:
    text = "<script>alert(1)</script> \0 <|end|> 12 又 😀 \u2028 </think>"
    talk = Talk.begin(server, title=text)
    talk.say(text)
    assert talk.get()["title"] == text and talk.contents()[0] == ("user", text)


def test_a_full_server_sends_sessions_away(tmp_path: Path) -> None:
    with keeping(tmp_path, options=ServeOptions(max_open=1)) as server:
        talk, other = Talk.begin(server), Talk.begin(server)
        with talk.asking("gcd of 12 and 18?", **LONG) as events:
            next(events)
            refused = server.post(f"{other.path}/messages", {"content": "gcd?"})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert other.contents() == []


def test_an_answer_may_be_cut_where_memory_ends(tmp_path: Path) -> None:
    with keeping(tmp_path, memory=1 << 19, context=64, max_running=1, segment=64) as server:
        longest = server.service.engine.longest
        assert longest is not None
        talk = Talk.begin(server)
        usage = talk.say("gcd of 12 and 18?", max_tokens=1 << 30, thinking="on").usage
        assert usage["prompt_tokens"] + usage["completion_tokens"] <= longest
