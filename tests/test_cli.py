"""The command line: dispatch, exit codes, one-line errors, dry runs, describe, generate and plot."""

from __future__ import annotations

import errno
import json
import math
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from turbos.cli import main as main_module
from turbos.cli import stages
from turbos.cli.main import VERBS, join_overrides, main
from turbos.cli.plot import panels_of, running_mean
from turbos.cli.terminal import printable
from turbos.common.errors import UserError
from turbos.common.metrics import MetricsLog
from turbos.model.checkpoint import save_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer

PNG_MAGIC = b"\x89PNG\r\n"


@dataclass(frozen=True)
class Inner:
    """A group of keys."""

    steps: int = 3
    lr: float = 0.1


@dataclass(frozen=True)
class Tiny:
    """A recipe for stages that need no training."""

    name: str
    train: Inner = Inner()


def tiny_stage(recipe: Tiny, run_dir: Path) -> Path:
    """Logs one record, prints, and fails as its recipe says."""
    print("chatter")
    if recipe.name == "stop":
        raise KeyboardInterrupt
    if recipe.name == "bad":
        raise UserError("one thing:\n  mend it")
    log = MetricsLog(run_dir / "metrics.jsonl")
    log.log(1, {"loss": math.nan, "lr": recipe.train.lr})
    log.close()
    return run_dir / "final"


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe file, and the three stages replaced by the tiny one."""
    monkeypatch.setattr(stages, "load_stage", lambda verb: stages.Stage(Tiny, tiny_stage))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("name: plain\n")
    return "tiny.yaml"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained small model with its tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoint")
    tokenizer = Tokenizer.train(["to be or not to be, 北京"] * 3, vocab_size=304)
    tokenizer.save(directory)
    model = LanguageModel(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, layers="MFAF", mamba_heads=2))
    model.init_weights(0)
    save_model(model, directory)
    return directory


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_help_lists_all_verbs_without_torch(words: list[str]) -> None:
    code = f"import sys; from turbos.cli.main import main\ntry: main({words})\nfinally: print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert all(f"\n    {verb.name} " in printed for verb in VERBS)
    assert printed.endswith("False\n")


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"usage: turbos {verb}" in capsys.readouterr().out


def test_version_and_module_entry() -> None:
    command = [sys.executable, "-m", "turbos", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.startswith("turbos 0.")


def test_unknown_verb_and_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretran"]) == 2
    assert capsys.readouterr().err == (
        "turbos: error: unknown verb 'pretran'; did you mean 'pretrain'? (turbos --help lists all)\n"
    )
    with pytest.raises(SystemExit, match="2"):
        main(["plot", "runs", "--outt", "x"])
    assert "--outt" in capsys.readouterr().err


def test_values_of_overrides_never_become_the_recipe() -> None:
    words = ["pretrain", "--train.steps", "50", "demo", "--train.lr", "-1", "--json", "--a.b=c", "d"]
    joined = ["pretrain", "--train.steps=50", "demo", "--train.lr=-1", "--json", "--a.b=c", "d"]
    assert join_overrides(words) == joined


@pytest.mark.parametrize("verb", ["pretrain", "anneal", "sft", "rl"])
def test_dry_run_prints_the_resolved_recipe(verb: str, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--train.steps", "50", recipe_file, "--dry-run", "--name", "x"]) == 0
    assert capsys.readouterr().out == "name: x\ntrain:\n  steps: 50\n  lr: 0.1\n"
    assert main([verb, recipe_file, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "plain", "train": {"steps": 3, "lr": 0.1}}


def test_json_is_alone_on_stdout(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", recipe_file, "--json", "--run", "r"]) == 0
    printed = capsys.readouterr()
    outcome = json.loads(printed.out, parse_constant=pytest.fail)
    assert (outcome["verb"], outcome["run"], outcome["final"]) == ("sft", "r", "r/final")
    assert outcome["last"] == {"step": 1, "loss": None, "lr": 0.1}
    assert printed.err == "chatter\n"


def test_default_run_directory_is_named_by_verb_and_recipe(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rl", recipe_file]) == 0
    assert capsys.readouterr().out == "runs/rl-tiny/final\n"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--name", "bad"], 2, "turbos: error: one thing: mend it"),
        (["--name", "stop"], 130, "turbos: stopped; resume with: turbos pretrain tiny.yaml --name stop"),
        (["--train.stepz", "3"], 2, "unknown key 'train.stepz' in override; the nearest known key is 'train.steps'"),
        (["--train.steps", "x"], 2, "train.steps in tiny.yaml must be int, not 'x'"),
        (["--threads", "0"], 2, "--threads must be at least 1, not 0"),
        (["surplus"], 2, "cannot read 'surplus'"),
    ],
)
def test_errors_are_one_line(
    recipe_file: str, capsys: pytest.CaptureFixture[str], words: list[str], code: int, line: str
) -> None:
    assert main(["pretrain", recipe_file, *words]) == code
    printed = capsys.readouterr()
    last = printed.err.splitlines()[-1]
    assert line in last and last.startswith("turbos: ")
    assert printed.out == "" and "Traceback" not in printed.err


def test_a_defect_keeps_its_traceback(recipe_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(words: Any) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(main_module, "dispatch", broken)
    with pytest.raises(ZeroDivisionError):
        main(["pretrain", recipe_file])


def test_stages_are_those_of_the_rooms() -> None:
    assert stages.load_stage("sft").recipe.__name__ == "SFTRecipe"
    assert stages.load_stage("pretrain").recipe.__name__ == "PretrainRecipe"
    assert stages.load_stage("rl").recipe.__name__ == "RLRecipe"


def test_describe_counts_a_checkpoint_and_a_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["describe", str(checkpoint), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["total_params"] > counts["active_params"] > 0
    path = tmp_path / "m.yaml"
    path.write_text("vocab_size: 304\nhidden_size: 32\nlayers: MFAF\nmamba_heads: 2\n")
    assert main(["describe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == counts
    assert main(["describe", str(path), "--layers", "MFMFAF"]) == 0
    assert "MFMFAF" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["no-such-model"], ["CKPT", "--layers", "M"], ["EMPTY"]])
def test_describe_refuses(
    words: list[str], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"CKPT": str(checkpoint), "EMPTY": str(tmp_path)}
    assert main(["describe", *(places.get(word, word) for word in words)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_generate_streams_and_repeats_itself(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(checkpoint), "--prompt", "to be", "--max-new-tokens", "12", "--temperature", "1"]
    assert main([*words, "--chat", "--think", "on", "--seed", "3"]) == 0
    first = capsys.readouterr().out
    assert main([*words, "--chat", "--think", "on", "--seed", "3"]) == 0
    assert capsys.readouterr().out == first
    assert main(words) == 0
    assert main([*words, "--think", "on"]) == 2
    assert "--think needs --chat" in capsys.readouterr().err


def test_plot_draws_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = random.Random(0)
    for name in ("a", "b"):
        log = MetricsLog(tmp_path / name / "metrics.jsonl")
        for step in range(1, 101):
            log.log(step, {"loss": 3 / step + noise.random(), "lr": 1e-3, "stage": name, "seconds": 0.1})
        log.log(100, {"bits_per_byte/books": 1.5, "bits_per_byte/code": math.nan, "odd": 1})
        log.close()
    assert main(["plot", str(tmp_path)]) == 0
    paths = [Path(line) for line in capsys.readouterr().out.split()]
    assert paths == [tmp_path / "a" / "curves.png", tmp_path / "b" / "curves.png"]
    assert all(path.read_bytes().startswith(PNG_MAGIC) for path in paths)
    assert main(["plot", str(tmp_path / "a"), "--out", str(tmp_path / "new" / "x.png")]) == 0
    assert (tmp_path / "new" / "x.png").read_bytes().startswith(PNG_MAGIC)
    assert main(["plot", str(tmp_path / "none")]) == 2
    assert "no metrics at" in capsys.readouterr().err


def test_figures_are_sorted_into_panels() -> None:
    records = [
        {
            "step": 1,
            "tokens": 5,
            "odd/a": 1.0,
            "loss": 2.0,
            "accuracy/gcd": 0.5,
            "reward/on": 1.0,
            "reward/gcd/0/on": 0.0,
            "stage": "rl",
        },
        {"step": 2, "odd/b": 1.0, "loss": 1.0, "load_max_over_mean": 1.5},
    ]
    panels = panels_of(records)
    assert [panel.title for panel in panels] == ["loss", "accuracy", "reward", "reward: gcd", "expert load", "odd"]
    assert panels[0].series == {"loss": ([1.0, 2.0], [2.0, 1.0])}
    assert list(panels[-1].series) == ["odd/a", "odd/b"]


def test_running_mean_keeps_a_constant_and_skips_nan() -> None:
    assert running_mean([2.0] * 7) == [2.0] * 7
    assert running_mean([1.0, math.nan, 3.0]) == [1.0, 2.0, 3.0]


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(words: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    monkeypatch.setattr(main_module, "dispatch", full)
    assert main(["pretrain", "demo"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "No space left" in lines[0] and "runs/x/metrics.jsonl" in lines[0]


def test_model_text_cannot_command_a_terminal() -> None:
    hostile = "\x1b]0;title\x07ok\r\u202e\n"
    assert printable(hostile) == "·]0;title·ok···"
    assert printable(hostile, keep="\n") == "·]0;title·ok··\n"
