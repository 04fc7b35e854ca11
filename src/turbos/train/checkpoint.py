"""Checkpoints that are whole or absent: `checkpoints/step-000020/` with the model as anyone can load it, and our own
training state apart in `trainer/` (safetensors and JSON, never pickle).

A save writes a temporary sibling directory, syncs it to disk, renames it, then moves the `latest` pointer. Whatever
stops it half way (full disk, `kill -9`), `latest` names a whole checkpoint. It does not know the loop or the recipe.

    state = TrainingState(step=20, tokens=40_960)
    save_checkpoint(run_dir, state, model, tokenizer, optimizer)    # -> run_dir/checkpoints/step-000020
    path = latest_checkpoint(run_dir)
    model = load_model(path); ...; state = restore_optimizer(path, model, optimizer)
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbos.common.errors import UserError
from turbos.model.lm import LanguageModel
from turbos.model.package import write_package
from turbos.text.tokenizer import Tokenizer
from turbos.train.card import run_card
from turbos.train.optim import moment_names

SAVING = ".saving-"
REMOVING = ".removing-"
POINTER = "latest"
TRAINER = "trainer"
STEP = re.compile(r"step-([0-9]+)")


@dataclass(frozen=True)
class TrainingState:
    """Where training stands: optimizer steps done and tokens seen. The loader needs no more, it is stateless."""

    step: int
    tokens: int = 0


def save_checkpoint(
    run_dir: Path,
    state: TrainingState,
    model: LanguageModel,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    keep: int = 2,
) -> Path:
    """Write `checkpoints/step-NNNNNN`, point `latest` at it, keep the last `keep`; UserError where the disk refuses."""
    folder = run_dir / "checkpoints"
    target = folder / f"step-{state.step:06d}"
    if latest_checkpoint(run_dir) == target:
        return target

    def write(place: Path) -> None:
        write_package(place, model, tokenizer, run_card(run_dir))
        _write_trainer(place / TRAINER, state, model, optimizer)

    write_whole(target, write)
    _point(folder, target)
    for old in _steps(folder)[:-keep]:
        if old != target:
            shutil.rmtree(_set_aside(old))
    return target


def save_final(run_dir: Path, model: LanguageModel, tokenizer: Tokenizer) -> Path:
    """Write `run_dir/final`: without the trainer's state, as whole or as absent as any checkpoint."""
    target = run_dir / "final"
    write_whole(target, lambda place: write_package(place, model, tokenizer, run_card(run_dir)))
    return target


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that `checkpoints/latest` names, or None in a run without checkpoints.

    Without a pointer (a first save killed just before it) the newest step counts: a directory of that name is whole.
    """
    folder = run_dir / "checkpoints"
    pointer = folder / POINTER
    if not pointer.exists():
        steps = _steps(folder)
        return steps[-1] if steps else None
    name = pointer.read_text(encoding="utf-8", errors="replace").strip() if pointer.is_file() else ""
    if not STEP.fullmatch(name) or not (folder / name).is_dir():
        there = ", ".join(path.name for path in _steps(folder)) or "none"
        raise UserError(
            f"{pointer} names {name[:40]!r}, which is no checkpoint there ({there}): write one's name into it"
        )
    return folder / name


def restore_optimizer(path: Path, model: LanguageModel, optimizer: torch.optim.Optimizer) -> TrainingState:
    """Put back the optimizer's moments and torch's random state from the checkpoint `path`, bit for bit."""
    state, tensors = _read_trainer(path)
    wanted = moment_names(optimizer)
    for name, parameter in model.named_parameters():
        names = wanted[parameter]
        moments = {key: tensors.pop(f"{name}/{key}") for key in names if f"{name}/{key}" in tensors}
        if not moments:
            continue
        if len(moments) < len(names):
            raise UserError(f"cannot resume from {path}: optimizer state of {name} lacks some of {', '.join(names)}")
        if any(moment.shape != parameter.shape for key, moment in moments.items() if key != "step"):
            raise UserError(f"cannot resume from {path}: optimizer state of {name} has another shape than the model's")
        # The step counter of torch's fused AdamW lives beside the parameter, like the moments.
        optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in moments.items()}
    if tensors:
        raise UserError(f"cannot resume from {path}: optimizer state for unknown parameters {sorted(tensors)[:3]}")
    return state


def _read_trainer(path: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """State and moments of a checkpoint; its random state is put into torch. UserError where anything is damaged."""
    try:
        state = TrainingState(**json.loads((path / TRAINER / "state.json").read_text()))
        if not all(isinstance(count, int) and count >= 0 for count in (state.step, state.tokens)):
            raise ValueError(f"state.json holds {state}")
        tensors = load_file(path / TRAINER / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("rng"))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        message = f"cannot resume from {path}: its trainer/ files are missing or damaged ({error})"
        raise UserError(message) from None
    return state, tensors


def remove_leftovers(run_dir: Path) -> list[Path]:
    """Delete what interrupted saves left in the run, before training starts; returns what was deleted."""
    leftovers = [
        path
        for folder in (run_dir, run_dir / "checkpoints")
        for path in sorted(folder.glob(".*"))
        if path.name.startswith((SAVING, REMOVING))
    ]
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return leftovers


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling of `target`, sync it, rename it; UserError where the disk refuses.

    Whatever else stops it leaves no trace either.
    """
    temporary = target.parent / f"{SAVING}{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        _sync_tree(temporary)
        replaced = _set_aside(target) if target.exists() else None
        temporary.rename(target)
        _sync(target.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot save {target}: {error}; earlier saves are whole, make room and run again") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_trainer(place: Path, state: TrainingState, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    place.mkdir()
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{name}/{key}": moment.contiguous() for key, moment in moments.items()}
    save_file(tensors, place / "optimizer.safetensors")
    (place / "state.json").write_text(json.dumps(asdict(state)))


def _point(folder: Path, target: Path) -> None:
    temporary = folder / f"{SAVING}{POINTER}"
    try:
        temporary.write_text(target.name + "\n")
        _sync(temporary)
        temporary.replace(folder / POINTER)
        _sync(folder)
    except OSError as error:
        raise UserError(f"cannot point {folder / POINTER} at {target.name}: {error}; make room and run again") from None


def _set_aside(path: Path) -> Path:
    # Before it is deleted: a directory called step-NNNNNN is whole at any moment.
    doomed = path.with_name(f"{REMOVING}{path.name}")
    path.rename(doomed)
    return doomed


def _steps(folder: Path) -> list[Path]:
    # A user's copy of a checkpoint under another name (`step-000020-good`) is left alone.
    numbers = {path: STEP.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir()}
    found = [(int(match[1]), path) for path, match in numbers.items() if match is not None]
    return [path for _, path in sorted(found)]


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
