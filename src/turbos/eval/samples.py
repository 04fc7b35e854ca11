"""A few answers to show: held-out problems that the evaluation does not count, answered with thinking off and on.

samples = sample_answers(model, tokenizer, [("gcd", 0)], max_new_tokens=128)
save_samples(samples, run_dir / SAMPLES_FILE)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from turbos.common.errors import UserError
from turbos.data.problems import make_problem
from turbos.eval.problems import Answer, Mode, answer_problems
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer

SAMPLES_FILE = "samples.json"
FIRST_SAMPLE_SEED = 1_500_000
"""Far behind the problems that are counted."""
MODES: tuple[Mode, ...] = ("off", "on")


@dataclass(frozen=True)
class Shown:
    """One answer: what it thought and said, and the verdict."""

    mode: Mode
    thinking: str
    content: str
    verdict: str


@dataclass(frozen=True)
class ShownProblem:
    """A problem, its right answer, and an answer in each mode."""

    family: str
    level: int
    question: str
    right: str
    answers: tuple[Shown, ...]


def sample_answers(
    model: LanguageModel, tokenizer: Tokenizer, families: Sequence[tuple[str, int]], max_new_tokens: int
) -> list[ShownProblem]:
    """A problem of each (family, level), answered greedily in both modes."""
    problems = [make_problem(family, FIRST_SAMPLE_SEED, level) for family, level in families]
    if not problems:
        return []
    by_mode = [answer_problems(model, tokenizer, problems, mode, max_new_tokens) for mode in MODES]
    return [
        ShownProblem(problem.family, problem.level, problem.question, problem.answer, tuple(map(_shown, answers)))
        for problem, *answers in zip(problems, *by_mode, strict=True)
    ]


def _shown(answer: Answer) -> Shown:
    return Shown(answer.mode, answer.message.thinking or "", answer.message.content, answer.verdict.status)


def save_samples(samples: Sequence[ShownProblem], path: Path) -> None:
    """Write samples as JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    text = json.dumps({"samples": [asdict(sample) for sample in samples]}, indent=1, ensure_ascii=False)
    # A model's text may hold halves of characters.
    partial.write_text(text + "\n", encoding="utf-8", errors="replace")
    partial.replace(path)


def load_samples(path: Path) -> list[ShownProblem]:
    """Samples that `save_samples` wrote; UserError where there are none."""
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["samples"]
        return [
            ShownProblem(**{**record, "answers": tuple(Shown(**answer) for answer in record["answers"])})
            for record in records
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read samples from {path} ({error!r}); delete it and evaluate again") from error
