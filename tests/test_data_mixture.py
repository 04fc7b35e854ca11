"""Mixtures: the English dial keeps the sums, epochs are stated, what is missing is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbos.common.errors import UserError
from turbos.data.loader import Loader, Part
from turbos.data.mixture import Supply, english_weights, languages_of, require_sources, supplies, supply_line
from turbos.data.shards import ShardReader, write_shard
from turbos.text.tokenizer import Tokenizer
from turbos.train.ingredients import DataConfig

LANGUAGES = {"a": "en", "b": "en", "c": "zh", "d": "code", "e": "en, zh"}


@given(st.lists(st.floats(0.01, 100), min_size=5, max_size=5), st.floats(0.01, 0.99))
def test_the_dial_moves_weight_between_the_languages_only(values: list[float], share: float) -> None:
    weights = dict(zip(LANGUAGES, values, strict=True))
    turned = english_weights(weights, LANGUAGES, share)
    english, chinese = turned["a"] + turned["b"], turned["c"]
    assert english / (english + chinese) == pytest.approx(share)
    assert english + chinese == pytest.approx(weights["a"] + weights["b"] + weights["c"])
    assert (turned["d"], turned["e"]) == (weights["d"], weights["e"])
    assert turned["a"] / turned["b"] == pytest.approx(weights["a"] / weights["b"])


def test_at_its_ends_the_dial_leaves_a_language_out() -> None:
    weights = dict.fromkeys(LANGUAGES, 1.0)
    assert english_weights(weights, LANGUAGES, 1.0) == {"a": 1.5, "b": 1.5, "d": 1.0, "e": 1.0}
    assert english_weights(weights, LANGUAGES, 0.0) == {"c": 3.0, "d": 1.0, "e": 1.0}


@pytest.mark.parametrize(
    ("sources", "share", "languages", "said"),
    [
        ({"english": 1.0, "chinese": 1.0}, 1.2, {}, "english_share lies between 0 and 1"),
        ({"english": 1.0}, 0.5, {}, r"needs a source in Chinese \(zh\)"),
        ({"chinese": 1.0}, 0.5, {}, r"needs a source in English \(en\)"),
        ({"english": 1.0, "mine.txt": 1.0}, 0.5, {}, "language of 'mine.txt': set it in data.languages"),
        ({"english": 1.0, "chinese": 1.0}, 0.5, {"mine": "en"}, "names 'mine', which is no source"),
        ({"english": 1.0, "chinese": 1.0}, None, {"english": "en"}, "says nothing without english_share"),
    ],
)
def test_impossible_dials_are_refused(
    sources: dict[str, float], share: float | None, languages: dict[str, str], said: str
) -> None:
    with pytest.raises(UserError, match=said) as error:
        DataConfig(sources, english_share=share, languages=languages)
    assert "\n" not in str(error.value)


def test_cards_say_the_language_and_what_is_given_counts_first() -> None:
    assert languages_of(["english", "mine.txt"], {"mine.txt": "zh"}) == {"english": "en", "mine.txt": "zh"}
    config = DataConfig({"english": 3.0, "chinese": 1.0, "python": 2.0}, english_share=0.5)
    assert config.weights() == {"english": 2.0, "chinese": 2.0, "python": 2.0}
    given_other = DataConfig({"english": 1.0, "chinese": 1.0, "problems": 1.0}, 0.25, {"problems": "sums"})
    assert given_other.weights() == {"english": 0.5, "chinese": 1.5, "problems": 1.0}
    assert DataConfig({"english": 3.0}).weights() == {"english": 3.0}


def test_a_missing_source_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    require_sources(["english", str(tmp_path), "datasets:nobody/nothing"])
    with pytest.raises(UserError, match=r"no text source 'englich'.*did you mean 'english'") as error:
        require_sources(["english", "englich"])
    assert "\n" not in str(error.value)


def test_the_line_states_epochs_and_names_what_repeats() -> None:
    found = supplies({"a": 3.0, "b": 1.0}, 8_000_000, {"a": 12_000_000, "b": 500_000})
    assert found == [Supply("a", 6e6, 12_000_000), Supply("b", 2e6, 500_000)]
    line = supply_line(found)
    assert line == (
        "8.00 M tokens asked: a 75 % = 0.50 epochs of 12.00 M, b 25 % = 4.00 epochs of 0.50 M; more than once: b"
    )
    assert "more than once" not in supply_line(found[:1])


def test_stated_epochs_are_those_that_the_loader_deals(tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(["abc def ghi jkl"] * 5, vocab_size=304)
    readers = {}
    for name, count in (("a", 600), ("b", 60)):
        write_shard(tmp_path / name, [f"{name}{number:04d} " + "x" * 20 for number in range(count)], tokenizer)
        readers[name] = ShardReader(tmp_path / name, tokenizer)
    weights = {"a": 0.7, "b": 0.3}
    loader = Loader([Part(name, (reader,), weights[name]) for name, reader in readers.items()], 256, seed=0)
    steps, marks = 200, {name: tokenizer.encode(name)[0] for name in readers}
    seen = dict.fromkeys(readers, 0)
    for step in range(steps):
        tokens = loader.batch(step).tokens_T.tolist()
        for name, mark in marks.items():
            seen[name] += tokens.count(mark)
    there = {name: reader.info.tokens for name, reader in readers.items()}
    for supply in supplies(weights, steps * 256, there):
        assert seen[supply.name] / len(readers[supply.name]) == pytest.approx(supply.epochs, rel=0.15)
