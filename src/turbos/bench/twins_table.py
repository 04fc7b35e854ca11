"""The twins' figures as one table: a row for each measurement, a column for each twin, and how the hybrid stands.

The hybrid is `first`, `second` or `last`; `level` where none is ahead of it and one differs from it by no more than
seeds do. Figures are means over seeds; `spread` is the largest difference between two seeds of one twin.

    result = twins_result(results)
    write_result(result, Path.cwd())       # docs/results/twins.json
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from turbos.bench.collect import provenance
from turbos.bench.tables import Cell, Result
from turbos.bench.twins import Results
from turbos.bench.twins_cost import Cost
from turbos.bench.twins_plan import ATTENTION, HYBRID, MAMBA, TWINS
from turbos.bench.twins_run import TwinFigures

COLUMNS = ("measurement", "unit", *(twin.title for twin in TWINS), "spread over seeds", "the hybrid is")
KIB = 1024
PLACES = ("first", "second", "last")


@dataclass(frozen=True)
class Measurement:
    """Values of each twin that has any, one for each seed; `sign` is 1 where more is better, -1 where less is."""

    name: str
    unit: str
    sign: int
    values: Mapping[str, tuple[float, ...]]

    def mean(self, twin: str) -> float:
        """Over the seeds."""
        return statistics.mean(self.values[twin])

    @property
    def spread(self) -> float:
        """The largest difference between two seeds of one twin."""
        return max(map(_range, self.values.values()))

    @property
    def standing(self) -> str:
        """How the hybrid stands; nothing where it or all others were not measured."""
        others = [twin for twin in self.values if twin != HYBRID.name]
        if HYBRID.name not in self.values or not others:
            return ""
        verdicts = [self._against(twin) for twin in others]
        if "behind" not in verdicts and "level" in verdicts:
            return "level"
        return PLACES[verdicts.count("behind")]

    def _against(self, twin: str) -> str:
        """Whether the hybrid is ahead of a twin, behind it, or no farther from it than seeds of either differ."""
        ahead = self.sign * (self.mean(HYBRID.name) - self.mean(twin))
        if abs(ahead) <= max(_range(self.values[twin]), _range(self.values[HYBRID.name])):
            return "level"
        return "ahead" if ahead > 0 else "behind"

    @property
    def row(self) -> tuple[Cell, ...]:
        """The table's row."""
        means = [float(f"{self.mean(twin.name):.5g}") if twin.name in self.values else None for twin in TWINS]
        seeds = max(len(values) for values in self.values.values())
        spread = float(f"{self.spread:.2g}") if seeds > 1 else None
        return (self.name, self.unit, *means, spread, self.standing)


def _range(values: Sequence[float]) -> float:
    return max(values) - min(values)


def measurements(results: Results) -> list[Measurement]:
    """Everything that was measured, abilities first."""
    return [*_abilities(results), *_costs(results)]


def _over_seeds(figures: Sequence[TwinFigures], value: Callable[[TwinFigures], float]) -> dict[str, tuple[float, ...]]:
    return {twin.name: tuple(value(one) for one in figures if one.twin == twin.name) for twin in TWINS}


def _abilities(results: Results) -> Iterator[Measurement]:
    figures, plan = results.figures, results.plan
    unit = "bits/byte"
    yield Measurement("text, mixture", unit, -1, _over_seeds(figures, lambda one: one.abilities.mean_bits))
    for source in figures[0].abilities.bits_per_byte:
        values = _over_seeds(figures, lambda one, source=source: one.abilities.bits_per_byte[source])  # type: ignore[misc]
        yield Measurement(f"text, {source}", unit, -1, values)
    sizes = f"{min(plan.pairs)} to {max(plan.pairs)}"
    recall = _over_seeds(figures, lambda one: 100 * one.abilities.mean_recall)
    yield Measurement(f"recall, mean of {sizes} pairs", "%", 1, recall)
    for pairs in plan.pairs:
        values = _over_seeds(figures, lambda one, pairs=pairs: 100 * one.abilities.recall[pairs])  # type: ignore[misc]
        yield Measurement(f"recall, {pairs} pairs", "%", 1, values)
    for multiple in plan.multiples:
        values = _over_seeds(figures, lambda one, multiple=multiple: 100 * one.abilities.needle[multiple])  # type: ignore[misc]
        yield Measurement(needle_name(multiple, plan.length), "%", 1, values)
        if multiple > 1:
            stretched = [one for one in figures if one.twin == ATTENTION.name]
            alone = {ATTENTION.name: tuple(100 * one.abilities.stretched[multiple] for one in stretched)}
            yield Measurement(f"{needle_name(multiple, plan.length)}, rotary base stretched", "%", 1, alone)


def needle_name(multiple: int, length: int) -> str:
    """What a needle's row is called."""
    return f"needle at {multiple}x ({multiple * length} tokens)"


def _costs(results: Results) -> Iterator[Measurement]:
    kinds: tuple[tuple[str, str, int, Callable[[Cost], float]], ...] = (
        ("training speed", "tok/s", 1, lambda cost: cost.train_tokens_per_second),
        ("training memory", "MiB", -1, lambda cost: cost.train_mib),
        ("decoding, bytes held", "KiB", -1, lambda cost: cost.state_bytes / KIB),
        ("decoding, time", "ms/token", -1, lambda cost: cost.decode_ms),
    )
    for name, unit, sign, value in kinds:
        for length in results.plan.cost_lengths:
            values = {cost.twin: (value(cost),) for cost in results.costs if cost.length == length}
            yield Measurement(f"{name} at {length} tokens", unit, sign, values)


def verdicts(found: Sequence[Measurement]) -> list[tuple[str, float]]:
    """The two questions: per cent of bits per byte above attention-only, points of recall above Mamba-only."""
    bits = next(one for one in found if one.name == "text, mixture")
    recall = next(one for one in found if one.name.startswith("recall, mean"))
    against = 100 * (bits.mean(HYBRID.name) / bits.mean(ATTENTION.name) - 1)
    return [
        ("text, hybrid against attention-only", against),
        ("recall, hybrid above Mamba-only", recall.mean(HYBRID.name) - recall.mean(MAMBA.name)),
    ]


def twins_rows(results: Results) -> tuple[tuple[Cell, ...], ...]:
    """The table's rows, the two questions first."""
    found = measurements(results)
    units = ("% more bits/byte", "points")
    answers = [
        (name, unit, None, None, float(f"{value:.3g}"), None, "")
        for (name, value), unit in zip(verdicts(found), units, strict=True)
    ]
    return (*answers, *(one.row for one in found))


def twins_result(results: Results) -> Result:
    """The table with where it comes from; asks git for the commit."""
    command = f"turbos bench twins{' --quick' if results.is_quick else ''} --seeds {len(results.seeds)}"
    return Result(**provenance("twins", command, results.seeds), columns=COLUMNS, rows=twins_rows(results))
