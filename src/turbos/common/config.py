"""Recipes: YAML files in the package, typed by frozen dataclasses, with dotted overrides.

A recipe `recipes/<kind>/<name>.yaml` is read into the dataclass that its stage declares; jsonargparse checks the types.
Scalars are read by YAML 1.2's rules, so that `3e-3` is a number and `off` is a word. This is not a place for defaults
(they live in the dataclasses) and it composes nothing: a recipe is one file, and what was resolved is saved as one.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Walk:
...     steps: int = 10
...     pace: float = 1.0
>>> print(dump_recipe(resolve_recipe(Walk, {"steps": 20}, ["--pace", "3e-3"])), end="")
steps: 20
pace: 0.003
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from turbos.common.errors import UserError

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Recipe = TypeVar("Recipe", bound=DataclassInstance)
else:
    Recipe = TypeVar("Recipe")

RECIPE_FILE = "recipe.yaml"
"""Name under which the resolved recipe lies in a run's folder."""


@dataclass(frozen=True)
class Key:
    """A dotted key of a recipe and the type of its value; `is_mapping` values take any further keys."""

    name: str
    hint: Any
    is_mapping: bool


@dataclass(frozen=True)
class Override:
    """One `--dotted.key value` of the command line."""

    key: str
    value: str


def load_recipe(cls: type[Recipe], kind: str, name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the given kind, by name (of one in the package) or by path, with overrides applied.

    `overrides` are command-line words: `["--train.steps=50"]` or `["--train.steps", "50"]`. An unknown name, an unknown
    key or a value of the wrong type raises `UserError`, which names the nearest known one or the expected type.
    """
    path = find_recipe(kind, name_or_path)
    return resolve_recipe(cls, read_values(path), overrides, where=str(path))


def read_values(path: Path) -> Mapping[str, object]:
    """The plain nested values of a recipe file; UserError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {path}: {error}") from error
    return parse_yaml(text, str(path))


def resolve_recipe(
    cls: type[Recipe], values: Mapping[str, object], overrides: Sequence[str] = (), where: str = "recipe"
) -> Recipe:
    """A recipe from plain nested values and overrides; `where` names their origin in error messages."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False, default_env=False)
    parser.add_class_arguments(cls, None)
    keys = {key.name: key for key in known_keys(cls)}
    require_known(dotted_names(values, keys), keys, where)
    changes = parse_overrides(overrides)
    require_known([change.key for change in changes], keys, "override")
    plain = plain_values(values)
    for change in changes:
        apply_override(plain, change, keys, parser.get_defaults())
    require_groups(plain, keys, where)
    try:
        # A copy, because jsonargparse converts its argument in place.
        resolved = parser.parse_object(plain_values(plain))
    except ArgumentError as error:
        raise UserError(describe_parse_error(str(error), keys, where)) from error
    keep_strings(resolved, plain, keys)
    require_no_null(resolved, keys, where)
    return cls(**vars(parser.instantiate(resolved)))


def find_recipe(kind: str, name_or_path: str) -> Path:
    """Path of a recipe: the file itself if a path is given, else `recipes/<kind>/<name>.yaml` of the package."""
    if name_or_path.endswith((".yaml", ".yml")) or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise UserError(f"no recipe file {path}; known {kind} recipes: {', '.join(known_recipes(kind)) or 'none'}")
        return path
    known = known_recipes(kind)
    if name_or_path not in known:
        nearest = sorted(known, key=lambda name: -similarity(name, name_or_path))
        listed = f"known: {', '.join(nearest)}, or" if known else "the package has none of this kind;"
        raise UserError(f"no {kind} recipe named {name_or_path!r}; {listed} give a path to a YAML file")
    return recipes_dir() / kind / f"{name_or_path}.yaml"


def known_recipes(kind: str) -> list[str]:
    """Names of the package's recipes of one kind, sorted."""
    return sorted(path.stem for path in (recipes_dir() / kind).glob("*.yaml"))


def recipes_dir() -> Path:
    """Folder of the package's recipes."""
    return Path(str(resources.files("turbos"))) / "recipes"


def dump_recipe(recipe: DataclassInstance) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    import yaml

    # PyYAML writes these few line-break characters bare, and reads them back as spaces.
    plain = plain_values(recipe)
    readable = not re.search("[\x85\u2028\u2029\ufeff]", json.dumps(plain, ensure_ascii=False))
    return yaml.dump(plain, Dumper=core_dumper(), sort_keys=False, allow_unicode=readable, default_flow_style=False)


def save_recipe(recipe: DataclassInstance, run_dir: Path) -> Path:
    """Write `recipe.yaml` in the run's folder (made if missing), whole or not at all; returns its path."""
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / RECIPE_FILE
    partial = path.with_suffix(".partial")
    partial.write_text(dump_recipe(recipe), encoding="utf-8")
    partial.replace(path)
    return path


def recipe_hash(recipe: DataclassInstance) -> str:
    """16 hex digits that change whenever any value of the recipe does, and do not depend on the order of its fields."""
    return values_hash(plain_values(recipe))


def values_hash(values: object) -> str:
    """The same of a recipe's plain values, as they are read from its YAML."""
    canonical = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def plain_values(value: object) -> Any:
    """A record as mappings, lists and scalars, all the way down (tuples become lists)."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return value


def known_keys(cls: type, prefix: str = "") -> Iterator[Key]:
    """Every dotted key of a recipe's dataclass, nested ones included, in the order of the fields."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint, name = hints[field.name], prefix + field.name
        yield Key(name, hint, is_mapping=any(typing.get_origin(part) is dict for part in parts_of(hint)))
        for part in parts_of(hint):
            if dataclasses.is_dataclass(part):
                yield from known_keys(typing.cast(type, part), name + ".")


def parts_of(hint: Any) -> tuple[Any, ...]:
    """Members of a union, or the hint alone."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def dotted_names(values: Mapping[str, object], keys: Mapping[str, Key], prefix: str = "") -> Iterator[str]:
    """Dotted keys that nested values set; below a mapping-valued key the names are the user's own."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        yield name
        known = keys.get(name)
        if known is not None and not known.is_mapping and isinstance(value, Mapping):
            yield from dotted_names(value, keys, name + ".")


def require_known(names: Iterable[str], keys: Mapping[str, Key], where: str) -> None:
    """Raise `UserError` unless the recipe has every key (or it lies inside a mapping-valued one)."""
    for name in names:
        if name not in keys and mapping_parent(name, keys) is None:
            nearest = max(keys, key=lambda key: similarity(key, name), default="")
            raise UserError(f"unknown key {name!r} in {where}; the nearest known key is {nearest!r}")


def mapping_parent(name: str, keys: Mapping[str, Key]) -> Key | None:
    """The mapping-valued key that a dotted name lies in, if any: `data.weights` for `data.weights.gcd`."""
    parents = [name.rsplit(".", count)[0] for count in range(1, name.count(".") + 1)]
    return next((keys[parent] for parent in parents if parent in keys and keys[parent].is_mapping), None)


def require_groups(values: Mapping[str, object], keys: Mapping[str, Key], where: str) -> None:
    """Raise `UserError` where a group of keys was given a single value."""
    for key in keys.values():
        found = value_at(values, key.name)
        is_group = any(dataclasses.is_dataclass(part) for part in parts_of(key.hint))
        if is_group and not isinstance(found, Mapping) and found is not None:
            raise UserError(f"{key.name} in {where} is a group of keys, not the value {found!r}; set {key.name}.KEY")


def keep_strings(resolved: Any, plain: Mapping[str, object], keys: Mapping[str, Key]) -> None:
    """Undo jsonargparse's reading of strings where the type has `str` beside others: "null" is a word, not None."""
    for key in keys.values():
        given = value_at(plain, key.name)
        if isinstance(given, str) and str in parts_of(key.hint) and key.name in resolved:
            resolved[key.name] = given


def require_no_null(resolved: Any, keys: Mapping[str, Key], where: str) -> None:
    """Raise `UserError` where null was given to a key that cannot be null (jsonargparse takes it for 'not set')."""
    for key in keys.values():
        if key.name in resolved and resolved[key.name] is None and type(None) not in parts_of(key.hint):
            raise UserError(f"{key.name} in {where} must be {type_name(key.hint)}, not null")


def apply_override(values: dict[str, Any], change: Override, keys: Mapping[str, Key], defaults: Any) -> None:
    """Set one overridden value in nested plain values; part of a mapping changes that part and keeps the others."""
    parent = mapping_parent(change.key, keys)
    path = change.key.split(".")
    if parent is not None:
        depth = parent.name.count(".") + 1
        path = [*path[:depth], ".".join(path[depth:])]
    level = values
    for depth, part in enumerate(path[:-1], start=1):
        name = ".".join(path[:depth])
        if not isinstance(level.get(part), dict):
            level[part] = dict(defaults.get(name) or {}) if parent is not None and name == parent.name else {}
        level = level[part]
    level[path[-1]] = override_value(change, keys)


def override_value(change: Override, keys: Mapping[str, Key]) -> object:
    """The value of an override as YAML reads it, except that a text for a `str` key stays as it was typed."""
    import yaml

    parts = parts_of(keys[change.key].hint) if change.key in keys else ()
    try:
        value = yaml.load(change.value, Loader=core_loader())
    except yaml.YAMLError:
        value = change.value
    return change.value if str in parts and type(value) not in parts else value


def value_at(values: Mapping[str, object], name: str) -> object:
    """Value at a dotted key of nested values, None where there is none."""
    found: object = values
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def similarity(known: str, given: str) -> float:
    """How alike two dotted keys are, 0 to 1.5: as a whole, and a little for an equal last part."""
    whole = difflib.SequenceMatcher(None, known, given).ratio()
    last = difflib.SequenceMatcher(None, known.rsplit(".", 1)[-1], given.rsplit(".", 1)[-1]).ratio()
    return whole + 0.5 * last


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Overrides from command-line words, in both spellings (`--key=value`, `--key value`)."""
    overrides = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--[A-Za-z_]", word):
            raise UserError(f"cannot read {word!r}; overrides have the form --dotted.key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or re.match(r"--[A-Za-z_]", rest[0]):
                raise UserError(f"override --{key} has no value; write --{key} VALUE")
            value = rest.pop(0)
        overrides.append(Override(key, value))
    return overrides


def describe_parse_error(message: str, keys: Mapping[str, Key], where: str) -> str:
    """One line for a value of the wrong type or a missing one, from jsonargparse's message."""
    found = re.search(r'Parser key "([^"]+)"', message)
    given = re.search(r"Got value: (.*)", message)
    if found and found.group(1) in keys and "Problem with given" not in message:
        shown = f", not {given.group(1)!r}" if given else ""
        return f"{found.group(1)} in {where} must be {type_name(keys[found.group(1)].hint)}{shown}"
    missing = re.search(r"^the following arguments are required: (.*)", message)
    if missing:
        return f"{where} lacks {missing.group(1)}; set it there or with --{missing.group(1).split(',')[0]} VALUE"
    return f"{where}: {' '.join(message.split())}"


def type_name(hint: Any) -> str:
    """A type in a user's words: `int`, `one of 'a', 'b'`, `list of str`, `float or null`."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if len(parts_of(hint)) > 1:
        return " or ".join(type_name(part) for part in parts_of(hint))
    if hint is type(None):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(repr(choice) for choice in arguments)}"
    if origin in (list, tuple):
        return f"a list of {type_name(arguments[0])}"
    if origin is dict:
        return f"a mapping of {type_name(arguments[0])} to {type_name(arguments[1])}"
    return "a group of keys" if dataclasses.is_dataclass(hint) else str(hint.__name__)


def parse_yaml(text: str, where: str) -> Mapping[str, object]:
    """The mapping that a recipe's text holds; an empty text is an empty mapping."""
    import yaml

    try:
        values = yaml.load(text, Loader=core_loader())
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where} is nested too deeply") from error
    if not isinstance(values, Mapping | None):
        raise UserError(f"{where} must hold keys and values, not a {type(values).__name__}")
    return values or {}


SCALARS = (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "float",
        r"^(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        "-+0123456789.",
    ),
)
"""Plain scalars that are no strings (YAML 1.2 core schema): tag, pattern, first characters."""


def add_scalars(processor: Any) -> Any:
    """Make a PyYAML loader or dumper read plain scalars by `SCALARS` alone."""
    processor.yaml_implicit_resolvers = {}
    for tag, pattern, first in SCALARS:
        processor.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first))
    return processor


@cache
def core_loader() -> Any:
    """PyYAML loader of recipes: safe, YAML 1.2 scalars, a repeated key is an error."""
    import yaml

    class CoreLoader(yaml.SafeLoader):
        """Refuses repeated keys, which PyYAML would settle by keeping the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """A mapping whose keys are all different."""
            names = [key.value for key, _ in node.value]
            repeated = [name for name in names if names.count(name) > 1]
            if repeated:
                raise yaml.constructor.ConstructorError(None, None, f"key {repeated[0]!r} is repeated", node.start_mark)
            return super().construct_mapping(node, deep)

    return add_scalars(CoreLoader)


@cache
def core_dumper() -> Any:
    """PyYAML dumper that quotes exactly the strings which `core_loader` would not read as strings."""
    import yaml

    class CoreDumper(yaml.SafeDumper):
        """A class of its own, so that PyYAML's dumper keeps its rules."""

        def ignore_aliases(self, data: Any) -> bool:
            """Write every value out, never an alias to an earlier one."""
            return True

    return add_scalars(CoreDumper)
