"""Sessions on disk: what is loaded continues to the bit, and whatever is not as it was written is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine_cases import LAYERS, poisoned_pool, read, read_plainly, started
from model_cases import VARIANTS, random_tokens, tiny_model
from op_cases import bit_equal
from turbos.common.errors import UserError
from turbos.engine import snapshot as snapshot_module
from turbos.engine.cache import Hit, StateCache
from turbos.engine.snapshot import Origin, load_session, origin_of, save_session
from turbos.model.lm import LanguageModel

LENGTH = 100
NUM_PAGES = 6


def cache_for(model: LanguageModel, num_pages: int = NUM_PAGES) -> StateCache:
    """An empty cache over a pool in the model's numbers."""
    return StateCache(poisoned_pool(model.config, 2, num_pages, model.embed_weight.dtype), 2**30)


def written(path: Path, model: LanguageModel, length: int = LENGTH, hidden: bool = True) -> Tensor:
    """Save a session of some text; returns the text."""
    text, cache = random_tokens(length + 30), cache_for(model)
    row = started(cache.pool)
    hidden_TD = read(model, cache.pool, [row], [text[:length]])
    snapshot = cache.take(row, hidden_TD[-1] if hidden else None)
    save_session(path, cache, snapshot, text.tolist(), origin_of(model))
    return text


def held_pages(cache: StateCache) -> int:
    """Pages that are not free."""
    return cache.pool.allocator.num_pages - cache.pool.allocator.free


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layers", LAYERS)
def test_a_loaded_session_continues_to_the_bit(tmp_path: Path, layers: str, dtype: torch.dtype) -> None:
    model = tiny_model(layers, dtype=dtype, **VARIANTS["rope, qk norm"])
    for length in (1, 64, LENGTH):
        path = tmp_path / f"{length}.session"
        text = written(path, model, length)
        cache = cache_for(model)
        session = load_session(path, cache, origin_of(model))
        assert session.ids == tuple(text[:length].tolist()) and session.snapshot.length == length
        row = started(cache.pool)
        cache.restore(session.snapshot, row)
        got = read(model, cache.pool, [row], [text[length:]])
        want, _ = read_plainly(model, [text[:length], text[length:]])
        assert bit_equal(got, want[length:])
        assert session.snapshot.hidden_D is not None and bit_equal(session.snapshot.hidden_D, want[length - 1])
        cache.release(session.snapshot)
        cache.pool.free_row(row)
        assert held_pages(cache) == 0


def test_a_session_may_go_into_the_cache(tmp_path: Path) -> None:
    model = tiny_model("MFAD")
    text = written(tmp_path / "a", model, hidden=False)
    cache = cache_for(model)
    cache.set_version(7)
    session = load_session(tmp_path / "a", cache, origin_of(model))
    assert session.snapshot.hidden_D is None and session.snapshot.version == 7
    row = started(cache.pool)
    cache.restore(session.snapshot, row)
    cache.release(session.snapshot)
    cache.keep(session.ids, row)
    found = cache.find(text.tolist())
    assert isinstance(found, Hit) and found.length == LENGTH


def test_short_pages(tmp_path: Path) -> None:
    """Kept states make room; where that is not enough the session is refused and nothing is held."""
    model = tiny_model("MFAD")
    written(tmp_path / "a", model)
    cache = cache_for(model, num_pages=3)
    row = started(cache.pool)
    read(model, cache.pool, [row], [random_tokens(128, seed=3)])
    cache.keep(random_tokens(128, seed=3).tolist(), row)
    with pytest.raises(UserError, match="the session of 100 tokens needs 2 pages, 1 are free"):
        load_session(tmp_path / "a", cache, origin_of(model))
    assert held_pages(cache) == 2
    cache.pool.free_row(row)
    assert load_session(tmp_path / "a", cache, origin_of(model)).snapshot.length == LENGTH
    assert cache.metrics.snapshots == 0


def test_every_damaged_byte_is_seen(tmp_path: Path) -> None:
    """A byte changed anywhere, or the file cut: refused by name, or (in the padding of the header) the same."""
    model = tiny_model("SAD", hidden_size=4, mamba1_inner=3, mamba1_state=2, mamba1_dt_rank=1, head_dim=2, ffn_size=2)
    path, damaged = tmp_path / "a", tmp_path / "damaged"
    written(path, model, length=3)
    data, origin, cache = path.read_bytes(), origin_of(model), cache_for(model)
    whole = load_session(path, cache_for(model), origin)
    places = range(0, len(data), 5)
    refused = 0
    for place in places:
        damaged.write_bytes(data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :])
        try:
            session = load_session(damaged, cache, origin)
        except UserError as error:
            assert str(damaged) in str(error)
            refused += 1
        else:
            assert session.ids == whole.ids and bit_equal(session.snapshot.scan_X, whole.snapshot.scan_X)
            cache.release(session.snapshot)
        assert held_pages(cache) == 0
    assert refused >= len(places) - 2
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        damaged.write_bytes(data[:length])
        with pytest.raises(UserError, match="damaged: corrupted session"):
            load_session(damaged, cache_for(model), origin)
    damaged.write_bytes(data + b"x")
    with pytest.raises(UserError, match="damaged: corrupted session"):
        load_session(damaged, cache_for(model), origin)


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    """Write a session file again with changed tensors or label: a valid safetensors file."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
        label = dict(file.metadata())
    change(tensors, label)
    save_file(tensors, path, metadata=label)


def _swap(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    tensors["keys.0"], tensors["values.0"] = tensors["values.0"], tensors["keys.0"]


def _reshape(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    tensors["keys.0"] = tensors["keys.0"].view(LENGTH, 6, 2)


def _change_id(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    tensors["ids"][5] += 1


def _drop(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    del tensors["hidden"]


def _add(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    tensors["more"] = torch.zeros(1)


def _forge(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    hashes = json.loads(label["hashes"])
    tensors["scan"][0] += 1
    label["hashes"] = json.dumps({**hashes, "scan": snapshot_module._hash(tensors["scan"])})


def _unlabel(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    del label["weights"]


def _rename(tensors: dict[str, Tensor], label: dict[str, str]) -> None:
    label["format"] = "pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap, "tensor (keys|values).0 does not have the hash it had"),
        (_reshape, "tensor keys.0 does not have the hash it had"),
        (_change_id, "tensor ids does not have the hash it had"),
        (_drop, "tensors are missing or too many"),
        (_add, "tensors are missing or too many"),
        (_forge, "its label does not have the hash it had"),
        (_unlabel, "not a session file, or its label is corrupted"),
        (_rename, "not a session file, or its label is corrupted"),
    ],
)
def test_a_changed_file_is_refused(tmp_path: Path, change: Callable[..., None], message: str) -> None:
    model = tiny_model("MFAD")
    written(tmp_path / "a", model)
    rewritten(tmp_path / "a", change)
    with pytest.raises(UserError, match=f"{tmp_path / 'a'}: .*{message}"):
        load_session(tmp_path / "a", cache_for(model), origin_of(model))


def test_another_model_other_weights_other_numbers(tmp_path: Path) -> None:
    model = tiny_model("MFAD")
    written(tmp_path / "a", model)
    for other, message in (
        (tiny_model("MFAD", rope_theta=10000.0), "of another model"),
        (tiny_model("MFADD"), "of another model"),
        (tiny_model("MFAD", seed=1), "of other weights of this model"),
        (tiny_model("MFAD", dtype=torch.float64), "states are torch.float32, this engine's are torch.float64"),
    ):
        cache = cache_for(other)
        with pytest.raises(UserError, match=f"a: the session.* {message}"):
            load_session(tmp_path / "a", cache, origin_of(other))
        assert held_pages(cache) == 0
    trained = tiny_model("MFAD", aux_loss=0.5)
    assert origin_of(trained) == origin_of(model), "training options make no difference to a state"
    with pytest.raises(UserError, match="nothing: no such session file"):
        load_session(tmp_path / "nothing", cache_for(model), origin_of(model))
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(UserError, match="weights: not a session file"):
        load_session(tmp_path / "weights", cache_for(model), origin_of(model))


def test_a_later_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("MFAD")
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "FORMAT", "turbos session 2")
        written(tmp_path / "a", model)
    with pytest.raises(UserError, match="written as 'turbos session 2', read here is 'turbos session 1'"):
        load_session(tmp_path / "a", cache_for(model), origin_of(model))


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("MFAD")
    text = written(tmp_path / "a", model)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module.os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(UserError, match=r"cannot save the session .*a: disk full"):
            written(tmp_path / "a", model, length=5)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert load_session(tmp_path / "a", cache_for(model), origin_of(model)).ids == tuple(text[:LENGTH].tolist())
    with pytest.raises(UserError, match="cannot save the session"):
        written(tmp_path / "missing" / "a", model)


def test_too_few_ids_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    model = tiny_model("MFAD")
    cache = cache_for(model)
    row = started(cache.pool)
    read(model, cache.pool, [row], [random_tokens(5)])
    with pytest.raises(ValueError, match="a snapshot of 5 tokens has more than 4 ids"):
        save_session(tmp_path / "a", cache, cache.take(row), [1, 2, 3, 4], Origin("m", "w"))
    with pytest.raises(UserError, match="of other weights"):
        save_session(tmp_path / "a", cache, cache.take(row), [1] * 5, replace(origin_of(model), weights="w"))
        load_session(tmp_path / "a", cache, origin_of(model))
