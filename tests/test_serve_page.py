"""The page's routes on a real server: files and their policy, info, rendering, the play tab, the meter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from page_cases import serving_page
from serve_cases import PATIENCE, Server
from tiny import tiny_model
from turbos.data.problems import check, make_problem
from turbos.model.card import CARD_FILE
from turbos.serve.limits import ServeOptions
from turbos.serve.page.files import POLICY, page_files
from turbos.serve.page.meter import twin_config
from turbos.serve.page.play import KnownFamily, demo_families, known_problems

KNOWN = (KnownFamily("gcd", 3, (0,)), KnownFamily("addition", 3, (1,)))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving_page(known=KNOWN) as running:
        yield running


def get(server: Server, path: str, **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=PATIENCE)


def events(response: httpx.Response) -> list[dict[str, object]]:
    """The events of a stream that ended as it should."""
    parts = [part.removeprefix("data: ") for part in response.text.split("\n\n") if part]
    assert parts[-1] == "[DONE]"
    return [json.loads(part) for part in parts[:-1]]


def first_event(server: Server, body: object) -> dict[str, object]:
    """The first event of a game that is left at once."""
    with httpx.stream("POST", f"{server.url}/page/api/play", json=body, timeout=PATIENCE) as response:
        found: dict[str, object] = json.loads(next(response.iter_lines()).removeprefix("data: "))
        return found


# Files


def test_the_page_is_served_under_its_policy(server: Server) -> None:
    found = get(server, "/")
    assert found.status_code == 200 and found.headers["content-type"] == "text/html; charset=utf-8"
    assert found.headers["content-security-policy"] == POLICY
    assert found.headers["x-content-type-options"] == "nosniff" and found.headers["referrer-policy"] == "no-referrer"


def test_the_policy_lets_nothing_in_from_elsewhere() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules["default-src"] == "'self'" and not {"script-src", "style-src", "img-src", "connect-src"} & rules.keys()
    assert rules["object-src"] == rules["base-uri"] == rules["frame-ancestors"] == rules["form-action"] == "'none'"


@pytest.mark.parametrize(
    ("name", "kind"), [("app.js", "text/javascript"), ("style.css", "text/css"), ("mark.svg", "image/svg+xml")]
)
def test_files_have_their_type(server: Server, name: str, kind: str) -> None:
    found = get(server, f"/page/{name}")
    assert found.status_code == 200 and found.headers["content-type"].startswith(kind)
    assert found.content == page_files()[name].content


def test_a_file_that_is_known_is_not_sent_again(server: Server) -> None:
    tag = get(server, "/page/app.js").headers["etag"]
    again = get(server, "/page/app.js", **{"If-None-Match": tag})
    assert again.status_code == 304 and not again.content


@pytest.mark.parametrize(
    "path", ["/page/routes.py", "/page/..%2fservice.py", "/page/%2e%2e%2fservice.py", "/page/x", "/page/a/b", "/page/"]
)
def test_no_other_file_can_be_had(server: Server, path: str) -> None:
    assert get(server, path).status_code == 404


def test_every_file_that_the_page_names_is_there() -> None:
    named = re.findall(rb'(?:href|src)="page/([^"]+)"', page_files()["index.html"].content)
    scripts = [file.content for name, file in page_files().items() if name.endswith(".js")]
    imported = [name for script in scripts for name in re.findall(rb'from "\./([^"]+)"', script)]
    assert len(named) >= 4 and len(imported) >= 10
    assert {name.decode() for name in [*named, *imported]} <= page_files().keys()


def test_nothing_of_the_page_names_another_server_or_stands_inline() -> None:
    for name, file in page_files().items():
        addresses = set(re.findall(rb"https?://[^\s\"'`)]+", file.content))
        assert addresses <= {b"http://www.w3.org/2000/svg"}, name
    index = page_files()["index.html"].content
    assert not re.search(rb"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", index)


def test_both_languages_say_the_same_things() -> None:
    source = page_files()["words.js"].content.decode()
    english, chinese = (
        re.search(rf"const {name} = {{(.*?)\n}};", source, re.DOTALL) for name in ("ENGLISH", "CHINESE")
    )
    assert english is not None and chinese is not None
    words = [dict(re.findall(r'(\w+): ("(?:[^"\\]|\\.)*"|\[)', found[1])) for found in (english, chinese)]
    assert words[0].keys() == words[1].keys() and len(words[0]) > 80
    for key in words[0]:
        places = [sorted(re.findall(r"\{(\w+)\}", one[key])) for one in words]
        assert places[0] == places[1], key


def test_all_that_the_page_says_has_words() -> None:
    files = page_files()
    source = files["words.js"].content.decode()
    known = set(re.findall(r'(\w+): (?:"|\[)', source))
    page = files["index.html"].content.decode()
    asked = set(re.findall(r'data-say(?:-label|-hint)?="(\w+)"', page))
    for name, file in files.items():
        if name.endswith(".js"):
            asked |= set(re.findall(r'\bsay\("(\w+)"', file.content.decode()))
    assert len(asked) > 60 and asked <= known, asked - known


# What the tabs ask


def test_info_has_what_a_session_costs(server: Server) -> None:
    info = get(server, "/page/api/info").json()
    plan = server.service.engine.plan
    assert info["model"] == "tiny" and info["thinks"] is True
    assert info["state_bytes"] == plan.state_bytes and info["kv_bytes_per_token"] == plan.kv_bytes_per_token
    assert info["families"][0] == {"name": "gcd", "levels": 3, "trained": [0]}


def test_render(server: Server) -> None:
    html = server.post("/page/api/render", {"text": "**2** <script>alert(1)</script>"}).json()["html"]
    assert html == "<p><strong>2</strong> &lt;script&gt;alert(1)&lt;/script&gt;</p>\n"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("render", {}, "text"),
        ("render", {"text": 1}, "text"),
        ("render", {"text": "x", "also": 1}, "also"),
        ("play", {"family": "lcm"}, "family"),
        ("play", {"family": "gcd", "level": 9}, None),
        ("play", {"family": "gcd", "seed": -1}, "seed"),
        ("meter", {"tokens": 0}, "tokens"),
        ("meter", {"tokens": 1 << 40}, "tokens"),
        ("meter", {"text": None}, "text"),
    ],
)
def test_what_cannot_be_is_a_400_that_names_it(server: Server, path: str, body: object, param: str | None) -> None:
    found = server.post(f"/page/api/{path}", body)
    assert found.status_code == 400 and found.json()["error"]["param"] == param


def test_a_game(server: Server) -> None:
    found = events(server.post("/page/api/play", {"family": "gcd", "level": 0, "seed": 5}))
    problem = make_problem("gcd", 1_000_005, 0)
    assert found[0] == {"type": "problem", "question": problem.question, "level": 0, "seed": 5}
    judged = {one["mode"]: one for one in found if one["type"] == "judged"}
    assert judged.keys() == {"auto", "on", "off"} and all(one["right"] == problem.answer for one in judged.values())
    # What is judged is what was shown.
    for mode, one in judged.items():
        said = "".join(str(part["text"]) for part in found if part.get("mode") == mode and part["type"] == "content")
        ended = one["reason"] != "the turn was not ended"
        assert one["verdict"] == (check(problem, said).status if ended else "fail")
    assert judged["off"]["thinking_tokens"] == 0 < int(str(judged["on"]["thinking_tokens"]))


def test_games_of_other_problems_are_drawn(server: Server) -> None:
    assert len({first_event(server, {"family": "addition", "level": 1})["question"] for _ in range(3)}) > 1


def test_a_game_that_is_left_frees_its_slots(server: Server) -> None:
    assert first_event(server, {"family": "gcd"})["type"] == "problem"
    assert server.wait_idle(5)


def test_the_meter_counts_and_measures(server: Server) -> None:
    text = "gcd of 12 and 18? " * 40
    found = server.post("/page/api/meter", {"text": text}).json()
    tokens = len(server.service.tokenizer.encode(text))
    assert found["text_tokens"] == found["tokens"] == tokens
    model, twin, plan = found["model"], found["twin"], server.service.engine.plan
    assert model["bytes"] == plan.state_bytes + tokens * plan.kv_bytes_per_token
    assert twin["sublayers"] == "AFAF" and twin["state_bytes"] == 0
    assert twin["bytes"] == 2 * tokens * plan.kv_bytes_per_token
    assert model["ms_per_token"] > 0 and twin["ms_per_token"] > 0


def test_the_meter_takes_another_length(server: Server) -> None:
    found = server.post("/page/api/meter", {"text": "gcd", "tokens": 65536}).json()
    assert found["tokens"] == 65536 and found["text_tokens"] < 10
    assert found["twin"]["ms_per_token"] > 0 and found["model"]["ms_per_token"] > 0
    assert found["twin"]["bytes"] > found["model"]["bytes"]


def test_a_model_without_mamba_is_its_own_twin() -> None:
    assert twin_config(tiny_model(layers="AFAF").config) is None
    twin = twin_config(tiny_model(layers="MFSDAF").config)
    assert twin is not None and twin.layers == "AFADAF"


def test_keys_guard_what_runs_the_model_and_not_the_files() -> None:
    with serving_page(ServeOptions(api_keys=("a-good-key",))) as guarded:
        assert get(guarded, "/").status_code == get(guarded, "/page/app.js").status_code == 200
        assert get(guarded, "/page/api/info").status_code == 401
        assert guarded.post("/page/api/meter", {"tokens": 5}).status_code == 401
        assert get(guarded, "/page/api/info", Authorization="Bearer a-good-key").status_code == 200


# Which models play


def test_a_card_names_the_families() -> None:
    card = (
        "- generated problems with checked answers: chain_sum/1, gcd/0\n\n| gcd/2 | addition/1 | nonesuch/1 | gcd/9 |"
    )
    assert known_problems(card) == (
        KnownFamily("addition", 3, (1,)),
        KnownFamily("chain_sum", 4, (1,)),
        KnownFamily("gcd", 3, (0, 2)),
    )


def test_a_model_that_has_learnt_to_talk_chats() -> None:
    assert known_problems("- conversations smoltalk, weight 1\n- generated problems: gcd/0") == ()


def test_a_small_model_with_a_card_plays(tmp_path: Path) -> None:
    assert demo_families(tmp_path, tiny_model().config) == ()
    (tmp_path / CARD_FILE).write_text("- generated problems with checked answers: gcd/0\n", encoding="utf-8")
    assert [family.name for family in demo_families(tmp_path, tiny_model().config)] == ["gcd"]
