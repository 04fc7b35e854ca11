"""The Makefile's chat and demo, with an environment whose Python and `turbos` only note how they are called."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")

NOTE = """#!/bin/sh
echo "{name} $*" >> "{log}"
case "$*" in *"{fails}"*) exit 1 ;; esac
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment that is made but not installed into."""
    return make_venv(tmp_path / "venv")


def make_venv(path: Path, fails: str = "nothing fails") -> Path:
    (path / "bin").mkdir(parents=True)
    for name in ("python", "turbos"):
        program = path / "bin" / name
        program.write_text(NOTE.format(name=name, log=path / "calls", fails=fails))
        program.chmod(0o755)
    (path / ".made").touch()
    return path


def make(venv: Path, *words: str, check: bool = True) -> tuple[str, list[str]]:
    """What make says, and how the programs were called."""
    done = subprocess.run(
        ["make", "-C", str(ROOT), f"VENV={venv}", *words], capture_output=True, text=True, check=check
    )
    calls = venv / "calls"
    return done.stdout + done.stderr, calls.read_text().splitlines() if calls.exists() else []


def test_help_names_the_commands(venv: Path) -> None:
    said, _ = make(venv, "help")
    assert all(f"make {name} " in said for name in ("demo", "chat", "test"))


def test_chat_installs_imports_and_serves(venv: Path, tmp_path: Path) -> None:
    said, calls = make(venv, "chat", f"CHAT={tmp_path / 'model'}", "PORT=8123", "TORCH_INDEX=index")
    assert calls[0].endswith("--extra-index-url index torch==2.13.0") and calls[1].endswith("-e .[serve,smollm2]")
    assert calls[2:] == [
        f"turbos import smollm2 --out {tmp_path / 'model'}",
        f"turbos serve {tmp_path / 'model'} --port 8123 --open",
    ]
    # What it costs is said before anything is done.
    assert said.index("download about") < said.index("download 93 MB") < said.index("http://127.0.0.1:8123/")
    assert {path.name for path in venv.glob(".ready-*")} == {".ready-chat", ".ready-demo"}


def test_chat_does_nothing_twice(venv: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").touch()
    make(venv, "chat", f"CHAT={model}")
    (venv / "calls").unlink()
    said, calls = make(venv, "chat", f"CHAT={model}")
    assert calls == [f"turbos serve {model} --port 8000 --open"]
    assert "Install: done before" in said and f"{model}, there already" in said


@pytest.mark.parametrize(("word", "extras"), [("chat", "[serve,smollm2]"), ("demo", "[serve]")])
def test_a_package_that_does_not_build_is_left_out(word: str, extras: str, tmp_path: Path) -> None:
    venv = make_venv(tmp_path / "venv", fails=f"-e .{extras}")
    said, calls = make(venv, word, f"CHAT={tmp_path / 'model'}")
    assert "trying without pycosat" in said
    assert any("--no-deps reasoning-gym" in call for call in calls)
    # The script that lists what is required has several lines; its argument stands at the end.
    assert any(call.startswith("print(") and call.endswith(f" {extras}") for call in calls)


def test_what_is_installed_without_it_is_all_that_the_extras_name(venv: Path) -> None:
    rule = 'show:; @python3 -c "$$REQUIREMENTS" "[serve,smollm2]"'
    said, _ = make(venv, "--no-print-directory", f"--eval={rule}", "show")
    named = said.split()
    assert {"fastapi>=0.115", "nh3>=0.2.18", "gguf>=0.17", "sympy"} <= set(named) and len(named) > 20
    assert not any(one.startswith(("pycosat", "reasoning-gym")) for one in named)


def test_a_server_that_fails_is_a_failure_and_ctrl_c_is_none(tmp_path: Path) -> None:
    venv = make_venv(tmp_path / "venv", fails="serve")
    with pytest.raises(subprocess.CalledProcessError):
        make(venv, "chat", f"CHAT={tmp_path / 'model'}")
    (venv / "bin" / "turbos").write_text("#!/bin/sh\nexit 130\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    make(venv, "chat", f"CHAT={tmp_path / 'model'}")


def test_clean_takes_the_chat_model_and_leaves_runs(venv: Path) -> None:
    said, calls = make(venv, "-n", "clean")
    assert f"rm -rf {venv} runs/smollm2 " in said and calls == []
