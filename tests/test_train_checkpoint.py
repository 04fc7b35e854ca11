"""Checkpoints: exact, atomic under a full disk and kill -9, kept, pointed at, refused in one line when damaged."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from turbos.common.errors import UserError
from turbos.common.records import IGNORED, Batch, Documents
from turbos.model.checkpoint import load_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.checkpoint import (
    TrainingState,
    latest_checkpoint,
    remove_leftovers,
    restore_optimizer,
    save_checkpoint,
    save_final,
)
from turbos.train.optim import OptimConfig
from turbos.train.trainer import Trainer

CONFIG = ModelConfig(
    vocab_size=320, hidden_size=32, layers="MFAF", num_heads=2, num_kv_heads=1, head_dim=16, mamba_heads=4,
    mamba_head_dim=16, mamba_state=16, chunk_size=16, num_experts=4, expert_size=32, shared_expert_size=32,
    router="sigmoid", bias_update="update", aux_loss=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["to be or not to be"] * 3, vocab_size=320)


def trained(steps: int = 3) -> Trainer:
    trainer = Trainer(LanguageModel(CONFIG).init_weights(seed=0), OptimConfig(), total_steps=10)
    for step in range(steps):
        trainer.forward_backward([random_batch(step)])
        trainer.optim_step()
    return trainer


def random_batch(seed: int) -> Batch:
    tokens_T = torch.randint(320, (24,), generator=torch.Generator().manual_seed(seed))
    documents = Documents.from_lengths([24])
    targets_T = torch.cat([tokens_T[1:], torch.tensor([IGNORED])])
    return Batch(tokens_T, documents, targets_T, (targets_T != IGNORED).float())


def save(run_dir: Path, trainer: Trainer, tokenizer: Tokenizer, step: int | None = None, keep: int = 2) -> Path:
    state = TrainingState(trainer.step if step is None else step, tokens=100)
    return save_checkpoint(run_dir, state, trainer.model, tokenizer, trainer.optimizer, keep)


def assert_whole(path: Path, trainer: Trainer) -> None:
    """The checkpoint holds the trainer's weights, buffers and moments, bit for bit."""
    model = load_model(path)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    restored = Trainer(model, OptimConfig(), total_steps=10)
    restore_optimizer(path, model, restored.optimizer)
    for left, right in zip(trainer.model.parameters(), model.parameters(), strict=True):
        for key, value in trainer.optimizer.state[left].items():
            assert torch.equal(restored.optimizer.state[right][key], value), key
    assert Tokenizer.load(path).encode("or not")


def test_a_saved_run_goes_on_bit_for_bit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trainer = trained()
    path = save(tmp_path, trainer, tokenizer)
    assert path == tmp_path / "checkpoints" / "step-000003" == latest_checkpoint(tmp_path)
    assert_whole(path, trainer)
    rng = torch.rand(4)
    again = Trainer(load_model(path), OptimConfig(), total_steps=10)
    state = restore_optimizer(path, again.model, again.optimizer)
    assert state == TrainingState(step=3, tokens=100) and torch.equal(torch.rand(4), rng)
    again.step = state.step
    for seed in range(3, 6):
        losses = {instance.forward_backward([random_batch(seed)]).loss for instance in (trainer, again)}
        norms = {instance.optim_step() for instance in (trainer, again)}
        assert len(losses) == len(norms) == 1


def test_training_state_lies_apart_and_nothing_is_pickled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, trained(), tokenizer)
    names = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    apart = {name for name in names if name.startswith("trainer/")}
    assert apart == {"trainer/optimizer.safetensors", "trainer/state.json"}
    assert {Path(name).suffix for name in names} <= {".json", ".safetensors", ".jinja", ".md"}
    final = save_final(tmp_path, trained().model, tokenizer)
    assert {file.name for file in final.iterdir()} == names - apart


def test_the_last_k_are_kept_and_the_pointer_moves(tmp_path: Path, tokenizer: Tokenizer) -> None:
    trainer = trained()
    for step in range(1, 6):
        save(tmp_path, trainer, tokenizer, step, keep=2)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000004", "step-000005"]
    (folder / "latest").write_text("step-000004\n")
    assert latest_checkpoint(tmp_path) == folder / "step-000004"
    # Rolled back by hand: the step that lies ahead is written again.
    save(tmp_path, trainer, tokenizer, 5, keep=2)
    assert latest_checkpoint(tmp_path) == folder / "step-000005"
    (folder / "latest").unlink()
    assert latest_checkpoint(tmp_path) == folder / "step-000005"
    (folder / "latest").write_text("step-000001\n")
    with pytest.raises(UserError, match=r"names .step-000001., which is no checkpoint there"):
        latest_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path / "elsewhere") is None


@contextmanager
def files_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond `size` bytes: a write fails half way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "trainer/optimizer.safetensors"])
def test_a_refused_write_leaves_the_previous_whole(tmp_path: Path, tokenizer: Tokenizer, broken: str) -> None:
    trainer = trained(3)
    path = save(tmp_path, trainer, tokenizer)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    later = trained(5)
    with files_at_most((path / broken).stat().st_size - 10), pytest.raises(UserError, match="cannot save") as error:
        save(tmp_path, later, tokenizer)
    assert "\n" not in str(error.value) and "make room" in str(error.value)
    assert latest_checkpoint(tmp_path) == path
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["latest", "step-000003"]
    assert_whole(save(tmp_path, later, tokenizer), later)


SAVING_CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)  # As in every test: bits are compared, and another number of threads may sum in another order.
sys.path.insert(0, {tests!r})
from test_train_checkpoint import save, trained
from turbos.text.tokenizer import Tokenizer
tokenizer = Tokenizer.train(["to be or not to be"] * 3, vocab_size=320)
trainer = trained()
for step in range(1, 100_000):
    save(Path({run_dir!r}), trainer, tokenizer, step)
"""


@pytest.mark.parametrize("fragment", ["model.safetensors", "trainer/optimizer.safetensors"])
def test_kill_9_in_the_middle_of_a_save_leaves_the_previous_whole(
    tmp_path: Path, tokenizer: Tokenizer, fragment: str
) -> None:
    script = SAVING_CHILD.format(tests=str(Path(__file__).parent), run_dir=str(tmp_path))
    folder = tmp_path / "checkpoints"
    with subprocess.Popen([sys.executable, "-c", script]) as child:
        deadline = time.monotonic() + 60
        while not ((folder / "step-000002").exists() and list(folder.glob(f".saving-*/{fragment}"))):
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.0005)
        child.send_signal(signal.SIGKILL)
    path = latest_checkpoint(tmp_path)
    assert path is not None
    assert_whole(path, trained())
    remove_leftovers(tmp_path)
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]
    assert_whole(save(tmp_path, trained(), tokenizer, step=200_000), trained())


def test_leftovers_of_interrupted_saves_are_removed_and_nothing_else(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = save(tmp_path, trained(), tokenizer)
    shutil.copytree(path, tmp_path / "checkpoints" / ".saving-step-000009")
    shutil.copytree(path, tmp_path / "checkpoints" / ".removing-step-000001")
    (tmp_path / "checkpoints" / ".saving-latest").write_text("step-0")
    (tmp_path / ".saving-final").mkdir()
    assert len(remove_leftovers(tmp_path)) == 4
    assert sorted(file.name for file in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000003"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "foreign"])
def test_damaged_training_state_is_one_line(tmp_path: Path, tokenizer: Tokenizer, damage: str) -> None:
    trainer = trained()
    path = save(tmp_path, trainer, tokenizer)
    file = path / "trainer" / "optimizer.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        (path / "trainer" / "state.json").write_text(json.dumps({"steps": 3}))
    with pytest.raises(UserError, match="cannot resume from") as error:
        restore_optimizer(path, trainer.model, trainer.optimizer)
    assert "\n" not in str(error.value)
