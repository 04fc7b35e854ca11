"""`turbos demo` from end to end on tiny recipes: stopped in every stage and gone on with, skipped when complete."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch

from demo_cases import SFT, write_tiny_demo
from turbos.cli import demo as demo_module
from turbos.cli.demo import DemoRecipe, Stage, printable
from turbos.cli.main import main
from turbos.common.config import load_recipe
from turbos.common.errors import UserError
from turbos.model.checkpoint import load_model
from turbos.model.families import family_of
from turbos.rl.loop import RLRecipe
from turbos.train.pretrain import PretrainRecipe
from turbos.train.sft import SFTRecipe

STAGES = [
    *("fetch", "tokenizer", "pretrain", "evaluate pretrain"),
    *("sft", "evaluate sft", "rl", "evaluate rl", "report"),
]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command line of a tiny demo in the present directory."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    write_tiny_demo(tmp_path)
    return ["demo", "--recipe", "demo.yaml", "--run", "run", "--threads", "1"]


def test_every_stage_can_be_stopped_and_goes_on(words, capsys, monkeypatch):
    """Each call is stopped one stage later than the call before; whatever was complete is not done again."""
    allowed: list[str] = []
    worked: list[str] = []
    real_stages = demo_module.Demo.stages

    def watch(stage: Stage) -> Stage:
        def work() -> None:
            if stage.name not in allowed:
                raise KeyboardInterrupt
            stage.work()
            worked.append(stage.name)

        return Stage(stage.name, stage.is_done, work)

    monkeypatch.setattr(demo_module.Demo, "stages", lambda self: [watch(stage) for stage in real_stages(self)])
    codes = []
    for name in STAGES:
        allowed.append(name)
        codes.append(main([*words, "--json"]))
    assert codes == [130] * (len(STAGES) - 1) + [0]
    # Fetching is asked for until pretraining is over: it knows itself what is there.
    assert worked == ["fetch", "fetch", "tokenizer", "fetch", *STAGES[2:]]
    captured = capsys.readouterr()
    assert "resume with: turbos demo --recipe demo.yaml" in captured.err
    outcome = json.loads(captured.out)
    assert sorted(outcome["seconds"]) == sorted(STAGES)


def test_demo_from_end_to_end(words, capsys):
    assert main([*words, "--json", "--seed", "3"]) == 0
    captured = capsys.readouterr()
    outcome = json.loads(captured.out)
    plan = captured.err.splitlines()
    assert "about 4 minutes to go" in plan[0]
    assert [line.split("  ")[1] for line in plan[2 : 2 + len(STAGES)]] == STAGES
    assert list(outcome["seconds"]) == STAGES
    assert outcome["seed"] == 3
    assert outcome["total_seconds"] == pytest.approx(sum(outcome["seconds"].values()))
    assert {stage: len(scores) for stage, scores in outcome["scores"].items()} == {"pretrain": 4, "sft": 4, "rl": 4}
    last, copied = load_model(Path("run/rl/final")), load_model(Path("run/final"))
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), copied.parameters(), strict=True))
    for name in (
        "scores.png",
        "table.md",
        "samples.md",
        "pretrain/curves.png",
        "rl/curves.png",
        "final/tokenizer.json",
    ):
        assert (Path("run") / name).stat().st_size > 0
    assert "train:\n  steps: 2\n" in Path("run/rl/recipe.yaml").read_text()
    assert "  seed: 3\n" in Path("run/rl/recipe.yaml").read_text()

    written = Path("run/final/model.safetensors").stat().st_mtime_ns
    assert main([*words, "--seed", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("done") == len(STAGES)
    assert Path("run/final/model.safetensors").stat().st_mtime_ns == written
    assert "Held-out accuracy" in captured.out and "addition/1" in captured.out
    assert "thinking on " in captured.out

    assert main([*words, "--seed", "4"]) == 2
    assert "another recipe" in capsys.readouterr().err
    # A stage that is complete is not done again; that its recipe was changed since must not pass unnoticed.
    Path("sft.yaml").write_text(SFT.replace("held_out: 2", "held_out: 3"))
    assert main([*words, "--seed", "3"]) == 2
    assert "another recipe, differing in held_out (2 -> 3)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "right", "wrong", "said"),
    [
        ("demo.yaml", "sft: 1.5", "sftt: 1.5", "unknown stages sftt"),
        ("demo.yaml", "addition/1", "addition/9", "addition has levels 0 to"),
        ("rl.yaml", "samples: 2", "samples: 1", "samples at least 2"),
    ],
)
def test_what_would_fail_minutes_later_is_refused_before_anything_is_written(words, capsys, file, right, wrong, said):
    path = Path(file)
    path.write_text(path.read_text().replace(right, wrong))
    assert main(words) == 2
    assert said in capsys.readouterr().err and not list(Path("run").iterdir())


def test_a_port_without_a_page_is_refused(words, capsys):
    assert main([*words, "--json", "--port", "8000"]) == 2
    assert "--port is for the page" in capsys.readouterr().err and not Path("run").exists()


def test_a_port_that_is_taken_is_refused_before_the_work(words, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main([*words, "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err and not Path("run/pretrain").exists()


def test_the_seed_of_the_recipe_holds_unless_the_command_gives_one(words, monkeypatch):
    seeds = []
    monkeypatch.setattr(demo_module.Demo, "check", lambda self: seeds.append(self.recipe.seed))
    monkeypatch.setattr(demo_module.Demo, "run", lambda self: None)
    monkeypatch.setattr(demo_module.Demo, "show", lambda self, console: None)
    Path("demo.yaml").write_text(Path("demo.yaml").read_text() + "seed: 5\n")
    assert main(words) == 0
    assert main([*words, "--seed", "6"]) == 0
    assert seeds == [5, 6]


def test_model_text_cannot_command_a_terminal():
    assert printable("4\x1b[2J\n\u202e北京") == "4·[2J··北京"


def test_the_recipes_of_the_package_fit_together():
    demo = load_recipe(DemoRecipe, "demo", "demo")
    pretrain = load_recipe(PretrainRecipe, "pretrain", demo.pretrain)
    sft = load_recipe(SFTRecipe, "sft", demo.sft)
    rl = load_recipe(RLRecipe, "rl", demo.rl)
    assert family_of(pretrain.model).name == "granitemoehybrid"
    assert pretrain.model.mamba_inner == 2 * pretrain.model.hidden_size
    assert set(demo.families) <= set(sft.problems.families)
    assert set(rl.problems.families) <= set(sft.problems.families)
    assert 8 <= sum(demo.minutes.values()) <= 12
    with pytest.raises(UserError, match="nearest known key"):
        load_recipe(RLRecipe, "rl", "demo", ["--rollout.group=3"])
