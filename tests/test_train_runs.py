"""Whole runs: pretraining and SFT in a directory, killed, interrupted, resumed to the last bit, refused in one line."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turbos.common.config import load_recipe, save_recipe
from turbos.common.errors import UserError
from turbos.common.metrics import read_metrics
from turbos.common.records import IGNORED, Batch
from turbos.data.loader import batches_once
from turbos.data.packing import batch_of
from turbos.data.problems import families, held_out, make_problem
from turbos.data.shards import ShardReader, write_shard
from turbos.model.checkpoint import load_model
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.checkpoint import latest_checkpoint, save_final
from turbos.train.held_out import bits_per_byte
from turbos.train.ingredients import DataConfig
from turbos.train.loop import Run, TrainConfig, train
from turbos.train.optim import OptimConfig
from turbos.train.pretrain import PretrainRecipe, pretrain
from turbos.train.problems import ProblemMix, held_out_samples, problem_stream
from turbos.train.progress import ProgressLine
from turbos.train.sft import SFTRecipe, sft, sft_batches
from turbos.train.trainer import NonFiniteError, Trainer

MODEL = ModelConfig(
    vocab_size=320, hidden_size=32, layers="MFAF", num_heads=2, num_kv_heads=1, head_dim=16, mamba_heads=4,
    mamba_head_dim=16, mamba_state=16, chunk_size=16, num_experts=4, expert_size=32, shared_expert_size=32,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=40, tokens_per_step=256, micro_batch_tokens=128, eval_every=20, save_every=20, seed=3, threads=1
)


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hundred short texts of made-up words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abdegilmnorstu", k=draw.randint(2, 6))) for _ in range(60)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(400)]
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def recipe(corpus: Path) -> PretrainRecipe:
    return PretrainRecipe(
        MODEL, DataConfig({str(corpus): 1.0}, held_out_tokens=256), TRAIN, OptimConfig(warmup_steps=5)
    )


@pytest.fixture(scope="module")
def straight(recipe: PretrainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("runs") / "straight"
    assert pretrain(recipe, run_dir) == run_dir / "final"
    return run_dir


def losses(run_dir: Path) -> list[tuple[float, float]]:
    records = [record for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [(float(record["loss"]), float(record["grad_norm"])) for record in records]


def assert_same_run(left: Path, right: Path) -> None:
    assert losses(left) == losses(right)
    assert (left / "final/model.safetensors").read_bytes() == (right / "final/model.safetensors").read_bytes()


PRETRAIN_CHILD = """
import sys
from pathlib import Path
from turbos.common.config import load_recipe
from turbos.train.pretrain import PretrainRecipe, pretrain
pretrain(load_recipe(PretrainRecipe, "pretrain", sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_run_killed_and_resumed_equals_a_straight_one_to_the_last_bit(
    recipe: PretrainRecipe, straight: Path, tmp_path: Path
) -> None:
    run_dir, metrics = tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    arguments = [sys.executable, "-c", PRETRAIN_CHILD, str(save_recipe(recipe, tmp_path)), str(run_dir)]
    with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as child:
        while not (metrics.exists() and metrics.read_bytes().count(b'"loss"') >= 24):
            assert child.poll() is None
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
    assert len(losses(run_dir)) < 40 and not (run_dir / "final").exists()
    assert latest_checkpoint(run_dir) == run_dir / "checkpoints" / "step-000020"
    pretrain(recipe, run_dir)
    assert_same_run(run_dir, straight)


def test_a_run_directory_holds_recipe_metrics_checkpoints_and_final(
    recipe: PretrainRecipe, straight: Path, corpus: Path
) -> None:
    assert load_recipe(PretrainRecipe, "pretrain", str(straight / "recipe.yaml")) == recipe
    records = read_metrics(straight / "metrics.jsonl")
    first, last = (record[f"bits_per_byte/{corpus}"] for record in records if f"bits_per_byte/{corpus}" in record)
    assert 0 < last < first < 8  # type: ignore[operator]
    assert losses(straight)[-1][0] < losses(straight)[0][0]
    step = next(record for record in records if record["step"] == 5)
    assert step["lr"] == recipe.optim.lr and step["tokens"] <= 256 and step["load_max_over_mean"] >= 1  # type: ignore[operator]
    assert load_model(straight / "final").config.layers == "MFAF"
    assert Tokenizer.load(straight / "final").vocab_size == 320


def test_a_finished_run_is_not_run_again(recipe: PretrainRecipe, straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    assert pretrain(recipe, straight) == straight / "final"
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_another_recipe_is_refused_with_the_keys_that_differ(recipe: PretrainRecipe, straight: Path) -> None:
    other = replace(recipe, train=replace(TRAIN, steps=50), optim=replace(recipe.optim, lr=1e-4))
    with pytest.raises(UserError, match=r"optim\.lr \(0\.003 -> 0\.0001\), train\.steps \(40 -> 50\)"):
        pretrain(other, straight)


def test_impossible_pretraining_is_refused(recipe: PretrainRecipe, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="multiple of"):
        pretrain(replace(recipe, train=replace(TRAIN, tokens_per_step=200)), tmp_path / "a")
    given = replace(recipe.data, tokenizer=str(straight / "final"))
    with pytest.raises(UserError, match="tokenizer has 320 tokens but the model 640"):
        pretrain(replace(recipe, data=given, model=replace(MODEL, vocab_size=640)), tmp_path / "b")


def interrupted_run(straight: Path, run_dir: Path, recipe: PretrainRecipe, numbers: list[int]) -> None:
    """The run of `recipe` with signals raised while step 8 is under way; resumed where its checkpoint is."""
    tokenizer = Tokenizer.load(straight / "final")
    resumed = latest_checkpoint(run_dir)
    model = load_model(resumed) if resumed else LanguageModel(MODEL).init_weights(TRAIN.seed)
    batches = fixed_batches()

    def batch_at(step: int) -> list[Batch]:
        for number in numbers if step == 7 else ():
            signal.raise_signal(number)
        return [batches[step]]

    train(
        Run("test", run_dir, replace(TRAIN, steps=12), Trainer(model, recipe.optim, 12), tokenizer, batch_at), resumed
    )


def fixed_batches() -> list[Batch]:
    from turbos.common.records import Sample

    draw = random.Random(1)
    return [batch_of([Sample(tuple(draw.choices(range(320), k=40)), (1.0,) * 40)]) for _ in range(40)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_resume(
    recipe: PretrainRecipe, straight: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: int
) -> None:
    handler = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        interrupted_run(straight, tmp_path / "stopped", recipe, [number])
    assert signal.getsignal(number) is handler
    assert "run the same command again to resume" in capfd.readouterr().err
    assert latest_checkpoint(tmp_path / "stopped") == tmp_path / "stopped/checkpoints/step-000008"
    interrupted_run(straight, tmp_path / "stopped", recipe, [])
    interrupted_run(straight, tmp_path / "whole", recipe, [])
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_second_ctrl_c_stops_at_once(recipe: PretrainRecipe, straight: Path, tmp_path: Path) -> None:
    # A shell's background job starts with SIGINT ignored; the second one must find Python's own handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted_run(straight, tmp_path, recipe, [signal.SIGINT, signal.SIGINT])
    finally:
        signal.signal(signal.SIGINT, before)
    assert latest_checkpoint(tmp_path) is None and len(losses(tmp_path)) == 7


def test_a_non_finite_loss_keeps_the_last_good_checkpoint(
    recipe: PretrainRecipe, straight: Path, tmp_path: Path
) -> None:
    batches = fixed_batches()
    batches[6] = replace(batches[6], loss_weights_T=torch.full((40,), float("inf")))
    model = LanguageModel(MODEL).init_weights(0)
    config = replace(TRAIN, steps=12, save_every=4)
    trainer = Trainer(model, recipe.optim, 12)
    tokenizer = Tokenizer.load(straight / "final")
    with pytest.raises(NonFiniteError, match="step 7, batch 1 of 1"):
        train(Run("test", tmp_path, config, trainer, tokenizer, lambda step: [batches[step]]))
    path = latest_checkpoint(tmp_path)
    assert path is not None and path.name == "step-000004" and not (tmp_path / "final").exists()
    load_model(path)


def test_bits_per_byte_of_a_uniform_model_is_its_vocabulary_over_the_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["naïve 文字 abc"] * 3, vocab_size=320)
    texts = ["a naïve text", "文字 and 42"]
    write_shard(tmp_path / "a.shard", texts, tokenizer)
    model = LanguageModel(replace(MODEL, vocab_size=tokenizer.vocab_size)).init_weights(0)
    with torch.no_grad():
        model.embed_weight.zero_()
    batches = list(batches_once(ShardReader(tmp_path / "a.shard", tokenizer), 64))
    predicted = sum(int((batch.targets_T != IGNORED).sum()) for batch in batches)
    num_bytes = sum(len(tokenizer.decode(tokenizer.encode(text)[1:]).encode()) for text in texts)
    expected = predicted * math.log2(tokenizer.vocab_size) / num_bytes
    assert bits_per_byte(model, tokenizer, batches) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained checkpoint whose tokenizer knows the problems' letters."""
    texts = [make_problem(family, seed).question for family in families() for seed in range(20)]
    tokenizer = Tokenizer.train(texts, vocab_size=320)
    model = LanguageModel(replace(MODEL, vocab_size=tokenizer.vocab_size)).init_weights(0)
    return save_final(tmp_path_factory.mktemp("base"), model, tokenizer)


@pytest.fixture
def sft_recipe(base: Path) -> SFTRecipe:
    config = TrainConfig(steps=6, tokens_per_step=512, micro_batch_tokens=256, eval_every=3, save_every=3, threads=1)
    mix = ProblemMix({"gcd/0": 1.0, "addition": 2.0}, thinking_share=0.5)
    return SFTRecipe(str(base), config, mix, OptimConfig(lr=3e-3), held_out=8)


def test_sft_batches_are_a_function_of_the_step_with_loss_on_the_assistant_only(
    sft_recipe: SFTRecipe, base: Path
) -> None:
    tokenizer = Tokenizer.load(base)
    batches, again, other = (sft_batches(sft_recipe, tokenizer, step) for step in (4, 4, 5))
    assert [batch.tokens_T.tolist() for batch in batches] == [batch.tokens_T.tolist() for batch in again]
    assert batches[0].tokens_T.tolist() != other[0].tokens_T.tolist()
    assert sum(batch.documents.total for batch in batches) <= 512
    assistant = tokenizer.special("<|assistant|>")
    for batch in batches:
        assert batch.documents.total <= 256
        for start, end in itertools.pairwise(batch.documents.borders):
            tokens = batch.tokens_T[start:end].tolist()
            turn = tokens.index(assistant)
            expected = [0.0] * turn + [1.0] * (len(tokens) - turn - 1) + [0.0]
            if tokens[turn + 2] == tokenizer.special("</think>"):
                # An empty pair of tags is what the prompt of "thinking off" ends with: closing it is not learnt.
                expected[turn + 1] = 0.0
            assert batch.loss_weights_T[start:end].tolist() == expected


def test_sft_resumes_to_the_same_weights(sft_recipe: SFTRecipe, tmp_path: Path) -> None:
    final = sft(sft_recipe, tmp_path / "whole")
    records = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    held = [record["held_out_loss/think"] for record in records if "held_out_loss/think" in record]
    assert len(held) == 2 and held[1] < held[0]  # type: ignore[operator]
    # The state of a run that was killed after step 3: its last steps are dropped.
    sft(sft_recipe, tmp_path / "cut")
    for path in sorted((tmp_path / "cut" / "final").iterdir()):
        path.unlink()
    (tmp_path / "cut" / "final").rmdir()
    (tmp_path / "cut" / "checkpoints" / "latest").write_text("step-000003\n")
    assert sft(sft_recipe, tmp_path / "cut").name == final.name
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def test_sft_from_a_place_without_checkpoint_is_refused(sft_recipe: SFTRecipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint here"):
        sft(replace(sft_recipe, init=str(tmp_path)), tmp_path / "run")


def test_problem_mix_draws_by_weight_level_and_share(base: Path) -> None:
    tokenizer = Tokenizer.load(base)
    mix = ProblemMix({"gcd/0": 3.0, "addition/1": 1.0}, thinking_share=0.25)
    samples = list(itertools.islice(problem_stream(mix, tokenizer, "key"), 400))
    assert samples == list(itertools.islice(problem_stream(mix, tokenizer, "key"), 400))
    texts = [tokenizer.decode(sample.ids) for sample in samples]
    assert 260 < sum("gcd of" in text for text in texts) < 340
    assert 260 < sum("<think></think>" in text for text in texts) < 340
    held = [tokenizer.decode(sample.ids) for sample in held_out_samples(mix, tokenizer, "short", 50)]
    assert not set(held) & set(texts) and all("<think></think>" in text for text in held)
    assert held_out(make_problem("gcd", 1_000_000))


@pytest.mark.parametrize("mix", [{"gdc": 1.0}, {"gcd/9": 1.0}, {"gcd": -1.0}, {"gcd": 0.0}])
def test_an_impossible_problem_mix_is_refused(mix: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"gdc|gcd|weight"):
        ProblemMix(mix)


def test_progress_without_a_terminal_prints_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressLine("pretrain", total_steps=3, first_step=1, active_params=1000, every_seconds=3600) as line:
        line.update(step=2, loss=2.5, tokens=1000, seconds=0.5)
        line.note("bits per byte 2.0")
        line.update(step=3, loss=2.25, tokens=1000, seconds=0.5)
        assert line.share_of_machine == pytest.approx(6 * 1000 * 2000 / line.machine_flops)
    captured = capsys.readouterr()
    assert captured.out == ""
    shown, last = captured.err.splitlines()
    assert shown == "pretrain bits per byte 2.0"
    assert last.startswith("pretrain step 3/3  loss 2.2500  2,000 tok/s  ") and last.endswith(" of sgemm  0:00 left")


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"save_every": 0}, {"keep": 0}, {"tokens_per_step": 1}])
def test_impossible_training_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        replace(TRAIN, **wrong)
