"""Rollouts, the objective and the loop on a tiny model: exact resume, small mismatch, learning, figures."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tiny import save_tiny, tiny_model, tiny_tokenizer
from turbos.common.errors import UserError
from turbos.common.metrics import METRICS_FILE, read_metrics
from turbos.common.records import Verdict
from turbos.data.packing import batch_of
from turbos.data.problems import held_out, make_problem
from turbos.model.checkpoint import load_model
from turbos.rl.loop import Learner, RLConfig, RLRecipe, rl
from turbos.rl.losses import LossConfig
from turbos.rl.objective import Objective
from turbos.rl.rollout import (
    Group,
    RolloutConfig,
    Task,
    draw_tasks,
    rewards_of,
    sample_groups,
    sampling_seed,
    training_samples,
)
from turbos.rl.statistics import rollout_figures, update_figures
from turbos.train.checkpoint import latest_checkpoint
from turbos.train.optim import OptimConfig
from turbos.train.problems import ProblemMix

MIX = ProblemMix({"gcd/0": 2.0, "addition/0": 1.0}, thinking_share=0.5)
SMALL = RolloutConfig(groups=6, samples=4, max_new_tokens=12, max_answer_tokens=4)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def lenient(monkeypatch):
    """A reward that random weights earn half of the time: the first token's number is even."""

    def judge(answer):
        right = answer.completion.ids[0] % 2 == 0
        return dataclasses.replace(answer, verdict=Verdict("pass" if right else "fail", float(right)))

    import turbos.rl.rollout as rollout

    grade = rollout.grade
    monkeypatch.setattr(rollout, "grade", lambda *words: judge(grade(*words)))


def recipe_of(tmp_path: Path, **changes: object) -> RLRecipe:
    start = tmp_path / "start"
    if not start.exists():
        save_tiny(start)
    train = RLConfig(steps=3, save_every=1, threads=1, micro_batch_tokens=256)
    recipe = RLRecipe(str(start), train, MIX, SMALL, optim=OptimConfig(lr=1e-2, decay_fraction=0.0))
    return dataclasses.replace(recipe, **changes)


def test_tasks_are_a_function_of_the_key_and_follow_the_mixture():
    tasks = draw_tasks(MIX, 300, "seed 0 step 0")
    assert tasks == draw_tasks(MIX, 300, "seed 0 step 0")
    assert tasks != draw_tasks(MIX, 300, "seed 0 step 1")
    assert not any(held_out(task.problem) for task in tasks)
    assert 160 < sum(task.problem.family == "gcd" for task in tasks) < 240
    assert 110 < sum(task.mode == "on" for task in tasks) < 190
    assert {task.problem.level for task in draw_tasks(ProblemMix({"gcd": 1.0}), 60, "")} == {0, 1, 2}


def test_sampling_seeds_differ_everywhere_and_fit_int64():
    seeds = {sampling_seed(f"step {step}", p, n) for step in range(4) for p in range(8) for n in range(8)}
    assert len(seeds) == 4 * 8 * 8
    assert min(seeds) >= 0 and max(seeds) < 2**63


def test_groups_are_the_same_in_any_batch():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tasks = draw_tasks(MIX, 6, "k")
    groups = sample_groups(model, tokenizer, tasks, SMALL, "k")
    assert [group.task for group in groups] == tasks
    assert len({answer.completion.ids for answer in groups[0].answers}) > 1
    split = sample_groups(model, tokenizer, tasks, dataclasses.replace(SMALL, max_batch=5), "k")
    ids = [[answer.completion.ids for answer in group.answers] for group in groups]
    assert ids == [[answer.completion.ids for answer in group.answers] for group in split]
    for group in groups:
        limit = SMALL.token_limit(group.task.mode)
        assert all(len(answer.completion.ids) <= limit for answer in group.answers)


def test_rewards_are_verdicts_and_abstentions_are_neither_0_nor_1():
    group = sample_groups(tiny_model(), tiny_tokenizer(), draw_tasks(MIX, 1, "k"), SMALL, "k")[0]
    verdicts = (Verdict("pass", 1.0), Verdict("fail", 0.0), Verdict("abstain", None), Verdict("fail", 0.0))
    answers = tuple(dataclasses.replace(a, verdict=v) for a, v in zip(group.answers, verdicts, strict=True))
    rewards = rewards_of([Group(group.task, answers)])[0].tolist()
    assert rewards[:2] == [1.0, 0.0] and math.isnan(rewards[2])
    figures = rollout_figures([Group(group.task, answers)], 0, 1.0)
    assert (figures["abstained"], figures["reward"], figures["groups_dropped"]) == (1, pytest.approx(1 / 3), 1)


def test_training_samples_carry_loss_on_what_was_sampled():
    group = sample_groups(tiny_model(), tiny_tokenizer(), draw_tasks(MIX, 1, "k"), SMALL, "k")[0]
    samples = training_samples(group, torch.tensor([1.0, -1.0, 0.5, 0.0]))
    for sample, answer, advantage in zip(samples, group.answers, (1.0, -1.0, 0.5, 0.0), strict=True):
        prompt, written = answer.completion.prompt_ids, answer.completion.ids
        assert sample.ids == prompt + written
        assert sample.loss_weights == (0.0,) * len(prompt) + (1.0,) * len(written)
        assert sample.logprobs == (0.0,) * len(prompt) + answer.completion.logprobs
        assert sample.advantage == advantage


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("layers", ["MFAF", "MD", "AD"])
def test_trainer_and_sampler_agree(temperature, layers):
    """Prefill and steps against one packed pass, fp32: at most 1e-4 nats apart on any token."""
    model = tiny_model(layers=layers)
    config = dataclasses.replace(SMALL, temperature=temperature)
    groups = sample_groups(model, tiny_tokenizer(), draw_tasks(MIX, 6, "k"), config, "k")
    samples = [sample for group in groups for sample in training_samples(group, torch.ones(4))]
    objective = Objective(LossConfig(), temperature)
    terms = objective(model, batch_of(samples))
    assert 0 < objective.largest_mismatch <= 1e-4
    tokens = sum(len(answer.completion.ids) for group in groups for answer in group.answers)
    assert terms.sums["mismatch"] / tokens <= 1e-5
    # On policy with advantage 1 the loss of each token is -1.
    assert terms.loss_sum.item() == pytest.approx(-tokens, rel=1e-4)


def test_objective_sees_a_mismatch_that_is_there():
    group = sample_groups(tiny_model(), tiny_tokenizer(), draw_tasks(MIX, 1, "k"), SMALL, "k")[0]
    objective = Objective(LossConfig(), 1.0)
    objective(tiny_model(seed=1), batch_of(training_samples(group, torch.ones(4))))
    assert objective.largest_mismatch > 0.1


def test_reference_pull_is_zero_at_the_reference_and_positive_elsewhere():
    model, config = tiny_model(), LossConfig(kl_coefficient=0.1)
    group = sample_groups(model, tiny_tokenizer(), draw_tasks(MIX, 1, "k"), SMALL, "k")[0]
    batch = batch_of(training_samples(group, torch.ones(4)))
    assert Objective(config, 1.0, tiny_model())(model, batch).sums["kl_reference"] == pytest.approx(0.0, abs=1e-6)
    assert Objective(config, 1.0, tiny_model(seed=1))(model, batch).sums["kl_reference"] > 0.1


def figures_of(run_dir: Path) -> list[dict[str, object]]:
    """Logged figures without those of the clock."""
    clock = ("seconds", "per_second")
    return [
        {name: str(value) for name, value in record.items() if not name.endswith(clock)}
        for record in read_metrics(run_dir / METRICS_FILE)
    ]


@pytest.mark.parametrize("updates", [1, 2])
def test_resume_is_exact(tmp_path, lenient, updates):
    recipe = recipe_of(tmp_path)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, updates=updates))
    whole = load_model(rl(recipe, tmp_path / "whole"))
    checkpoints = tmp_path / "whole" / "checkpoints"
    assert [record["step"] for record in figures_of(tmp_path / "whole")] == ["1", "2", "3"]
    # As after a kill between the second save and the third: the third checkpoint and the end are not there.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "final")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step-000003")
    (tmp_path / "cut" / "checkpoints" / "latest").write_text("step-000002\n")
    resumed = load_model(rl(recipe, tmp_path / "cut"))
    assert (checkpoints / "step-000003").is_dir()
    assert figures_of(tmp_path / "cut") == figures_of(tmp_path / "whole")
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    changed = [not torch.equal(a, b) for a, b in zip(whole.parameters(), tiny_model().parameters(), strict=True)]
    assert sum(changed) > len(changed) // 2


@pytest.mark.parametrize("stopped_at", [1, 2])
def test_ctrl_c_finishes_the_step_saves_and_resumes(tmp_path, lenient, monkeypatch, stopped_at, capsys):
    recipe = recipe_of(tmp_path, train=RLConfig(steps=3, save_every=3, threads=1))
    whole = load_model(rl(recipe, tmp_path / "whole"))
    step = Learner.step

    def interrupted(self, number):
        if number == stopped_at:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, number)

    monkeypatch.setattr(Learner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rl(recipe, tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run").name == f"step-{stopped_at + 1:06d}"
    assert (tmp_path / "run" / "final").exists() == (stopped_at == 2)
    monkeypatch.setattr(Learner, "step", step)
    resumed = load_model(rl(recipe, tmp_path / "run"))
    assert figures_of(tmp_path / "run") == figures_of(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_finished_run_is_left_alone_and_another_recipe_refused(tmp_path, lenient):
    recipe = recipe_of(tmp_path)
    final = rl(recipe, tmp_path / "run")
    written = (final / "model.safetensors").stat().st_mtime_ns
    assert rl(recipe, tmp_path / "run") == final
    assert (final / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="another recipe"):
        rl(dataclasses.replace(recipe, pass_mark=0.5), tmp_path / "run")


def test_figures_are_complete(tmp_path, lenient):
    rl(recipe_of(tmp_path), tmp_path / "run")
    last = read_metrics(tmp_path / "run" / METRICS_FILE)[-1]
    names = (
        "reward reward/on reward/off pass_rate groups_dropped completion_tokens entropy clip_fraction "
        "mismatch mismatch_max mismatch_k3 rollout_tokens_per_second update_tokens_per_second seconds lr grad_norm loss"
    )
    for name in names.split():
        assert isinstance(last[name], float | int), name
        assert math.isfinite(last[name]), name
    assert last["mismatch_max"] <= 1e-4
    assert any(name.startswith("reward/gcd/0/") for name in last)


def test_a_step_without_any_difference_changes_nothing(tmp_path):
    """Random weights solve no problem: every group is dropped, the weights stay, the run goes on."""
    final = rl(recipe_of(tmp_path), tmp_path / "run")
    for one, other in zip(load_model(final).parameters(), tiny_model().parameters(), strict=True):
        assert torch.equal(one, other)
    records = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [record["groups_dropped"] for record in records] == [6, 6, 6]
    assert all(math.isnan(record["loss"]) and record["tokens"] == 0 for record in records)


def test_it_learns_what_is_rewarded(tmp_path, lenient):
    recipe = recipe_of(tmp_path)
    recipe = dataclasses.replace(
        recipe,
        train=RLConfig(steps=25, threads=1),
        rollout=dataclasses.replace(SMALL, groups=8, samples=8, max_new_tokens=2, max_answer_tokens=2),
        optim=OptimConfig(lr=1e-2, weight_decay=0.0, decay_fraction=0.0),
    )
    learner = Learner(recipe, tiny_model(), tiny_tokenizer())
    rewards = [learner.step(step)["reward"] for step in range(25)]
    assert sum(rewards[:3]) / 3 < 0.7
    assert sum(rewards[-3:]) / 3 > 0.9


def test_no_update_has_no_figures_but_counts():
    figures = update_figures([], 1.0)
    assert (figures["tokens"], figures["loss_weight"]) == (0, 0)
    assert math.isnan(figures["loss"]) and math.isnan(figures["mismatch_max"])


def test_impossible_options_are_refused():
    for wrong in (lambda: RolloutConfig(samples=1), lambda: RolloutConfig(temperature=0.0), lambda: RLConfig(steps=0)):
        with pytest.raises(UserError):
            wrong()
    assert Task(make_problem("gcd", 1), "on").mode == "on"
