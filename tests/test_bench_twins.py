"""The twins: what recall asks, that all twins read the same, that figures are kept, and who is said to win."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from turbos.bench import collect, twins, twins_chart, twins_data, twins_plan, twins_run
from turbos.bench.recall import Symbols, needle_sample, recall_sample
from turbos.bench.tables import read_result
from turbos.bench.twins import Results, keep_plan, read_plan, read_results
from turbos.bench.twins_cost import Cost, decode_seconds, twin_cost
from turbos.bench.twins_data import ANSWER_WEIGHT, CYCLE, Haystacks, Mixture, joined, weighted
from turbos.bench.twins_measure import Abilities, accuracy, measure, recall_by_pairs, stretch
from turbos.bench.twins_plan import (
    ATTENTION,
    HYBRID,
    MAMBA,
    QUICK,
    SYMBOLS,
    TOLERANCE,
    TWINS,
    VOCABULARY,
    Plan,
    twin_model,
    twin_named,
)
from turbos.bench.twins_run import TwinFigures, read_figures, run_place, run_twin, write_json
from turbos.bench.twins_table import COLUMNS, Measurement, measurements, twins_rows, verdicts
from turbos.cli import main as cli
from turbos.common.errors import UserError
from turbos.common.records import IGNORED, Documents, Sample
from turbos.data.corpus import SourceShards
from turbos.data.packing import batch_of
from turbos.data.shards import ShardReader
from turbos.model.describe import describe
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState
from turbos.text.tokenizer import Tokenizer

SMALL = Plan(
    steps=12,
    tokens_per_step=128,
    length=64,
    pairs=(2, 4),
    needles=2,
    multiples=(1, 2),
    recall_answers=16,
    haystacks=2,
    held_out_tokens=128,
    cost_lengths=(64, 128),
    text_megabytes=0.2,
)
Data = tuple[Path, dict[str, float], Tokenizer, list[SourceShards]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """A directory with a tokenizer and shards, its one source, and both opened."""
    directory = tmp_path_factory.mktemp("twins")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(200)]
    lines = [" ".join(rng.choice(words, 12)) + "\n" * (1 + number % 2) for number in range(3000)]
    (directory / "words.txt").write_text("".join(lines))
    sources = {str(directory / "words.txt"): 1.0}
    twins_data.prepare(directory, SMALL, sources)
    return directory, sources, *twins_data.open_data(directory, SMALL, sources)


def mixture(data: Data, seed: int = 0) -> Mixture:
    """The training data of a seed."""
    _, sources, tokenizer, shards = data
    return Mixture(SMALL, seed, tokenizer, shards, sources)


# --- what is asked


@pytest.mark.parametrize("pairs", [1, 2, 7, 64])
def test_recall_asks_every_key_once_and_the_answer_is_what_was_said(pairs: int) -> None:
    sample = recall_sample(pairs, SYMBOLS, np.random.default_rng(pairs))
    said, asked = np.array(sample.ids).reshape(2, pairs, 2)
    assert len(sample.ids) == 4 * pairs and len(set(said[:, 0].tolist())) == pairs
    assert dict(said.tolist()) == dict(asked.tolist())
    values_begin = SYMBOLS.first + SYMBOLS.keys
    assert said[:, 0].min() >= SYMBOLS.first and said[:, 0].max() < values_begin
    assert said[:, 1].min() >= values_begin and said[:, 1].max() < SYMBOLS.end
    assert [place for place, weight in enumerate(sample.loss_weights) if weight] == [
        2 * pairs + 2 * number + 1 for number in range(pairs)
    ]


@pytest.mark.parametrize("needles", [1, 4])
def test_needles_leave_the_text_whole_and_are_asked_after_it(needles: int) -> None:
    text = np.arange(40) % 30
    sample = needle_sample(text, needles, SYMBOLS, np.random.default_rng(needles))
    ids = np.array(sample.ids)
    body, questions = ids[: -2 * needles], ids[-2 * needles :].reshape(needles, 2)
    assert body[body < SYMBOLS.first].tolist() == text.tolist() and len(ids) == len(text) + 4 * needles
    planted = body[body >= SYMBOLS.first].reshape(needles, 2)
    assert dict(planted.tolist()) == dict(questions.tolist())
    weights = np.array(sample.loss_weights)
    assert weights[: -2 * needles].tolist() == (body < SYMBOLS.first).astype(float).tolist()
    assert weights[-2 * needles :].tolist() == [0.0, 1.0] * needles


def test_more_pairs_than_keys_are_refused() -> None:
    with pytest.raises(UserError, match="5 pairs want as many different keys, and there are 4"):
        recall_sample(5, Symbols(10, keys=4), np.random.default_rng(0))


# --- the plan


def test_twins_have_equal_active_parameters_and_differ_in_mixers_alone() -> None:
    sizes = [describe(twin_model(twin)).active_params for twin in TWINS]
    assert max(sizes) / min(sizes) - 1 < 0.002 < TOLERANCE
    assert 1e6 < min(sizes) < 3e6
    fields = [dataclasses.asdict(twin_model(twin)) for twin in TWINS]
    differ = {key for key in fields[0] if len({str(field[key]) for field in fields}) > 1}
    assert differ == {"layers", "ffn_size", "rope_theta"}
    assert {"A", "M"} <= set(twin_model(HYBRID).layers)
    assert "M" not in twin_model(ATTENTION).layers and "A" not in twin_model(MAMBA).layers


def test_unequal_twins_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turbos.bench.twins_plan.TWINS", (ATTENTION, dataclasses.replace(MAMBA, ffn_size=320)))
    with pytest.raises(UserError, match="active parameters differ by more than 2%"):
        twins_plan.require_equal_sizes()


@pytest.mark.parametrize(
    ("change", "words"), [({"length": 100}, "no multiple of length"), ({"pairs": (65,)}, "65 pairs .* do not fit")]
)
def test_a_plan_that_does_not_fit_its_length_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        dataclasses.replace(Plan(), **change)  # type: ignore[arg-type]


def test_a_twin_that_is_not_there_is_refused() -> None:
    assert twin_named("mamba") is MAMBA
    with pytest.raises(UserError, match="no twin 'rwkv': there are attention, mamba, hybrid"):
        twin_named("rwkv")


# --- what is read


def test_a_batch_depends_on_seed_and_step_alone(data: Data) -> None:
    forwards, other = mixture(data), mixture(data, seed=1)
    batches = [forwards.batch(step) for step in range(6)]
    backwards = mixture(data)
    for step in reversed(range(6)):
        assert torch.equal(backwards.batch(step).tokens_T, batches[step].tokens_T)
    assert any(not torch.equal(other.batch(step).tokens_T, batches[step].tokens_T) for step in range(6))


def test_a_cycle_deals_text_recall_and_needles(data: Data) -> None:
    whole = mixture(data)
    slots = [whole._slot(number) for number in range(len(CYCLE))]
    for kind, slot in zip(CYCLE, slots, strict=True):
        is_symbol_T = slot.tokens_T >= SYMBOLS.first
        assert slot.documents.total <= SMALL.length
        assert {"T": not is_symbol_T.any(), "R": is_symbol_T.all(), "N": 0 < is_symbol_T.sum() < len(is_symbol_T)}[kind]
    texts = [whole._slot(number).tokens_T for number in range(3 * len(CYCLE)) if CYCLE[number % len(CYCLE)] == "T"]
    assert len({tuple(text_T.tolist()) for text_T in texts}) == len(texts)


def test_recall_grows_over_the_run(data: Data) -> None:
    assert [mixture(data).sizes(step) for step in (0, 3, 4, 11)] == [(2,), (2,), (2, 4), (2, 4)]


def test_answers_weigh_more_and_nothing_else_changes() -> None:
    batch = batch_of([Sample((1, 2, SYMBOLS.first, 3), (0.0, 1.0, 1.0, 0.0))])
    heavy = weighted(batch)
    assert heavy.loss_weights_T.tolist() == [1.0, ANSWER_WEIGHT, 0.0, 0.0]
    assert torch.equal(heavy.targets_T, batch.targets_T)


def test_joined_batches_keep_their_documents() -> None:
    batches = [batch_of([Sample((1, 2, 3), (0.0, 1.0, 1.0))]), batch_of([Sample((4,), (0.0,)), Sample((5, 6), (0, 1))])]
    whole = joined(batches)
    assert whole.documents.lengths == [3, 1, 2]
    assert whole.targets_T.tolist() == [2, 3, IGNORED, IGNORED, 6, IGNORED]


def test_haystacks_are_held_out_stretches_of_one_source(data: Data) -> None:
    _, _, tokenizer, shards = data
    haystacks = Haystacks([shards[0].held_out], tokenizer)
    reader = ShardReader(shards[0].held_out, tokenizer)
    everything = reader.tokens(0, reader.info.tokens)
    windows = np.lib.stride_tricks.sliding_window_view(everything, 50)
    for seed in range(5):
        drawn = haystacks.draw(50, np.random.default_rng(seed))
        assert (windows == drawn).all(1).any()
    with pytest.raises(UserError, match="no source of text holds"):
        haystacks.draw(reader.info.tokens + 1, np.random.default_rng(0))


def test_a_tokenizer_that_reaches_into_the_symbols_is_refused(data: Data, tmp_path: Path) -> None:
    assert data[2].vocab_size <= VOCABULARY
    text = " ".join(f"{number:x}{number**3:x}" for number in range(20_000))
    Tokenizer.train([text, text], 2048).save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="at most 1024 may be"):
        twins_data.open_data(tmp_path, SMALL, data[1])


# --- what is measured


class _Knowing(torch.nn.Module):
    """Answers every question as if it had looked back; stands where a model stands, to test the counting alone."""

    def __init__(self, wrong_from: int = 10**9) -> None:
        super().__init__()
        self.wrong_from, self.asked = wrong_from, 0

    def forward(self, tokens_T: torch.Tensor, documents: Documents) -> object:
        """The token that followed the same token before, in the same document."""
        answers = torch.zeros_like(tokens_T)
        for start, end in zip(documents.borders, documents.borders[1:], strict=False):
            seen: dict[int, int] = {}
            for place in range(start, end):
                token = int(tokens_T[place])
                if token in seen and SYMBOLS.first <= token < SYMBOLS.first + SYMBOLS.keys:
                    answers[place] = seen[token] if self.asked < self.wrong_from else 0
                    self.asked += 1
                if place + 1 < end:
                    seen.setdefault(token, int(tokens_T[place + 1]))
        return type("Output", (), {"hidden_TD": torch.nn.functional.one_hot(answers, SYMBOLS.end).float()})

    def logits(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """As they are."""
        return hidden_TD


def test_accuracy_counts_right_answers(data: Data) -> None:
    samples = [recall_sample(5, SYMBOLS, np.random.default_rng(seed)) for seed in range(4)]
    assert accuracy(_Knowing(), samples) == 1.0  # type: ignore[arg-type]
    assert accuracy(_Knowing(wrong_from=15), samples) == 0.75  # type: ignore[arg-type]
    haystacks = Haystacks([data[3][0].held_out], data[2])
    needles = [twins_data.needle_of(haystacks, SMALL, 128, np.random.default_rng(seed)) for seed in range(3)]
    assert {len(sample.ids) for sample in needles} == {128}
    assert accuracy(_Knowing(), needles) == 1.0  # type: ignore[arg-type]


def test_questions_are_the_same_for_all_and_never_trained_on(data: Data) -> None:
    asked: list[list[tuple[int, ...]]] = []

    def note(samples: list[Sample]) -> float:  # type: ignore[type-arg]
        asked.append([sample.ids for sample in samples])
        return 0.5

    assert recall_by_pairs(note, SMALL) == {2: 0.5, 4: 0.5}  # type: ignore[arg-type]
    recall_by_pairs(note, SMALL)  # type: ignore[arg-type]
    assert asked[:2] == asked[2:] and [len(samples) for samples in asked[:2]] == [8, 4]
    trained = {
        tuple(batch.tokens_T[start:end].tolist())
        for batch in map(mixture(data).batch, range(SMALL.steps))
        for start, end in zip(batch.documents.borders, batch.documents.borders[1:], strict=False)
    }
    assert not trained & set(asked[1])


def test_stretching_the_base_changes_far_positions_and_no_weight() -> None:
    model = LanguageModel(twin_model(ATTENTION)).init_weights(0)
    stretched = stretch(model, 4)
    assert stretched.config.rope_alpha == 4.0
    assert stretched.embed_weight.data_ptr() == model.embed_weight.data_ptr()
    tokens_T, documents = torch.arange(40), Documents.from_lengths([40])
    with torch.no_grad():
        plain, other = (one(tokens_T, documents).hidden_TD for one in (model, stretched))
    assert torch.equal(plain[0], other[0]) and not torch.allclose(plain[30], other[30])


def test_measuring_gives_every_figure(data: Data) -> None:
    for twin in (ATTENTION, HYBRID):
        model = LanguageModel(twin_model(twin)).init_weights(0)
        abilities = measure(model, SMALL, data[2], data[3])
        assert set(abilities.bits_per_byte) == set(data[1]) and 1 < abilities.mean_bits < 30
        assert set(abilities.recall) == {2, 4} and set(abilities.needle) == {1, 2}
        assert set(abilities.stretched) == ({2} if twin is ATTENTION else set())


# --- costs


def test_a_cost_is_measured_and_the_state_is_what_describe_says() -> None:
    for twin in TWINS:
        counts = describe(twin_model(twin), bytes_per_number=4)
        held = HybridState.alloc(twin_model(twin), 1, 128).nbytes
        assert held == counts.kv_bytes_per_token * 128 + counts.state_bytes
    assert decode_seconds(LanguageModel(twin_model(HYBRID)).init_weights(0), 64) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is reset through /proc")
def test_costs_are_printed_as_json() -> None:
    command = [sys.executable, "-m", "turbos.bench.twins_cost", "hybrid", "300"]
    cost = Cost(**json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert (cost.twin, cost.length) == ("hybrid", 300)
    assert cost.train_tokens_per_second > 0 and cost.train_mib > 1 and cost.decode_ms > 0
    assert twin_cost.__doc__


# --- runs


def test_a_run_is_kept_resumed_and_not_repeated(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(twins_run, "open_data", lambda directory, plan: data[2:])
    monkeypatch.setattr(twins_run, "Mixture", lambda *given: Mixture(*given, data[1]))
    whole = run_twin(HYBRID, 3, SMALL, tmp_path / "whole")
    assert whole.tokens > 0.8 * SMALL.tokens and whole.seconds > 0 and whole.seed == 3

    def stopping(run: twins_run.Run, resumed: Path | None) -> Path:
        def batch_at(step: int) -> object:
            if step == 7:
                raise KeyboardInterrupt
            return run.batch_at(step)

        return train(dataclasses.replace(run, batch_at=batch_at), resumed)  # type: ignore[arg-type]

    train = twins_run.train
    monkeypatch.setattr(twins_run, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_twin(HYBRID, 3, SMALL, tmp_path / "stopped")
    assert not run_place(tmp_path / "stopped", HYBRID, 3).with_suffix(".json").exists()
    monkeypatch.setattr(twins_run, "train", train)
    resumed = run_twin(HYBRID, 3, SMALL, tmp_path / "stopped")
    assert resumed.abilities == whole.abilities and resumed.tokens == whole.tokens

    monkeypatch.setattr(twins_run, "trained", lambda *given: pytest.fail("trained again"))
    assert run_twin(HYBRID, 3, SMALL, tmp_path / "stopped") == resumed


def test_broken_figures_are_named(tmp_path: Path) -> None:
    path = tmp_path / "hybrid-seed0.json"
    for content in ("", "[]", '{"twin": "hybrid"}', '{"abilities": {"recall": {"a": 1}}}'):
        path.write_text(content)
        with pytest.raises(UserError, match=r"holds no figures of a twin .* delete it"):
            read_figures(path)


def test_a_directory_belongs_to_one_plan(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no .*plan\.json: run `turbos bench twins"):
        read_plan(tmp_path)
    keep_plan(QUICK, tmp_path)
    keep_plan(QUICK, tmp_path)
    assert read_plan(tmp_path) == QUICK
    with pytest.raises(UserError, match=r"another plan, differing in .*steps.*: name another with --dir"):
        keep_plan(Plan(), tmp_path)


# --- the table


def made_results(directory: Path, seeds: tuple[int, ...] = (0, 1)) -> Results:
    """Figures as a bench would leave them, in which the hybrid wins some and loses some."""
    keep_plan(QUICK, directory)
    for place, twin in enumerate(TWINS):
        for seed in seeds:
            right = (0.4, 0.3, 0.9)[place]
            abilities = Abilities(
                {"english": 2.0 - 0.1 * place + 0.01 * seed, "python": 1.5},
                {pairs: right for pairs in QUICK.pairs},
                {multiple: right / multiple for multiple in QUICK.multiples},
                {multiple: 0.5 for multiple in QUICK.multiples if multiple > 1} if twin is ATTENTION else {},
            )
            figures = TwinFigures(twin.name, seed, 1_107_000 + place, 30_000, 12.0, abilities)
            write_json(run_place(directory, twin, seed).with_suffix(".json"), dataclasses.asdict(figures))
        for length in QUICK.cost_lengths:
            cost = Cost(twin.name, length, (900.0, 1200.0, 1000.0)[place], 80.0 + place, 10_240 * (3 - place), 2.0)
            write_json(directory / "costs" / f"{twin.name}-{length}.json", dataclasses.asdict(cost))
    return read_results(directory, seeds)


def test_the_table_says_where_the_hybrid_stands(tmp_path: Path) -> None:
    results = made_results(tmp_path)
    rows = {str(row[0]): row for row in twins_rows(results)}
    assert all(len(row) == len(COLUMNS) for row in rows.values())
    assert rows["text, english"][2:] == (2.005, 1.905, 1.805, 0.01, "first")
    assert rows["text, python"][-1] == "level"
    assert rows["recall, 64 pairs"][2:5] == (40, 30, 90)
    assert rows["needle at 8x (2048 tokens)"][2:5] == (5, 3.75, 11.25)
    assert rows["needle at 8x (2048 tokens), rotary base stretched"][2:] == (50, None, None, 0, "")
    assert rows["training speed at 2048 tokens"][-2:] == (None, "second")
    assert rows["training memory at 2048 tokens"][-1] == "last"
    assert rows["decoding, bytes held at 512 tokens"][2:5] == (30, 20, 10)


@pytest.mark.parametrize(
    ("sign", "values", "standing"),
    [
        (1, {"attention": (1, 1), "mamba": (2, 2), "hybrid": (3, 3)}, "first"),
        (-1, {"attention": (1, 1), "mamba": (2, 2), "hybrid": (3, 3)}, "last"),
        (1, {"attention": (1, 1), "mamba": (5, 5), "hybrid": (3, 3)}, "second"),
        (1, {"attention": (1, 4), "mamba": (2, 5), "hybrid": (3, 3)}, "level"),
        (1, {"attention": (9, 9), "mamba": (3.1, 3.1), "hybrid": (3, 3.2)}, "second"),
        (1, {"attention": (1, 1)}, ""),
    ],
)
def test_standing_knows_direction_and_noise(sign: int, values: dict[str, tuple[float, ...]], standing: str) -> None:
    assert Measurement("m", "u", sign, values).standing == standing


def test_verdicts_are_the_two_questions(tmp_path: Path) -> None:
    results = made_results(tmp_path)
    (_, text), (_, recall) = verdicts(measurements(results))
    attention, hybrid = (
        np.mean([one.abilities.mean_bits for one in results.figures if one.twin == name])
        for name in ("attention", "hybrid")
    )
    assert text == pytest.approx(100 * (hybrid / attention - 1)) and text < 0
    assert recall == pytest.approx(60.0)


def test_results_become_a_result_file_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = made_results(tmp_path / "bench")
    result = collect.twins_result(tmp_path / "bench")
    assert result.seeds == (0, 1) and result.command == "turbos bench twins --quick --seeds 2"
    assert read_result(collect.write_result(result, tmp_path)) == result
    picture = twins_chart.draw_twins(results, tmp_path / "new" / "twins.png")
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 20_000


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_results(tmp_path)
    (tmp_path / "runs" / "mamba-seed1.json").unlink()
    with pytest.raises(UserError, match=r"lacks .*mamba-seed1\.json: let `turbos bench twins` end first"):
        read_results(tmp_path, (0, 1))
    assert len(read_results(tmp_path, (0,)).figures) == 3
    assert collect.main(["twins", str(tmp_path)]) == 2
    assert "lacks" in capsys.readouterr().err


# --- the command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "train", "--quick"], "--quick says nothing with train"),
        (["bench", "peers", "--seeds", "2"], "--seeds says nothing with peers"),
        (["bench", "twins", "--vllm", "x"], "--vllm says nothing with twins"),
        (["bench", "twins", "--seeds", "0"], "--seeds must be at least 1, not 0"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_finished_bench_prints_its_table_without_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_results(tmp_path, seeds=(0,))
    monkeypatch.setattr(twins, "prepare", lambda *given: None)
    assert cli.main(["bench", "twins", "--quick", "--dir", str(tmp_path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["seeds"] == [0] and tuple(printed["columns"]) == COLUMNS
    assert (tmp_path / "twins.png").is_file()


def test_a_run_that_fails_is_told_and_the_other_is_ended(data: Data, tmp_path: Path) -> None:
    keep_plan(QUICK, tmp_path)
    with pytest.raises(UserError, match=r"(attention|Mamba)-only, seed 0 ended with code 2: .*tokenizer"):
        twins.train_all(QUICK, (0,), tmp_path)
    assert not list((tmp_path / "runs").glob("*.json"))
