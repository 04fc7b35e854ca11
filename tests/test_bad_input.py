"""What users, disks and other processes do wrong: each is refused in one line, and nothing that was saved is lost."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tiny import save_tiny, tiny_model, tiny_tokenizer
from turbos.cli.main import main
from turbos.cli.plot import plot_run
from turbos.common.config import RECIPE_FILE, save_recipe
from turbos.common.errors import UserError
from turbos.common.metrics import read_metrics, truncate_after
from turbos.common.records import Batch
from turbos.data.corpus import build_shards
from turbos.data.loader import Loader, Part, batches_once
from turbos.data.packing import batch_of
from turbos.data.shards import HEADER_BYTES, ShardReader, write_shard
from turbos.data.sources import documents
from turbos.model.config import ModelConfig
from turbos.rl.loop import RLConfig, RLRecipe
from turbos.rl.losses import LossConfig
from turbos.rl.rollout import RolloutConfig
from turbos.train.checkpoint import TrainingState, latest_checkpoint, restore_optimizer, save_checkpoint
from turbos.train.held_out import bits_per_byte
from turbos.train.loop import Run, TrainConfig, open_run, sole_owner, train
from turbos.train.optim import OptimConfig
from turbos.train.problems import ProblemMix
from turbos.train.trainer import Trainer

TRAIN = TrainConfig(steps=3, tokens_per_step=64, micro_batch_tokens=64)
MODEL = ModelConfig(vocab_size=320, hidden_size=32, layers="MF")


def fails_in_one_line(work: Callable[[], object], said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        work()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layers", ["(MF)*99999999999", "(M)*9" + "9" * 6000, "(((M)*1000)*1000)*1000", "M" * 10_001])
def test_a_stack_that_would_fill_the_memory_is_refused(layers: str) -> None:
    fails_in_one_line(lambda: replace(MODEL, layers=layers), "sublayers")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: replace(MODEL, vocab_size=8 * 10**12), "vocab_size must be at most"),
        (lambda: replace(MODEL, num_experts=10**19), "num_experts must be at most"),
        (lambda: replace(TRAIN, seed=-1), "seed must be"),
        (lambda: replace(TRAIN, seed=2**63), "seed must be"),
        (lambda: replace(TRAIN, threads=0), "threads must be"),
        (lambda: RLConfig(steps=1, seed=-1), "seed must be"),
        (lambda: RLConfig(steps=1, threads=0), "threads must be"),
        (lambda: RLRecipe("x", RLConfig(steps=1), pass_mark=math.nan), "pass_mark"),
        (lambda: OptimConfig(lr=math.nan), "lr must be"),
        (lambda: OptimConfig(lr=math.inf), "lr must be"),
        (lambda: OptimConfig(eps=-1.0), "eps must be"),
        (lambda: OptimConfig(clip=math.nan), "clip must be"),
        (lambda: OptimConfig(weight_decay=-0.1), "weight_decay must"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "betas must be"),
        (lambda: LossConfig(clip_high=math.nan), "clip_high"),
        (lambda: LossConfig(kl_coefficient=math.nan), "kl_coefficient"),
        (lambda: RolloutConfig(temperature=math.nan), "temperature"),
        (lambda: RolloutConfig(temperature=math.inf), "temperature"),
        (lambda: RolloutConfig(max_answer_tokens=0), "max_answer_tokens"),
        (lambda: ProblemMix({"gcd": math.nan}), "weight of 'gcd'"),
        (lambda: ProblemMix({"gcd": math.inf}), "weight of 'gcd'"),
        (lambda: ProblemMix({"gcd/": 1.0}), "no level"),
    ],
)
def test_numbers_that_no_run_can_have_are_refused_at_once(make: Callable[[], object], said: str) -> None:
    fails_in_one_line(make, said)


def test_gradients_may_go_unclipped() -> None:
    assert OptimConfig(clip=math.inf).clip == math.inf


def surrogate(path: Path) -> None:
    path.with_suffix(".jsonl").write_text('{"text": "fine"}\n{"text": "bad \\ud800"}\n')


def deep(path: Path) -> None:
    path.with_suffix(".jsonl").write_text("[" * 100_000 + "\n")


def late_byte(path: Path) -> None:
    path.with_suffix(".txt").write_bytes(b"a b c\n" * 20_000 + b"\xff\n")


def column_of(values: list[object]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": values}), path.with_suffix(".parquet"))

    return write


def broken_body(path: Path) -> None:
    column_of([f"text {number}" * 9 for number in range(200)])(path)
    file = path.with_suffix(".parquet")
    content = bytearray(file.read_bytes())
    content[100:1000] = random.Random(0).randbytes(900)
    file.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (surrogate, "line 2 holds half a surrogate pair"),
        (deep, "line 1 is not JSON"),
        (late_byte, r"not UTF-8 text \(invalid start byte, after line [0-9]+\)"),
        (column_of([1, 2]), "column text holds int64, not text"),
        (column_of([b"x"]), "column text holds binary, not text"),
        (column_of([["x"]]), "column text holds list"),
        (broken_body, "not a parquet file, or damaged"),
    ],
)
def test_texts_that_are_none_are_named(tmp_path: Path, write: Callable[[Path], None], said: str) -> None:
    write(tmp_path / "a")
    fails_in_one_line(lambda: list(documents(str(tmp_path))), said)


def test_a_damaged_shard_is_noticed_when_a_run_goes_on(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(200)))
    (shards,) = build_shards([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "shards")
    content = bytearray(shards.train.read_bytes())
    content[HEADER_BYTES] ^= 1
    shards.train.write_bytes(bytes(content))
    fails_in_one_line(lambda: build_shards([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "shards"), "checksum")


def test_cuts_that_leave_end_tokens_alone_give_no_batch_without_loss(tmp_path: Path) -> None:
    """Every document is one token longer than two slots: 40 end tokens stand alone, and fill slots by themselves."""
    tokenizer = tiny_tokenizer()
    write_shard(tmp_path / "a.shard", ["".join(random.Random(n).choices("xyzvw", k=16)) for n in range(40)], tokenizer)
    reader = ShardReader(tmp_path / "a.shard", tokenizer)
    assert {len(document) for document in reader.documents()} == {17}
    loader = Loader([Part("a", (reader,))], tokens_per_batch=8)
    batches = [loader.batch(step) for step in range(loader.slots_in_epoch("a"))]
    assert all(float(batch.loss_weights_T.sum()) > 0 for batch in batches)
    assert sum(float(batch.loss_weights_T.sum()) for batch in batches) == 40 * 16


def test_a_slot_of_no_tokens_is_refused_not_ignored(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.shard", ["some text"], tiny_tokenizer())
    part = Part("a", (ShardReader(tmp_path / "a.shard"),))
    fails_in_one_line(lambda: Loader([part], 8, longest_document=0), "longest_document must be from 2")
    fails_in_one_line(lambda: Loader([replace(part, weight=math.inf)], 8), "weight inf")


def test_texts_of_a_single_token_have_no_bits_per_byte(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.shard", ["a", "b"], tiny_tokenizer())
    batches = list(batches_once(ShardReader(tmp_path / "a.shard"), 8))
    assert math.isnan(bits_per_byte(tiny_model(), tiny_tokenizer(), batches))


@pytest.mark.parametrize("line", ["{oops", "5", '{"loss": 1.0}', '{"step": "1"}', '{"step": 1, "loss": [1]}', "\0\0"])
def test_a_damaged_line_of_the_metrics_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null}\n' + line + '\n{"step": 2, "loss": 1.0}\n')
    whole = path.read_bytes()
    fails_in_one_line(lambda: truncate_after(path, 1), "line 2, is not a metrics record")
    fails_in_one_line(lambda: read_metrics(path), "line 2, is not a metrics record")
    assert path.read_bytes() == whole


def saved_run(run_dir: Path) -> Trainer:
    trainer = Trainer(tiny_model(), OptimConfig(), total_steps=3)
    trainer.forward_backward(small_batches())
    trainer.optim_step()
    save_checkpoint(run_dir, TrainingState(1, 40), trainer.model, tiny_tokenizer(), trainer.optimizer)
    return trainer


def small_batches() -> list[Batch]:
    from turbos.common.records import Sample

    return [batch_of([Sample(tuple(range(50, 90)), (1.0,) * 40)])]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\0", b"../../other\n", b"step-000009\n", b"step-000001/trainer\n"])
def test_a_damaged_pointer_is_named(tmp_path: Path, content: bytes) -> None:
    saved_run(tmp_path)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    fails_in_one_line(lambda: latest_checkpoint(tmp_path), r"no checkpoint there \(step-000001\)")


def test_a_copy_of_a_checkpoint_under_another_name_is_left_alone(tmp_path: Path) -> None:
    trainer = saved_run(tmp_path)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-000001", folder / "step-000001-good")
    for step in (2, 3):
        save_checkpoint(tmp_path, TrainingState(step), trainer.model, tiny_tokenizer(), trainer.optimizer, keep=1)
    assert {path.name for path in folder.iterdir()} == {"latest", "step-000001-good", "step-000003"}


@pytest.mark.parametrize("damage", ["rng", "short rng", "norm_weight/exp_avg", "norm_weight/exp_avg_sq", "state"])
def test_damaged_training_state_is_named(tmp_path: Path, damage: str) -> None:
    trainer = saved_run(tmp_path)
    place = tmp_path / "checkpoints" / "step-000001" / "trainer"
    tensors = load_file(place / "optimizer.safetensors")
    if damage == "short rng":
        tensors["rng"] = tensors["rng"][:4].clone()
    elif damage == "state":
        (place / "state.json").write_text('{"step": "1", "tokens": 40}')
    else:
        del tensors[damage]
    save_file(tensors, place / "optimizer.safetensors")
    fails_in_one_line(lambda: restore_optimizer(place.parent, trainer.model, trainer.optimizer), "cannot resume from")


def test_a_full_disk_leaves_the_saved_recipe_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_recipe(TRAIN, tmp_path)
    whole = (tmp_path / RECIPE_FILE).read_bytes()

    def full(path: Path, text: str, **_: object) -> int:
        path.open("w").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        save_recipe(TRAIN, tmp_path)
    assert (tmp_path / RECIPE_FILE).read_bytes() == whole


def test_a_recipe_can_be_mended_until_something_was_made_by_it(tmp_path: Path) -> None:
    open_run(replace(TRAIN, steps=1), tmp_path)
    open_run(TRAIN, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    fails_in_one_line(lambda: open_run(replace(TRAIN, steps=1), tmp_path), "belongs to another recipe")
    (tmp_path / RECIPE_FILE).write_bytes(b"\xff")
    fails_in_one_line(lambda: open_run(TRAIN, tmp_path), "cannot read recipe")


def test_a_run_has_one_process_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from turbos.train.loop import sole_owner\n"
    code += "with sole_owner(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        fails_in_one_line(lambda: sole_owner(tmp_path).__enter__(), "another process is at work")
    finally:
        holder.kill()
        holder.wait()
    with sole_owner(tmp_path):
        assert not list(tmp_path.iterdir())


def test_ctrl_c_in_the_last_step_saves_the_run_and_stops_what_follows(tmp_path: Path) -> None:
    trainer = Trainer(tiny_model(), OptimConfig(), total_steps=3)

    def batch_at(step: int) -> list[Batch]:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return small_batches()

    with pytest.raises(KeyboardInterrupt):
        train(Run("test", tmp_path, TRAIN, trainer, tiny_tokenizer(), batch_at))
    assert (tmp_path / "final" / "model.safetensors").is_file()


def test_a_path_with_dollar_signs_is_drawn_and_other_formats_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "a $x_{ b$ c"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert plot_run(run_dir, run_dir / "curves.png").stat().st_size > 0
    assert main(["plot", str(run_dir), "--out", str(tmp_path / "x.foo")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        ["pretrain", "demo", "--run", "FILE"],
        ["pretrain", "demo", "--run", "FILE/x"],
        ["pretrain", "demo", "--run", "x" * 300],
        ["sft", "demo", "--threads", "1", "--train.threads", "2", "--run", "RUN"],
        ["describe", "FILE"],
        ["describe", "DEEP"],
        ["generate", "CKPT", "--prompt", "a", "--seed", str(2**70)],
        ["generate", "CKPT", "--prompt", "a\udcff"],
    ],
)
def test_wrong_words_are_one_line(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, nested = tmp_path / "file.yaml", tmp_path / "deep.yaml"
    file.write_bytes(b"\xff\xfe")
    nested.write_text("a: " + "[" * 3000)
    checkpoint = save_tiny(tmp_path / "ckpt") if "CKPT" in words else tmp_path
    places = {"FILE": str(file), "FILE/x": f"{file}/x", "DEEP": str(nested), "CKPT": str(checkpoint)}
    places["RUN"] = str(tmp_path / "run")
    assert main([places.get(word, word) for word in words]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_closed_pipe_and_an_ascii_terminal_are_no_defects(tmp_path: Path) -> None:
    checkpoint = str(save_tiny(tmp_path / "ckpt"))
    words = ["generate", checkpoint, "--prompt", "gcd", "--temperature", "2", "--max-new-tokens", "60"]
    command = [sys.executable, "-m", "turbos", *words]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ascii_only)
    assert (done.returncode, done.stderr) == (0, "") and "?" in done.stdout and done.stdout.isascii()
