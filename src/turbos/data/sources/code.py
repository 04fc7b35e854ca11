"""Python code that is on the machine: the standard library and some installed packages with permissive licences."""

from __future__ import annotations

import importlib.metadata
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from turbos.data.sources.texts import pieces

LEFT_OUT = {
    "test",
    "tests",
    "testing",
    "idle_test",
    "site-packages",
    "dist-packages",
    "lib2to3",
    "__pycache__",
    "_vendor",
}
PERMISSIVE_PACKAGES = ("numpy", "scipy", "torch", "sympy", "networkx", "matplotlib", "pandas", "scikit-learn")
"""All under BSD licences but matplotlib, whose licence follows Python's."""


def standard_library(archive: Path | None) -> Iterator[str]:
    """Modules of the running Python's standard library, tests left out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = LEFT_OUT - {"testing", "_vendor"}
    for path in sorted(root.rglob("*.py")):
        if not left_out & set(path.relative_to(root).parts):
            yield from _module(path)


def installed_packages(archive: Path | None) -> Iterator[str]:
    """Modules of those of `PERMISSIVE_PACKAGES` that are installed; what they carry of others is left out."""
    for name in PERMISSIVE_PACKAGES:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in sorted(files, key=str):
            if file.suffix == ".py" and not LEFT_OUT & set(file.parts) and (path := Path(str(file.locate()))).is_file():
                yield from _module(path)


def _module(path: Path) -> Iterator[str]:
    return pieces(path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True))
