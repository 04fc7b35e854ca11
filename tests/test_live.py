"""The live page without a browser: what it reads of a run in any state, its routes, its process, its files."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch

from serve_cases import PATIENCE
from tiny import tiny_model, tiny_tokenizer
from turbos.cli import demo, demo_page
from turbos.common.errors import UserError
from turbos.common.metrics import MetricsLog, truncate_after
from turbos.common.records import Documents
from turbos.data.problems import FIRST_HELD_OUT_SEED, make_problem
from turbos.eval import problems, samples, thinking
from turbos.eval.samples import load_samples, sample_answers, save_samples
from turbos.eval.thinking import load_rates, save_rates, thinking_chances, thinking_rates
from turbos.serve.live import records
from turbos.serve.live.app import live_files
from turbos.serve.live.plan import PLAN_FILE, Plan, PlannedStage, read_plan_text, write_plan
from turbos.serve.live.records import MOST_POINTS, MetricsTail, RunReader, thinned
from turbos.serve.page.files import POLICY, page_files

STAGES = (
    PlannedStage("fetch", 0.5, "done"),
    PlannedStage("pretrain", 2.0, "running", 1000.0),
    PlannedStage("evaluate pretrain", 0.5),
)


# What is read


def test_names_of_files_are_those_that_are_written() -> None:
    assert records.CLOCK_FILE == demo.CLOCK_FILE and records.EVAL_FILE == problems.EVAL_FILE
    assert records.THINKING_FILE == thinking.THINKING_FILE and records.SAMPLES_FILE == samples.SAMPLES_FILE
    assert records.TRAINED == demo.TRAINED


@pytest.mark.parametrize("exists", [False, True])
def test_a_run_that_has_not_begun(tmp_path: Path, exists: bool) -> None:
    run_dir = tmp_path / "run"
    if exists:
        run_dir.mkdir()
    found = RunReader(run_dir).read()
    assert (found["state"], found["stages"], found["seconds_left"]) == ("waiting", [], 0)
    assert all(curve["series"] == [] for curve in found["curves"])  # type: ignore[attr-defined]
    assert found["scores"] == found["thinking"] == found["samples"] == {}


def test_stages_have_their_progress(tmp_path: Path) -> None:
    write_plan(Plan(3, STAGES), tmp_path)
    (tmp_path / "clock.json").write_text('{"fetch": 20.0, "pretrain": 10.0}')
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "recipe.yaml").write_text("train:\n  steps: 40\n")
    log = MetricsLog(tmp_path / "pretrain" / "metrics.jsonl")
    for step in range(1, 11):
        log.log(step, {"loss": 7 - 0.1 * step})
    reader = RunReader(tmp_path)
    found = reader.read(now=1020.0)
    assert (found["seed"], found["state"], found["seconds"]) == (3, "running", 50.0)
    stage = found["stages"][1]  # type: ignore[index]
    assert (stage["share"], stage["step"], stage["steps"], stage["seconds"]) == (0.25, 10, 40, 30.0)
    # A quarter took 30 seconds; the exam after it is expected to take 30.
    assert found["seconds_left"] == pytest.approx(90 + 30)
    curve = found["curves"][0]  # type: ignore[index]
    assert curve["steps"] == 40 and curve["series"][0]["points"][-1] == (10, 6.0)
    log.log(11, {"loss": 5.5})
    log.close()
    assert reader.read(now=1021.0)["curves"][0]["series"][0]["points"][-1] == (11, 5.5)  # type: ignore[index]


def test_a_line_that_is_still_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    tail.read()
    assert (tail.step, tail.series) == (0, {})
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    tail.read()
    assert tail.series == {"loss": [(1, 3.0)]}
    with path.open("a") as file:
        file.write('ss": 2.5}\n')
    tail.read()
    assert tail.series == {"loss": [(1, 3.0), (2, 2.5)]} and tail.step == 2 and tail.last("loss") == 2.5


def test_a_log_that_was_cut_back_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 6):
        log.log(step, {"loss": float(step)})
    log.close()
    tail = MetricsTail(path)
    tail.read()
    assert tail.step == 5
    truncate_after(path, 2)
    tail.read()
    assert tail.series == {"loss": [(1, 1.0), (2, 2.0)]} and tail.step == 2
    path.unlink()
    tail.read()
    assert (tail.step, tail.series) == (0, {})


def test_what_is_no_record_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ["nonsense", "[1]", '{"loss": 1.0}', '{"step": "x", "loss": 1.0}', "\xff", "[" * 3000, "3"]
    lines += [
        '{"step": 1, "loss": null, "note": "x", "flag": true, "lr": 0.5}',
        '{"step": 2, "loss": NaN, "lr": 1e999}',
    ]
    path.write_bytes("\n".join(lines).encode("latin-1") + b"\n")
    tail = MetricsTail(path)
    tail.read()
    assert tail.series == {"lr": [(1, 0.5)]}


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "null", '{"scores": 3}', "\x00\xff"])
def test_a_damaged_file_is_as_if_it_were_not_there(tmp_path: Path, content: str) -> None:
    (tmp_path / "sft").mkdir()
    for name in (
        "plan.json",
        "clock.json",
        "sft/eval.json",
        "sft/thinking.json",
        "sft/samples.json",
        "sft/recipe.yaml",
    ):
        (tmp_path / name).write_text(content, encoding="latin-1")
    found = RunReader(tmp_path).read()
    assert found["state"] == "waiting" and found["scores"] == found["thinking"] == {} and found["trained"] == []


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"stages": [1]}',
        '{"stages": [{"name": "x"}]}',
        '{"stages": [{"name": "x", "minutes": "y"}]}',
        '{"stages": [{"name": "x", "minutes": 1, "state": "odd"}]}',
        '{"stages": [{"name": "x", "minutes": 1, "z": 1}]}',
    ],
)
def test_a_plan_that_is_none(text: str) -> None:
    assert read_plan_text(text) is None


def test_numbers_that_are_not_finite_become_none(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "eval.json").write_text('{"scores": [{"family": "gcd", "accuracy": NaN}]}')
    assert RunReader(tmp_path).read()["scores"] == {"sft": [{"family": "gcd", "accuracy": None}]}


@pytest.mark.parametrize("count", [1, MOST_POINTS, MOST_POINTS + 1, 5 * MOST_POINTS + 3])
def test_long_curves_are_thinned(count: int) -> None:
    points = [(step, float(step % 7)) for step in range(1, count + 1)]
    found = thinned(points)
    assert len(found) <= MOST_POINTS and found[-1] == points[-1]
    assert [at for at, _ in found] == sorted(at for at, _ in found)
    assert sum(value for _, value in found) / len(found) == pytest.approx(3, abs=3 if count == 1 else 0.2)


# What is measured


@torch.no_grad()
def test_the_thinking_rate_is_the_chance_of_tokens() -> None:
    """Against the whole distribution, one problem at a time, the two tokens one after the other."""
    model, tokenizer = tiny_model(seed=4), tiny_tokenizer()
    opening, closing = tokenizer.special("<think>"), tokenizer.special("</think>")
    asked = [
        make_problem(family, 1_000_000 + n, level) for n, (family, level) in enumerate([("gcd", 0), ("addition", 2)])
    ]
    expected = []
    for problem in asked:
        prompt = problems.problem_prompt(tokenizer, problem, "auto")
        chances = []
        for ids in (prompt, [*prompt, opening]):
            hidden = model(torch.tensor(ids), Documents.from_lengths([len(ids)])).hidden_TD[-1:]
            chances.append(torch.softmax(model.logits(hidden)[0].double(), 0))
        expected.append(float(chances[0][opening] * (1 - chances[1][closing])))
    found = thinking_chances(model, tokenizer, asked)
    assert found == pytest.approx(expected, rel=1e-4) and min(expected) > 0


def test_rates_cover_every_level_and_keep(tmp_path: Path) -> None:
    rates = thinking_rates(tiny_model(), tiny_tokenizer(), ["gcd", "chain_sum", "gcd"], 2, max_new_tokens=6)
    assert [(rate.family, rate.level) for rate in rates] == [("gcd", n) for n in range(3)] + [
        ("chain_sum", n) for n in range(4)
    ]
    assert all(0 <= rate.rate <= 1 and rate.n == 2 for rate in rates)
    save_rates(rates, tmp_path / "thinking.json")
    assert load_rates(tmp_path / "thinking.json") == rates
    with pytest.raises(UserError, match="at least one problem"):
        thinking_rates(tiny_model(), tiny_tokenizer(), ["gcd"], num_problems=0)
    (tmp_path / "thinking.json").write_text("{}")
    with pytest.raises(UserError, match="cannot read thinking rates"):
        load_rates(tmp_path / "thinking.json")


def test_samples_keep(tmp_path: Path) -> None:
    found = sample_answers(tiny_model(), tiny_tokenizer(), [("gcd", 0), ("addition", 1)], max_new_tokens=6)
    assert [one.family for one in found] == ["gcd", "addition"]
    assert [answer.mode for answer in found[0].answers] == ["off", "on"]
    assert found[0].question == make_problem("gcd", samples.FIRST_SAMPLE_SEED).question
    # Far behind the problems that are counted.
    assert samples.FIRST_SAMPLE_SEED > FIRST_HELD_OUT_SEED + 100_000
    save_samples(found, tmp_path / "samples.json")
    assert load_samples(tmp_path / "samples.json") == found
    assert sample_answers(tiny_model(), tiny_tokenizer(), [], max_new_tokens=6) == []


# Its process


@contextmanager
def live_process(run_dir: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The page's process on a free port, as the demo starts it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port, descriptor = listening.getsockname()[1], listening.fileno()
        words = [sys.executable, "-m", "turbos.serve.live", str(run_dir), "--fd", str(descriptor)]
        running = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=(descriptor,))
    try:
        yield f"http://127.0.0.1:{port}", running
    finally:
        running.kill()
        running.wait()


def test_the_process_serves_the_page_and_ends_with_its_stdin(tmp_path: Path) -> None:
    write_plan(Plan(0, STAGES), tmp_path)
    with live_process(tmp_path) as (url, running):
        # Asked before it is up: the socket was bound by somebody else, and waits.
        page = httpx.get(f"{url}/", follow_redirects=True, timeout=PATIENCE)
        assert page.url.path == "/live/" and page.headers["content-security-policy"] == POLICY
        assert page.headers["content-type"].startswith("text/html")
        assert httpx.get(f"{url}/live", follow_redirects=True).url.path == "/live/"
        found = httpx.get(f"{url}/live/api/run").json()
        assert [stage["name"] for stage in found["stages"]] == ["fetch", "pretrain", "evaluate pretrain"]
        assert found["model"] is None and found["state"] == "running"
        for path in ("/live/live.js", "/page/dom.js", "/page/style.css", "/live/live.css"):
            answer = httpx.get(f"{url}{path}")
            assert answer.status_code == 200 and answer.headers["content-security-policy"] == POLICY
            again = httpx.get(f"{url}{path}", headers={"If-None-Match": answer.headers["etag"]})
            assert again.status_code == 304
        for path in ("/live/app.py", "/live/..%2fservice.py", "/page/x", "/v1/models", "/docs", "/openapi.json"):
            assert httpx.get(f"{url}{path}").status_code == 404
        assert httpx.get(f"{url}/live/api/run", headers={"Host": "evil.example"}).status_code == 400
        assert httpx.post(f"{url}/live/api/run").status_code == 405
        assert running.stdin is not None
        running.stdin.close()
        assert running.wait(PATIENCE) == 0


def test_the_process_needs_no_torch_and_little_time(tmp_path: Path) -> None:
    code = "import sys, turbos.serve.live.__main__; print({'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"
    # A long run: what was read is not read again.
    write_plan(Plan(0, STAGES), tmp_path)
    for name in records.TRAINED:
        log = MetricsLog(tmp_path / name / "metrics.jsonl")
        for step in range(1, 1001):
            log.log(step, {f"figure_{n}": 1.0 for n in range(20)} | {"loss": 1.0, "reward": 0.5})
        log.close()
    reader = RunReader(tmp_path)
    reader.read()
    started = time.process_time()
    for _ in range(20):
        reader.read()
    assert (time.process_time() - started) / 20 < 0.05


def test_without_the_packages_the_demo_says_so_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(demo_page, "missing_packages", lambda: ["fastapi", "uvicorn"])
    assert demo_page.page_socket(None, lines.append) is None
    assert len(lines) == 1 and "fastapi, uvicorn (pip install 'turbos[serve]')" in lines[0]
    with demo_page.watched(Path("run"), None):
        pass


@pytest.mark.parametrize(("said", "wanted"), [("1", True), ("0", False), ("", False), (None, False)])
def test_a_model_is_served_where_somebody_can_stop_it(
    said: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output of this test is no terminal."""
    monkeypatch.delenv("SERVE", raising=False)
    if said is not None:
        monkeypatch.setenv("SERVE", said)
    assert demo_page.wants_server() is wanted
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert demo_page.wants_server() is (said != "0")


# Its files


def test_every_file_that_the_page_names_is_there() -> None:
    index = live_files()["index.html"].content.decode()
    named = re.findall(r'(?:href|src)="([^"]+\.\w+)"', index)
    scripts = [file.content.decode() for name, file in live_files().items() if name.endswith(".js")]
    imported = [name for script in scripts for name in re.findall(r'from "([^"]+)"', script)]
    assert len(named) >= 4 and len(imported) >= 5
    for name in [*named, *imported]:
        found = page_files() if name.startswith("../page/") else live_files()
        assert name.rpartition("/")[2] in found, name
    assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", index)
    assert not any(b"http" in file.content for name, file in live_files().items())


def test_both_languages_say_the_same_things() -> None:
    source = live_files()["live-words.js"].content.decode()
    english, chinese = (
        dict(re.findall(r'(\w+): "((?:[^"\\]|\\.)*)"', found))
        for found in re.findall(r"export const \w+ = {(.*?)\n};", source, re.DOTALL)
    )
    assert english.keys() == chinese.keys() and len(english) > 40
    for key in english:
        places = [sorted(re.findall(r"\{(\w+)\}", words[key])) for words in (english, chinese)]
        assert places[0] == places[1], key
    shared = set(re.findall(r'(\w+): (?:"|\[)', page_files()["words.js"].content.decode()))
    script, page = live_files()["live.js"].content.decode(), live_files()["index.html"].content.decode()
    asked = set(re.findall(r'\bsay\("(\w+)"', script)) | set(re.findall(r'data-say(?:-label)?="(\w+)"', page))
    assert len(asked) > 25 and asked <= english.keys() | shared, asked - english.keys() - shared


def test_the_plan_is_whole_or_not_there(tmp_path: Path) -> None:
    write_plan(Plan(1, STAGES), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [PLAN_FILE]
    assert json.loads((tmp_path / PLAN_FILE).read_text())["seed"] == 1
