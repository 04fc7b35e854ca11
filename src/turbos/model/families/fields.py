"""Fields of a config.json that families share: numbers as transformers writes them, layer kinds, rotary positions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from turbos.common.errors import UserError

LAYER_KINDS = {
    **{"mamba": "M", "linear_attention": "M", "attention": "A", "full_attention": "A"},
    **{"moe": "F", "mlp": "D"},
}
"""Layer kinds, spelt as released checkpoints do and as transformers 5 does."""


def number(value: Any) -> float:
    """A number of a config.json; transformers writes infinity as `{"__float__": "Infinity"}`.

    >>> number({"__float__": "Infinity"})
    inf
    """
    return float(value["__float__"] if isinstance(value, dict) else value)


def layer_letters(kinds: Iterable[str], field: str, allowed: str) -> str:
    """Our letters for a list of layer kinds; UserError naming the place of one that the family does not have."""
    known = {kind: letter for kind, letter in LAYER_KINDS.items() if letter in allowed}
    for place, kind in enumerate(kinds):
        if kind not in known:
            raise UserError(f"{field}[{place}]: layer kind {kind!r} is none of {', '.join(known)}")
    return "".join(known[kind] for kind in kinds)


def rope_fields(theta: float) -> dict[str, object]:
    """Default rotary positions, as transformers 5 reads them and as everything else does."""
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _rope(files: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions as transformers reads them: the older `rope_scaling` first, gaps filled from outside."""
    outside = {name: files[name] for name in ("rope_theta", "partial_rotary_factor") if files.get(name) is not None}
    return {**outside, **(files.get("rope_scaling") or files.get("rope_parameters") or {})}


def rope_theta(files: Mapping[str, Any]) -> float:
    """Base of the rotary positions (every spelling; 10000 where the file says nothing).

    >>> rope_theta({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}})
    500000.0
    """
    return float(_rope(files).get("rope_theta", 10000.0))


def rope_obstacles(files: Mapping[str, Any]) -> Iterator[str]:
    """Scaled or partial rotary positions, which are not computed here."""
    rope = _rope(files)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        yield f"rope_type {kind!r}: only default rotary positions are computed here"
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        yield f"partial_rotary_factor {partial}: only whole heads are rotated here"


def must_be(files: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Options whose value would make us compute something else than the family does.

    >>> list(must_be({"mlp_bias": True}, {"mlp_bias": False}))
    ['mlp_bias True: only False is computed here']
    """
    for name, value in wanted.items():
        if name in files and files[name] != value:
            yield f"{name} {files[name]!r}: only {value!r} is computed here"
