"""The check that a state which was kept, forked or restored from a file is as good as one that was just made.

The same texts go to an engine that keeps states and, one by one, to one that keeps nothing. Both read prompts in calls
with the same borders, so that bits are compared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from turbos.common.records import Completion
from turbos.engine.engine import Engine
from turbos.engine.sampling_params import SamplingParams
from turbos.verify.answers import Ask, EnginePath, answered, engine_of, ids_of, one_by_one
from turbos.verify.implementation import OurModel
from turbos.verify.report import Check
from turbos.verify.same import Pair, first_unlike
from turbos.verify.subject import Subject

WHY = "bits are compared: a state that was kept is the state, and both read prompts up to the same borders"


@dataclass(frozen=True)
class Texts:
    """A prompt whose state is kept after `middle` tokens and at its end, what follows it, and another way to go on."""

    prompt: tuple[int, ...]
    middle: int
    rest: tuple[int, ...]
    other: tuple[int, ...]
    params: SamplingParams

    @property
    def longer(self) -> tuple[int, ...]:
        """The prompt and what follows."""
        return self.prompt + self.rest

    @property
    def branch(self) -> tuple[int, ...]:
        """The prompt's beginning and another way to go on."""
        return self.prompt[: self.middle] + self.other


@dataclass(frozen=True)
class Case:
    """An answer that began from a state of `known` tokens, and how many it should have known."""

    name: str
    answer: Completion
    wanted: int


def texts_of(subject: Subject) -> Texts:
    """Two pages of prompt where the model's positions allow it; its middle lies inside the page on which it ends."""
    steps, room = subject.plan.steps, max(subject.config.max_positions, 8)
    length = max(2, min(75, (room - steps) // 2))
    more = max(1, min(21, room - steps - length))
    prompt, rest, other = subject.texts((length, more, more), seed=21)
    params = SamplingParams(max_new_tokens=steps, temperature=1.0, seed=80, stop_ids=frozenset())
    return Texts(ids_of(prompt), max(1, length - 7), ids_of(rest), ids_of(other), params)


def kept_is_fresh(subject: Subject, ours: OurModel, path: EnginePath) -> Check:
    """Answers after states that were kept, branched off, forked and restored, against answers to the same prompts."""
    texts = texts_of(subject)
    # The plain step's bits depend on the height of the batch: there siblings write one after the other.
    siblings = 1 if path.step == "torch" else 4
    engine = engine_of(ours.model, path, siblings)
    cases, other = keeping(engine, texts), engine_of(ours.model, path, 1)
    wanted = fresh(other, texts)
    file = subject.folder(f"kept-{path.label.replace(' ', '-')}") / "state.safetensors"
    cases.append(restored(engine, other, texts, file))
    forks = answered(engine, [Ask(texts.other, replace(texts.params, n=3, cache=False))])
    # The first one reads the prompt for all.
    for place, answer in enumerate(forks):
        cases.append(Case(f"fork {place}", answer, len(texts.other) if place else 0))
    for case in cases:
        if case.answer.cached_tokens != case.wanted:
            where = f"{case.name}: {case.answer.cached_tokens} of {case.wanted} tokens came from a kept state"
            return Check(False, float("nan"), 0.0, where, WHY)
    pairs = [Pair(case.name, case.answer, want) for case, want in zip(cases, wanted, strict=True)]
    note = f"{max(case.wanted for case in cases)} tokens known at most; {len(cases)} answers"
    return first_unlike(pairs, "so", "from a fresh state", WHY, note)


def keeping(engine: Engine, texts: Texts) -> list[Case]:
    """Answers of an engine that keeps states at a prompt's end and in its middle.

    The branch comes first: it writes on the page that the longer state shares.
    """
    answered(engine, [Ask(texts.prompt, replace(texts.params, max_new_tokens=1), marks=(texts.middle,))])
    asked = (
        ("branched off in the middle", texts.branch, texts.middle),
        ("continued", texts.longer, len(texts.prompt)),
        ("the whole prompt again", texts.longer, len(texts.longer)),
    )
    return [Case(name, answered(engine, [Ask(prompt, texts.params)])[0], known) for name, prompt, known in asked]


def restored(engine: Engine, other: Engine, texts: Texts, file: Path) -> Case:
    """An answer of another engine, from a state that the first one wrote to a file."""
    engine.save_session(file, texts.prompt)
    other.load_session(file)
    return Case("restored from a file", answered(other, [Ask(texts.longer, texts.params)])[0], len(texts.prompt))


def fresh(engine: Engine, texts: Texts) -> list[Completion]:
    """What an engine writes that keeps nothing, in the order of the cases."""
    params = replace(texts.params, cache=False)
    borders = (texts.middle, len(texts.prompt))
    branch = Ask(texts.branch, params, marks=borders[:1])
    longer = Ask(texts.longer, params, marks=borders)
    forks = Ask(texts.other, replace(params, n=3))
    first, second, *others = one_by_one(engine, [branch, longer, forks])
    return [first, second, second, second, *others]
