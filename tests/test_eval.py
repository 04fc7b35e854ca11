"""The grader on written answers, scores against a model that is fitted to known ones, the table and the chart."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console

from tiny import tiny_model, tiny_tokenizer
from turbos.common.errors import UserError
from turbos.common.records import Completion
from turbos.data.packing import batch_of
from turbos.data.problems import make_problem, problem_sample
from turbos.eval.problems import (
    EVAL_FILE,
    FamilyScore,
    answer_problems,
    evaluate,
    grade,
    load_scores,
    parse_family,
    problem_prompt,
    save_scores,
    stop_ids,
    wilson_stderr,
)
from turbos.eval.report import StageScores, markdown_table, plot_scores, rich_table
from turbos.text.tokenizer import END
from turbos.train.optim import OptimConfig
from turbos.train.trainer import Trainer

HELD_OUT = 1_000_000
PROBLEM = make_problem("gcd", HELD_OUT, 0)


def graded(mode, text, finish="stop", tail=()):
    """Grade free text with `{think}` and `{/think}` for the tags."""
    tokenizer = tiny_tokenizer()
    ids = []
    for number, part in enumerate(text.split("|")):
        ids += [tokenizer.special("</think>")] if number else []
        ids += tokenizer.encode(part)
    ids += [tokenizer.special(END)] if finish == "stop" else []
    prompt = tuple(problem_prompt(tokenizer, PROBLEM, mode))
    return grade(tokenizer, PROBLEM, mode, Completion(prompt, (*ids, *tail), (0.0,) * (len(ids) + len(tail)), finish))


@pytest.mark.parametrize(
    ("mode", "text", "passes"),
    [
        ("off", PROBLEM.answer, True),
        ("on", f"steps|{PROBLEM.answer}", True),
        ("on", f"|{PROBLEM.answer}", True),
        ("auto", PROBLEM.answer, True),
        ("on", PROBLEM.answer, False),  # never closed: all thinking, no answer
        ("on", f"{PROBLEM.answer}|", False),
        ("on", f"steps|{PROBLEM.answer}0", False),
        ("off", "", False),
        ("off", f"{PROBLEM.answer} or 1", False),
    ],
)
def test_only_the_final_content_counts(mode, text, passes):
    assert graded(mode, text).verdict.status == ("pass" if passes else "fail")


def test_a_turn_that_was_cut_off_fails():
    answer = graded("off", PROBLEM.answer, finish="length")
    assert (answer.verdict.status, answer.finished) == ("fail", False)


def test_what_follows_the_end_token_earns_nothing():
    tokenizer = tiny_tokenizer()
    assert graded("off", "999", tail=tokenizer.encode(PROBLEM.answer)).verdict.status == "fail"


def test_token_counts_leave_out_tags_and_end():
    tokenizer = tiny_tokenizer()
    answer = graded("on", "1-2|34")
    assert (answer.thinking_tokens, answer.answer_tokens) == (len(tokenizer.encode("1-2")), len(tokenizer.encode("34")))
    assert (graded("on", "12").thinking_tokens, graded("on", "12").answer_tokens) == (2, 0)
    assert (graded("off", "12").thinking_tokens, graded("off", "12").answer_tokens) == (0, 2)
    assert (graded("auto", "12|3").thinking_tokens, graded("auto", "12|3").answer_tokens) == (2, 1)


@pytest.fixture(scope="module")
def fitted():
    """A model that knows eight held-out problems by heart, with thinking and without."""
    torch.set_num_threads(1)
    tokenizer, model = tiny_tokenizer(), tiny_model()
    problems = [make_problem("gcd", HELD_OUT + number, 0) for number in range(8)]
    samples = [problem_sample(tokenizer, problem, mode) for problem in problems for mode in ("think", "short")]
    trainer = Trainer(model, OptimConfig(lr=1e-2, weight_decay=0.0), 150)
    for _ in range(150):
        stats = trainer.forward_backward([batch_of(samples)])
        trainer.optim_step()
    assert stats.loss < 0.05
    return model, problems


def test_evaluate_scores_a_model_that_knows_the_answers(fitted):
    model, problems = fitted
    scores = evaluate(model, tiny_tokenizer(), [("gcd", 0)], num_problems=8, max_new_tokens=120)
    assert [(score.mode, score.accuracy, score.n, score.finished) for score in scores] == [
        ("off", 1.0, 8, 1.0),
        ("on", 1.0, 8, 1.0),
    ]
    steps = [len(tiny_tokenizer().encode(problem.thinking)) for problem in problems]
    assert scores[0].thinking_tokens == 0
    assert scores[1].thinking_tokens == pytest.approx(sum(steps) / 8)


def test_evaluate_counts_families_apart_and_batches_do_not_matter(fitted):
    model, tokenizer = fitted[0], tiny_tokenizer()
    families = [("gcd", 0), ("addition", 1)]
    scores = evaluate(model, tokenizer, families, num_problems=12, max_new_tokens=120)
    assert [(score.family, score.level, score.mode) for score in scores] == [
        (family, level, mode) for mode in ("off", "on") for family, level in families
    ]
    assert [score.accuracy >= 8 / 12 for score in scores] == [True, False, True, False]
    again = evaluate(model, tokenizer, families, num_problems=12, max_new_tokens=120, max_batch=5)
    assert again == scores


def test_answers_keep_the_order_of_their_problems(fitted):
    model, problems = fitted
    answers = answer_problems(model, tiny_tokenizer(), problems[::-1], "off", 32, max_batch=3)
    assert [answer.message.content for answer in answers] == [problem.answer for problem in problems[::-1]]
    assert all(answer.completion.ids[-1] in stop_ids(tiny_tokenizer()) for answer in answers)


def test_evaluation_refuses_training_seeds_and_nothing_to_do():
    with pytest.raises(UserError, match="held-out seeds start at"):
        evaluate(tiny_model(), tiny_tokenizer(), [("gcd", 0)], seed_start=5)
    with pytest.raises(UserError, match="at least one"):
        evaluate(tiny_model(), tiny_tokenizer(), [])


def test_family_names():
    assert parse_family("gcd/2") == ("gcd", 2)
    for wrong in ("gcd/9", "gcd/x", "gdc", "gcd/"):
        with pytest.raises(UserError):
            parse_family(wrong)


@pytest.mark.parametrize(("right", "n"), [(0, 10), (3, 10), (10, 10), (640, 1000)])
def test_wilson_interval_solves_its_equation(right, n):
    """The bounds p of Wilson's interval at z = 1 are where |right / n - p| is one standard error of p."""
    half = wilson_stderr(right, n)
    centre = (right / n + 1 / (2 * n)) / (1 + 1 / n)
    for bound in (centre - half, centre + half):
        assert abs(right / n - bound) == pytest.approx(math.sqrt(max(0.0, bound * (1 - bound)) / n), abs=1e-7)


def scores_of(shift):
    made = []
    for number, family in enumerate(("gcd", "addition", "lcm", "count_bits", "spell_backward")):
        for mode, base in (("off", 0.1), ("on", 0.3)):
            right = min(100, round(100 * (base + shift * (1 + 0.3 * number))))
            tokens = 12.4 * number if mode == "on" else 0.0
            made.append(FamilyScore(family, 0, mode, right / 100, wilson_stderr(right, 100), tokens, 2.0, 100, 0.9))
    return tuple(made)


STAGES = [
    StageScores("pretrain", scores_of(0.0)),
    StageScores("sft", scores_of(0.2)),
    StageScores("rl", scores_of(0.28)),
]


def test_scores_survive_a_file(tmp_path):
    path = tmp_path / "run" / EVAL_FILE
    save_scores(STAGES[1].scores, path)
    assert tuple(load_scores(path)) == STAGES[1].scores
    path.write_text('{"scores": [{"family": 1}]}')
    with pytest.raises(UserError, match="evaluate again"):
        load_scores(path)


def test_markdown_table_shows_every_score():
    lines = markdown_table(STAGES).splitlines()
    assert lines[0] == "| problems | thinking | pretrain | sft | rl |"
    assert lines[2:4] == [
        "| gcd/0 | off | 10.0 ± 3.0 | 30.0 ± 4.6 | 38.0 ± 4.8 |",
        "| gcd/0 | on | 30.0 ± 4.6 · 0 | 50.0 ± 5.0 · 0 | 58.0 ± 4.9 · 0 |",
    ]
    assert lines[5].endswith(" · 12 |")
    assert lines[12:14] == [
        "| mean | off | 10.0 ± 1.3 | 42.0 ± 2.2 | 54.8 ± 2.1 |",
        "| mean | on | 30.0 ± 2.0 | 62.0 ± 2.1 | 74.8 ± 1.9 |",
    ]


def test_a_stage_that_was_not_measured_stays_blank():
    only_gcd = dataclasses.replace(STAGES[0], scores=STAGES[0].scores[:2])
    assert "| addition/0 | off |  | 36.0 " in markdown_table([only_gcd, STAGES[1]])


def test_terminal_table_has_the_same_cells_and_fits_80_columns():
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(rich_table(STAGES))
    text = console.export_text()
    for line in markdown_table(STAGES).splitlines()[2:14]:
        for cell in line.strip("| ").split(" | "):
            assert cell in text


def test_chart_is_written(tmp_path):
    path = plot_scores(STAGES, tmp_path / "scores.png")
    assert path.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="no scores"):
        plot_scores([], tmp_path / "none.png")


def test_broken_weights_are_no_wrong_answers() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.norm_weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="answer 0 broke off after 0 tokens: the logits are not finite"):
        evaluate(model, tiny_tokenizer(), [("gcd", 0)], num_problems=2)
