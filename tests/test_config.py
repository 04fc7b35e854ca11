"""Recipes: types, overrides, error lines and the round trip through YAML."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbos.common import config
from turbos.common.config import dump_recipe, load_recipe, recipe_hash, resolve_recipe, save_recipe
from turbos.common.errors import UserError


@dataclass(frozen=True)
class Optim:
    """Settings of an optimizer."""

    lr: float = 1e-3
    steps: int = 10
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Shape:
    """Has one required field and refuses one value."""

    layers: str
    bias: Literal["update", "freeze", "off"] = "off"
    theta: float | None = None

    def __post_init__(self) -> None:
        """Refuse a letter, as a model's config does."""
        if "X" in self.layers:
            raise UserError(f"layers {self.layers!r} holds an unknown letter")


@dataclass(frozen=True)
class Recipe:
    """All types that recipes use."""

    shape: Shape
    optim: Optim = Optim()
    name: str = "plain"
    note: str | None = None
    sources: tuple[str, ...] = ("stdlib",)
    families: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=lambda: {"gcd": 1.0, "sum": 2.0})
    teacher: Optim | None = None
    tensorboard: bool = False


BASE = {"shape": {"layers": "MF"}}


def refused(values: dict[str, object], *overrides: str) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(UserError) as error:
        resolve_recipe(Recipe, values, overrides, where="r.yaml")
    assert "\n" not in str(error.value)
    return str(error.value)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_yaml_values_are_typed(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "shape: {layers: MFAF, bias: off, theta: 1e4}\noptim: {lr: 3e-3, steps: 50, betas: [0.9, 0.99]}\nname: '12'\n"
        "note: no\nsources: [a, b]\nweights: {gcd: 1, sum: .5}\nteacher: {lr: 1}\ntensorboard: true\n",
    )
    assert load_recipe(Recipe, "pretrain", path) == Recipe(
        shape=Shape("MFAF", "off", 1e4),
        optim=Optim(3e-3, 50, (0.9, 0.99)),
        name="12",
        note="no",
        sources=("a", "b"),
        weights={"gcd": 1.0, "sum": 0.5},
        teacher=Optim(1.0),
        tensorboard=True,
    )


@pytest.mark.parametrize("joined", [True, False])
def test_overrides_in_both_spellings(joined: bool) -> None:
    pairs = [("--optim.lr", "3e-3"), ("--optim.steps", "7"), ("--shape.bias", "off"), ("--shape.theta", "null")]
    pairs += [("--name", "3e-3"), ("--note", "-1"), ("--sources", "[on, off]"), ("--weights.sum", "5")]
    pairs += [("--tensorboard", "true"), ("--teacher.steps", "2")]
    words = [f"{key}={value}" for key, value in pairs] if joined else [word for pair in pairs for word in pair]
    recipe = resolve_recipe(Recipe, {"shape": {"layers": "MF", "theta": 5.0}}, words)
    assert recipe == Recipe(
        shape=Shape("MF", "off", None),
        optim=Optim(3e-3, 7),
        name="3e-3",
        note="-1",
        sources=("on", "off"),
        weights={"gcd": 1.0, "sum": 5.0},
        teacher=Optim(steps=2),
        tensorboard=True,
    )


def test_override_supplies_a_required_key_and_the_last_one_wins() -> None:
    assert resolve_recipe(Recipe, {}, ["--shape.layers=M", "--shape.layers=MF"]).shape.layers == "MF"


def test_a_mapping_in_the_recipe_replaces_the_default_and_an_override_changes_a_part() -> None:
    values = BASE | {"weights": {"a.b": 1.0}}
    assert resolve_recipe(Recipe, values).weights == {"a.b": 1.0}
    assert resolve_recipe(Recipe, values, ["--weights.a.b", "3", "--weights.c=4"]).weights == {"a.b": 3.0, "c": 4.0}


@pytest.mark.parametrize(
    ("values", "overrides", "parts"),
    [
        (BASE | {"optm": {"lr": 1.0}}, (), ["unknown key 'optm' in r.yaml", "'optim'"]),
        (BASE | {"optim": {"learning": 1.0, "lr": 1.0}}, (), ["unknown key 'optim.learning'", "nearest known key is"]),
        (BASE, ("--optim.step", "3"), ["unknown key 'optim.step' in override", "'optim.steps'"]),
        (BASE, ("--steps=3",), ["unknown key 'steps'", "'optim.steps'"]),
        (BASE, ("--optim.max-steps=3",), ["unknown key 'optim.max-steps'", "'optim.steps'"]),
        (BASE | {"teacher": {"stepz": 3}}, (), ["'teacher.stepz'", "'teacher.steps'"]),
        (BASE | {"optim": {"lr": "fast"}}, (), ["optim.lr in r.yaml must be float, not 'fast'"]),
        (BASE | {"optim": {"steps": "four"}}, (), ["optim.steps in r.yaml must be int, not 'four'"]),
        (BASE | {"optim": {"steps": None}}, (), ["optim.steps in r.yaml must be int, not null"]),
        (BASE, ("--optim.steps", "null"), ["optim.steps", "must be int, not null"]),
        (BASE, ("--optim.steps", "1.5"), ["optim.steps", "must be int, not '1.5'"]),
        (BASE | {"name": 5}, (), ["name in r.yaml must be str, not '5'"]),
        (BASE | {"sources": "a"}, (), ["sources in r.yaml must be a list of str"]),
        (BASE | {"weights": {"a": "x"}}, (), ["weights in r.yaml must be a mapping of str to float"]),
        ({"shape": {"layers": "M", "bias": "on"}}, (), ["shape.bias", "one of 'update', 'freeze', 'off'"]),
        (BASE | {"optim": 3}, (), ["optim in r.yaml is a group of keys", "set optim.KEY"]),
        ({}, (), ["r.yaml lacks shape.layers"]),
        ({"shape": {"layers": "MX"}}, (), ["layers 'MX' holds an unknown letter"]),
        (BASE, ("--optim.steps",), ["--optim.steps has no value"]),
        (BASE, ("--optim.steps", "--name", "x"), ["--optim.steps has no value"]),
        (BASE, ("steps=3",), ["cannot read 'steps=3'"]),
    ],
)
def test_refusals_name_the_key(values: dict[str, object], overrides: tuple[str, ...], parts: list[str]) -> None:
    line = refused(values, *overrides)
    assert all(part in line for part in parts), line


@pytest.mark.parametrize("text", ["a: [", "- 1\n", "name: a\nname: b\n", "name: !!python/name:os.system x\n"])
def test_files_that_are_no_recipe(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"r\.yaml"):
        load_recipe(Recipe, "pretrain", write(tmp_path, text))


def test_unknown_name_lists_the_known_ones_nearest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("demo", "tiny", "nano"):
        (tmp_path / "pretrain").mkdir(exist_ok=True)
        (tmp_path / "pretrain" / f"{name}.yaml").write_text("shape: {layers: M}\n")
    monkeypatch.setattr(config, "recipes_dir", lambda: tmp_path)
    with pytest.raises(UserError, match="no pretrain recipe named 'demmo'; known: demo, "):
        load_recipe(Recipe, "pretrain", "demmo")
    with pytest.raises(UserError, match="the package has none"):
        load_recipe(Recipe, "sft", "demo")
    with pytest.raises(UserError, match=r"no recipe file there/demo\.yaml; known pretrain recipes: demo, nano, tiny"):
        load_recipe(Recipe, "pretrain", "there/demo.yaml")
    assert load_recipe(Recipe, "pretrain", "tiny").shape.layers == "M"


words = st.text(max_size=8) | st.sampled_from(["null", "off", "3e-3", "1_0", "~", "", " a", "- b", "#", "1:30", "[x]"])
numbers = st.floats(allow_nan=False)
optims = st.builds(Optim, lr=numbers, steps=st.integers(), betas=st.tuples(numbers, numbers))
recipes = st.builds(
    Recipe,
    shape=st.builds(
        Shape,
        layers=words.filter(lambda text: "X" not in text),
        bias=st.sampled_from(["update", "freeze", "off"]),
        theta=st.none() | numbers,
    ),
    optim=optims,
    name=words,
    note=st.none() | words,
    sources=st.lists(words, max_size=3).map(tuple),
    families=st.lists(words, max_size=3),
    weights=st.dictionaries(words, numbers, max_size=3),
    teacher=st.none() | optims,
    tensorboard=st.booleans(),
)


@settings(max_examples=40, deadline=None)
@given(recipe=recipes)
def test_round_trip(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = save_recipe(recipe, tmp_path_factory.mktemp("run"))
    again = load_recipe(Recipe, "pretrain", str(path))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_hash_changes_with_any_value() -> None:
    recipe = Recipe(Shape("MF"))
    assert len(recipe_hash(recipe)) == 16
    assert recipe_hash(recipe) != recipe_hash(replace(recipe, optim=Optim(lr=2e-3)))
    assert "lr: 0.001\n" in dump_recipe(recipe)


def test_importing_config_is_light() -> None:
    code = "import sys, turbos.common.config; print([m for m in ('torch', 'jsonargparse', 'yaml') if m in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"
