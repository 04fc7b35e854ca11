"""The house: imports only go down, files and functions stay short, everything public is documented.

`violations_in` judges one source file and `floor_violations` its imports; both are tested on planted sources, so that a
walker that sees nothing cannot pass.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "turbos"

FLOORS = (
    ("common",),
    ("ops",),
    ("model", "data", "text", "sandbox"),
    ("train", "engine", "reward"),
    ("rl", "eval", "posttrain"),
    ("serve", "verify", "bench"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# From one room to another on its own floor: only these.
SIDEWAYS = {("data", "text"), ("model", "text"), ("rl", "eval"), ("rl", "posttrain")}
# The library of peers may be imported only here.
TRANSFORMERS_ROOMS = ("model/families", "verify", "bench")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
# Kernels may be longer than a function should be: "path from the root::function".
LONG_KERNELS: frozenset[str] = frozenset()

# Folders of somebody's machine, spelt in parts so that this file does not name them.
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(?:" + "|".join(("work", "root", "home", "Users", "opt")) + r")/\w")
DOCUMENTED_BY_CLASS = {"forward", "backward", "setup_context"}
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ".cfg", ""}


@dataclass(frozen=True)
class Violation:
    """A rule that a place in a file breaks."""

    place: str
    rule: str


def source_files() -> list[Path]:
    """All Python files of the package and the tests."""
    return sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))


def tracked_files() -> list[Path]:
    """Files that git tracks or would (not ignored); without git, the Python files."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return source_files()
    return [ROOT / name for name in listed if (ROOT / name).is_file()]


def imported_modules(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in a module's tree, lazy and type-checking ones and `import_module` too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, base] if base else parent)
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
            yield from ((node.lineno, arg.value) for arg in node.args if isinstance(arg, ast.Constant))


def room_of(module: str) -> str:
    """Second part of a dotted name: the room, or "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def floor_violations(path: Path, root: Path) -> list[Violation]:
    """Imports of one package file that go up, sideways or to a peer's library."""
    inside = path.relative_to(root / "src")
    # An `__init__.py` keeps its name here, so that a relative import is always one part up.
    module = ".".join(inside.with_suffix("").parts)
    room = room_of(module)
    if len(inside.parts) == 2:
        # The package's own files: `__init__` imports nothing, `__main__` is the command.
        room = "cli" if inside.name == "__main__.py" else "common"
    found = []
    if room not in FLOOR_OF:
        return [Violation(str(inside), f"room {room!r} has no floor")]
    allowed_transformers = any(inside.is_relative_to(Path(PACKAGE, *name.split("/"))) for name in TRANSFORMERS_ROOMS)
    allowed_transformers |= inside == Path(PACKAGE, "model", "families.py")
    for line, name in imported_modules(ast.parse(path.read_text(encoding="utf-8")), module):
        place = f"{inside}:{line}"
        if str(name).split(".")[0] == "transformers" and not allowed_transformers:
            found.append(Violation(place, "imports transformers outside model/families, verify and bench"))
        if str(name).split(".")[0] != PACKAGE:
            continue
        other = room_of(str(name))
        if other and other not in FLOOR_OF and (root / "src" / PACKAGE / other).is_dir():
            found.append(Violation(place, f"room {other!r} has no floor"))
        if other in FLOOR_OF and other != room:
            down = FLOOR_OF[other] < FLOOR_OF[room]
            sideways = (room, other) in SIDEWAYS
            if not down and not sideways:
                found.append(Violation(place, f"{room} must not import {other}"))
    return found


def violations_in(path: Path, root: Path) -> list[Violation]:
    """Lengths and docstrings of one source file; tests need no function docstrings."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(root).as_posix()
    tree = ast.parse(text)
    found = []
    if len(text.splitlines()) > MAX_FILE_LINES:
        found.append(Violation(name, f"file has more than {MAX_FILE_LINES} lines"))
    if not ast.get_docstring(tree):
        found.append(Violation(name, "module has no docstring"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and f"{name}::{node.name}" not in LONG_KERNELS:
                found.append(Violation(f"{name}:{node.lineno}", f"{node.name} has {length} lines"))
    if name.startswith("src/"):
        found += [Violation(f"{name}:{node.lineno}", f"{node.name} has no docstring") for node in undocumented(tree)]
    return found


def undocumented(scope: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public functions, classes and methods without docstring; a documented class speaks for its `forward`."""
    for node in scope.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        by_class = isinstance(scope, ast.ClassDef) and node.name in DOCUMENTED_BY_CLASS and ast.get_docstring(scope)
        if not ast.get_docstring(node) and not by_class:
            yield node
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node)


def machine_paths(path: Path) -> list[Violation]:
    """Lines of a text file that name a folder of somebody's machine."""
    if path.suffix not in TEXT_SUFFIXES:
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [
        Violation(f"{path.name}:{number}", f"names a machine's path: {line.strip()[:80]}")
        for number, line in enumerate(lines, start=1)
        if MACHINE_PATH.search(line)
    ]


def report(violations: list[Violation]) -> str:
    """One line for each violation."""
    return "\n".join(f"{violation.place}: {violation.rule}" for violation in violations)


def test_imports_only_go_down() -> None:
    found = [violation for path in sorted((ROOT / "src").rglob("*.py")) for violation in floor_violations(path, ROOT)]
    assert not found, report(found)


def test_files_are_short_and_documented() -> None:
    found = [violation for path in source_files() for violation in violations_in(path, ROOT)]
    assert not found, report(found)


def test_no_file_names_a_machine_path() -> None:
    found = [violation for path in {*tracked_files(), *source_files()} for violation in machine_paths(path)]
    assert not found, report(found)


def test_exceptions_exist() -> None:
    for kernel in LONG_KERNELS:
        name, function = kernel.split("::")
        assert f"def {function}(" in (ROOT / name).read_text(encoding="utf-8")


def plant(root: Path, name: str, text: str) -> Path:
    """Write a source file under a planted root."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "line", "rule"),
    [
        ("common/a.py", "import turbos.ops.loss", "common must not import ops"),
        ("ops/a.py", "from turbos.model import lm", "ops must not import model"),
        ("ops/a.py", "from turbos import model", "ops must not import model"),
        ("ops/a.py", "from ..model.lm import LanguageModel", "ops must not import model"),
        ("ops/__init__.py", "from ..model import lm", "ops must not import model"),
        ("train/a.py", "from turbos.engine.runner import Runner", "train must not import engine"),
        ("engine/a.py", "import turbos.train", "engine must not import train"),
        ("text/a.py", "import turbos.data.shards", "text must not import data"),
        ("data/a.py", "import turbos.model", "data must not import model"),
        ("eval/a.py", "import turbos.rl.loop", "eval must not import rl"),
        ("serve/a.py", "import turbos.bench", "serve must not import bench"),
        ("model/a.py", "def f():\n    import turbos.cli.main", "model must not import cli"),
        ("model/a.py", "if TYPE_CHECKING:\n    from turbos.train.loop import Run", "model must not import train"),
        ("model/a.py", "importlib.import_module('turbos.rl.loop')", "model must not import rl"),
        ("model/lm.py", "import transformers", "transformers outside"),
        ("rl/a.py", "from transformers.models import llama", "transformers outside"),
        ("attic/a.py", "import os", "room 'attic' has no floor"),
        ("__init__.py", "from turbos.ops import ssd", "common must not import ops"),
    ],
)
def test_walker_sees_a_bad_import(tmp_path: Path, name: str, line: str, rule: str) -> None:
    found = floor_violations(plant(tmp_path, f"src/turbos/{name}", f'"""Doc."""\n{line}\n'), tmp_path)
    assert [rule in violation.rule for violation in found] == [True], report(found)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("data/a.py", "from turbos.text.tokenizer import Tokenizer"),
        ("model/a.py", "from turbos.text import chat"),
        ("rl/a.py", "from turbos.eval.problems import evaluate"),
        ("rl/a.py", "from turbos.posttrain import fusion"),
        ("train/a.py", "from . import optim\nfrom .loop import train\nfrom ..model.lm import LanguageModel"),
        ("model/families/granite.py", "import transformers"),
        ("bench/peers.py", "def f():\n    from transformers import AutoModel"),
        ("cli/a.py", "import turbos.bench.train"),
        ("__main__.py", "from turbos.cli.main import main"),
        ("ops/a.py", "from turbos import __version__"),
    ],
)
def test_walker_lets_a_good_import_pass(tmp_path: Path, name: str, line: str) -> None:
    assert floor_violations(plant(tmp_path, f"src/turbos/{name}", f'"""Doc."""\n{line}\n'), tmp_path) == []


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("x = 1\n", ["module has no docstring"]),
        ('"""Doc."""\n' + "x = 1\n" * MAX_FILE_LINES, ["file has more than 500 lines"]),
        ('"""Doc."""\n\n\ndef _f():\n' + "    x = 1\n" * (MAX_FUNCTION_LINES - 1), []),
        ('"""Doc."""\n\n\ndef _f():\n' + "    x = 1\n" * MAX_FUNCTION_LINES, ["_f has 81 lines"]),
        (
            '"""Doc."""\ndef f(): pass\nasync def g(): pass\ndef _h(): pass\n',
            ["f has no docstring", "g has no docstring"],
        ),
        ('"""Doc."""\nclass C:\n    def m(self): pass\n', ["C has no docstring", "m has no docstring"]),
        ('"""Doc."""\nclass C:\n    """Doc."""\n    def forward(self): pass\n    def __init__(self): pass\n', []),
    ],
)
def test_walker_sees_lengths_and_docstrings(tmp_path: Path, text: str, rules: list[str]) -> None:
    found = violations_in(plant(tmp_path, "src/turbos/ops/a.py", text), tmp_path)
    assert [violation.rule for violation in found] == rules


def test_walker_asks_less_of_tests(tmp_path: Path) -> None:
    assert violations_in(plant(tmp_path, "tests/test_a.py", '"""Doc."""\ndef test_a(): pass\n'), tmp_path) == []


@pytest.mark.parametrize(
    ("line", "count"),
    [
        ("cache = '" + "/" + "work/cache'", 1),
        ("see " + "/" + "root/notes.md", 1),
        ("(" + "/" + "home/me/x)", 1),
        ("docs/work/cache and ../root/x and https://host/home/page", 0),
    ],
)
def test_walker_sees_machine_paths(tmp_path: Path, line: str, count: int) -> None:
    assert len(machine_paths(plant(tmp_path, "a.md", f"{line}\n"))) == count
