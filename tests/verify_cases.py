"""What the tests of the certificate share: checkpoints of tiny models in every family, and faults planted in real code.

Not a test file. A fault is a change of one line in the source of a function that is otherwise run as it is.

>>> sorted(SHAPES)
['granite', 'granite dense', 'llama', 'mamba1', 'nemotron', 'turbos']
"""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from model_cases import tiny_model
from turbos.model.checkpoint import load_model, read_family, save_model
from turbos.verify.certificate import run_check, subject_of, verify
from turbos.verify.engine_rows import engine_rows
from turbos.verify.implementation import OurModel
from turbos.verify.report import Check, Report

SHAPES: dict[str, dict[str, Any]] = {
    "granite": {"layers": "MFAFMF", "residual_multiplier": 0.7, "embedding_multiplier": 3.0},
    "granite dense": {"layers": "MDADMD", "tied": False, "rope_theta": 10000.0},
    "nemotron": {
        **{"layers": "MFAMDF", "tied": False, "activation": "relu2", "router": "sigmoid"},
        **{"bias_update": "freeze", "router_scale": 1.5},
    },
    "llama": {"layers": "ADADAD", "rope_theta": 10000.0},
    "mamba1": {"layers": "SFADSF", "capacity_factor": 1.25},
    "turbos": {"layers": "MFADMA", "rope_theta": 10000.0, "qk_norm": True},
}


@dataclass(frozen=True)
class Fault:
    """A changed line, the check that must find it, what its `where` must say, and checks that must stay green."""

    owner: Any
    function: str
    old: str
    new: str
    check: str
    where: str
    shape: str = "granite"
    quiet: tuple[str, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)


def saved(directory: Path, shape: str, **changes: Any) -> Path:
    """A checkpoint of a tiny model with random weights everywhere."""
    directory.mkdir(exist_ok=True)
    save_model(tiny_model(**{**SHAPES[shape], **changes}), directory)
    return directory


def plant(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, old: str, new: str) -> None:
    """Replace `old` by `new` in the source of `owner.name` and run that instead."""
    function = inspect.unwrap(getattr(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} has {source.count(old)} times {old!r}"
    made: dict[str, Any] = {}
    exec(compile(source.replace(old, new), f"<{name} with a fault>", "exec"), function.__globals__, made)
    monkeypatch.setattr(owner, name, made[name])


def certificate(directory: Path, implementation: Any = "turbos") -> Report:
    """The quick certificate."""
    return verify(directory, quick=True, implementation=implementation)


def engine_certificate(directory: Path, scratch: Path, only: tuple[str, ...] = ()) -> Report:
    """The rows of the engine alone (or some of them), quick."""
    scratch.mkdir()
    ours = OurModel(load_model(directory), read_family(directory)[0])
    jobs, left_out = engine_rows(subject_of(directory, scratch, ours, True, "turbos"), ours)
    results = [run_check(name, job) for name, job in jobs if name in only or not only]
    checks = [check for check in results if check is not None]
    return Report(str(directory), "turbos", ours.family.name, tuple(checks), tuple(left_out), 0.0)


def check_named(report: Report, name: str) -> Check:
    """One row."""
    (check,) = [check for check in report.checks if check.name == name]
    return check


def failed(report: Report) -> dict[str, str]:
    """Where each failed check says it fails."""
    return {check.name: check.where for check in report.checks if not check.ok}
