"""Annealing runs: text and conversations mixed, nothing cut, resumed to the last bit, the loader never in the way."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turbos.cli.main import main
from turbos.common.config import load_recipe, save_recipe
from turbos.common.errors import UserError
from turbos.common.metrics import read_metrics
from turbos.data.chats import ChatTargets
from turbos.data.loader import Waiting
from turbos.data.problems import families, make_problem
from turbos.data.shards import ShardReader
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.anneal import AnnealRecipe, anneal
from turbos.train.checkpoint import save_final
from turbos.train.ingredients import ChatConfig, DataConfig, chat_ingredients
from turbos.train.loop import TrainConfig
from turbos.train.optim import OptimConfig, learning_rate
from turbos.train.phase import WAITING_FILE, read_waiting
from turbos.train.pretrain import PretrainRecipe, pretrain
from turbos.train.problems import ProblemMix

MODEL = ModelConfig(
    vocab_size=320, hidden_size=32, layers="MFAF", num_heads=2, num_kv_heads=1, head_dim=16, mamba_heads=4,
    mamba_head_dim=16, mamba_state=16, chunk_size=16, num_experts=4, expert_size=32, shared_expert_size=32,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=12, tokens_per_step=512, micro_batch_tokens=256, eval_every=6, save_every=6, seed=3, threads=1
)


@pytest.fixture(autouse=True)
def same_threads_after() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    words = ["".join(draw.choices("abdegilmnorstu", k=draw.randint(2, 6))) for _ in range(60)]
    texts = [" ".join(draw.choices(words, k=draw.randint(5, 40))) for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [make_problem(family, seed).question for family in families() for seed in range(20)]
    tokenizer = Tokenizer.train(texts, vocab_size=320)
    model = LanguageModel(replace(MODEL, vocab_size=tokenizer.vocab_size)).init_weights(0)
    return save_final(tmp_path_factory.mktemp("base"), model, tokenizer)


@pytest.fixture(scope="module")
def recipe(base: Path, corpus: Path) -> AnnealRecipe:
    mix = ProblemMix({"gcd/0": 1.0, "addition/1": 1.0, "base_conversion/1": 1.0}, thinking_share=0.5)
    return AnnealRecipe(
        str(base),
        DataConfig({str(corpus): 1.0}, longest_document=96, held_out_tokens=512),
        ChatConfig({"problems": 1.0}, mix, num_problems=300),
        TRAIN,
        OptimConfig(lr=3e-3, decay="cosine", decay_fraction=1.0, final_lr_ratio=0.1),
    )


@pytest.fixture(scope="module")
def annealed(recipe: AnnealRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "annealed"
    assert anneal(recipe, run_dir) == run_dir / "final"
    return run_dir


def steps_of(run_dir: Path) -> list[dict[str, float]]:
    return [dict(record) for record in read_metrics(run_dir / "metrics.jsonl") if "loss" in record]  # type: ignore[arg-type]


def test_texts_and_conversations_are_learnt_along_a_cosine(recipe: AnnealRecipe, annealed: Path, corpus: Path) -> None:
    records = read_metrics(annealed / "metrics.jsonl")
    for name in (str(corpus), "chats:problems"):
        first, last = (record[f"bits_per_byte/{name}"] for record in records if f"bits_per_byte/{name}" in record)
        assert 0 < last < first  # type: ignore[operator]
    steps = steps_of(annealed)
    assert [step["lr"] for step in steps] == [learning_rate(step, recipe.optim, 12) for step in range(12)]
    # Half of the tokens are conversations, whose questions carry no loss.
    shares = [step["loss_weight"] / step["tokens"] for step in steps]
    assert 0.5 < sum(shares) / len(shares) < 0.95
    card = (annealed / "final" / "README.md").read_text()
    assert "conversations problems, weight 1" in card and str(recipe.init) in card


def test_long_conversations_wait_with_their_counts(
    recipe: AnnealRecipe, annealed: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    waiting = read_waiting(annealed / WAITING_FILE)
    (shard,) = (annealed / "shards").glob("chats-problems-*.train.shard")
    reader = ShardReader(shard)
    lengths = [len(document) for document in reader.documents()]
    long = [number for number, length in enumerate(lengths) if length > 96]
    assert 0 < len(long) < len(lengths) == 300
    assert waiting == [Waiting("chats:problems", shard.name, number, lengths[number]) for number in long]
    # Whole conversations, so that a phase with a longer context can take them as they are.
    targets = ChatTargets.of(Tokenizer.load(annealed / "final"))
    assert all(reader.document(one.document)[-1] == targets.end for one in waiting)
    anneal(replace(recipe, train=replace(TRAIN, steps=1)), tmp_path / "run")
    said = capfd.readouterr().err
    tokens = sum(lengths[number] for number in long)
    assert f"anneal {len(long)} of 300 conversations ({tokens} tokens) are longer than 96 tokens and wait" in said
    assert "0.5 k tokens asked: " in said and "epochs of" in said


def test_an_annealing_run_resumes_to_the_last_bit(recipe: AnnealRecipe, annealed: Path, tmp_path: Path) -> None:
    # The state of a run that was killed after step 6: what came later is gone.
    shutil.copytree(annealed, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000012")
    (tmp_path / "cut" / "checkpoints" / "latest").write_text("step-000006\n")
    anneal(recipe, tmp_path / "cut")
    figures = [[(step["loss"], step["grad_norm"]) for step in steps_of(run)] for run in (annealed, tmp_path / "cut")]
    assert figures[0] == figures[1]
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (annealed, tmp_path / "cut")]
    assert weights[0] == weights[1]


def test_no_step_waits_for_its_batch(annealed: Path) -> None:
    steps = steps_of(annealed)[1:]
    # A step takes some 30 ms here, its batch under one; the first is waited for, and the machine has other work.
    waited = sorted(step["data_seconds"] / step["seconds"] for step in steps)
    assert waited[len(waited) // 2] < 0.05


def test_conversations_of_a_file_are_split_and_found_again(base: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"say {n % 80}"}, {"role": "assistant", "content": str(n % 80)}]}
        for n in range(120)
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = Tokenizer.load(base)
    config = ChatConfig({str(path): 2.0})
    (one,) = chat_ingredients(config, tokenizer, tmp_path / "shards", seed=0)
    train, held = (ShardReader(place, tokenizer) for place in (one.shards.train, one.shards.held_out))
    assert len(train) + len(held) == 80 and len(held) >= 1 and one.weight == 2.0
    assert not {d.tobytes() for d in train.documents()} & {d.tobytes() for d in held.documents()}
    before = one.shards.train.stat().st_mtime_ns
    assert chat_ingredients(config, tokenizer, tmp_path / "shards", seed=0) == [one]
    assert one.shards.train.stat().st_mtime_ns == before


def test_training_problems_are_never_held_out_ones(recipe: AnnealRecipe, base: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(base)
    (one,) = chat_ingredients(recipe.chats, tokenizer, tmp_path, seed=3)
    questions = [
        {tokenizer.decode(document.tolist()).split("<|end|>")[0] for document in ShardReader(place).documents()}
        for place in (one.shards.train, one.shards.held_out)
    ]
    assert questions[0] and questions[1] and not questions[0] & questions[1]


def test_mistakes_are_refused_before_anything_is_made(recipe: AnnealRecipe, tmp_path: Path) -> None:
    missing = replace(recipe, data=DataConfig({"englich": 1.0}))
    with pytest.raises(UserError, match="did you mean 'english'"):
        anneal(missing, tmp_path / "run")
    with pytest.raises(UserError, match="multiple of"):
        anneal(replace(recipe, train=replace(TRAIN, tokens_per_step=300)), tmp_path / "run")
    with pytest.raises(UserError, match="tokenizer says nothing in annealing"):
        replace(recipe, data=replace(recipe.data, tokenizer="somewhere"))
    with pytest.raises(UserError, match="sources names no conversations"):
        ChatConfig({})
    with pytest.raises(UserError, match="no conversations at"):
        anneal(replace(recipe, chats=ChatConfig({str(tmp_path / "no.jsonl"): 1.0})), tmp_path / "other")
    assert not (tmp_path / "run").exists()
    pretraining = PretrainRecipe(MODEL, DataConfig({"englich": 1.0}), TRAIN)
    with pytest.raises(UserError, match="did you mean 'english'"):
        pretrain(pretraining, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_verb_anneals(recipe: AnnealRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(save_recipe(recipe, tmp_path / "recipe"))
    assert load_recipe(AnnealRecipe, "anneal", path) == recipe
    assert main(["anneal", path, "--run", str(tmp_path / "run"), "--train.steps", "1", "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)
    assert outcome["verb"] == "anneal" and Path(outcome["final"]).is_dir()
