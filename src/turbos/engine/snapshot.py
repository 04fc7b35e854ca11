"""A session on disk: one safetensors file with the tokens, the state after them, and hashes of everything.

A file is whole or absent, and is taken only where every byte that matters is as it was written, by the same model with
the same weights in the same numbers: a state means nothing to others. Not an exchange format, and no checkpoint.

    origin = origin_of(model)                               # once for each set of weights
    save_session(path, cache, snapshot, ids, origin)
    session = load_session(path, cache, origin)             # later, in another process
    cache.restore(session.snapshot, row); cache.release(session.snapshot)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbos.common.errors import UserError
from turbos.engine.cache import Snapshot, StateCache
from turbos.engine.pages import PAGE
from turbos.engine.pool import StatePool
from turbos.model.config import TRAINING_FIELDS
from turbos.model.lm import LanguageModel

FORMAT = "turbos session 1"


@dataclass(frozen=True)
class Origin:
    """Hashes of what made a state: the model's configuration (training options aside) and its weights."""

    model: str
    weights: str


@dataclass(frozen=True)
class Session:
    """What a file held: tokens, and the state after them, held for the caller."""

    ids: tuple[int, ...]
    snapshot: Snapshot


@dataclass(frozen=True)
class _Label:
    """What a file says about itself; `hashes` are of the tensors, as JSON."""

    format: str
    model: str
    weights: str
    dtype: str
    length: str
    hashes: str

    @property
    def seal(self) -> str:
        """The hash of the label itself."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def origin_of(model: LanguageModel) -> Origin:
    """The origin of the states that a model makes; reads all weights (a second or so for a gigabyte)."""
    config = {name: value for name, value in asdict(model.config).items() if name not in TRAINING_FIELDS}
    weights = sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(f"{name} {_hash(tensor)}\n".encode())
    return Origin(sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(), weights.hexdigest())


def save_session(path: Path, cache: StateCache, snapshot: Snapshot, ids: Sequence[int], origin: Origin) -> None:
    """Write a snapshot and the tokens that it has read (the first `snapshot.length` of `ids`).

    UserError where the disk refuses; what was at `path` before is then still there.
    """
    if len(ids) < snapshot.length:
        raise ValueError(f"a snapshot of {snapshot.length} tokens has more than {len(ids)} ids")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(cache.pool, snapshot, ids)}
    hashes = json.dumps({name: _hash(tensor) for name, tensor in tensors.items()})
    label = _Label(FORMAT, origin.model, origin.weights, str(cache.pool.dtype), str(snapshot.length), hashes)
    temporary = path.with_name(f".{path.name}.saving")
    try:
        save_file(tensors, temporary, metadata={**asdict(label), "seal": label.seal})
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot save the session {path}: {error}; make room or name another place") from error


def _tensors(pool: StatePool, snapshot: Snapshot, ids: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    yield "ids", torch.tensor(list(ids[: snapshot.length]), dtype=torch.int32)
    yield "conv", snapshot.conv_X
    yield "scan", snapshot.scan_X
    if snapshot.hidden_D is not None:
        yield "hidden", snapshot.hidden_D
    pages = list(snapshot.pages)
    for kind, stored in (("keys", pool.keys), ("values", pool.values)):
        for number, x_GSKE in enumerate(stored):
            yield f"{kind}.{number}", x_GSKE[pages].flatten(0, 1)[: snapshot.length]


def _hash(tensor: Tensor) -> str:
    """Of numbers, their kind and their shape."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest = sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_session(path: Path, cache: StateCache, origin: Origin) -> Session:
    """Read a session back into the pool's pages; kept states make room for it where pages are short.

    UserError, naming the file, where it is damaged or of another model, other weights or other numbers, or where its
    pages do not fit; nothing is held then.
    """
    return place_session(path, cache, read_session(path, cache.pool, origin))


def place_session(path: Path, cache: StateCache, tensors: Mapping[str, Tensor]) -> Session:
    """The second half of `load_session`: what `read_session` gave, into the pool's pages."""
    ids = tuple(tensors["ids"].tolist())
    snapshot = Snapshot(
        length=len(ids),
        version=cache.version,
        conv_X=tensors["conv"].to(cache.pool.device),
        scan_X=tensors["scan"].to(cache.pool.device),
        pages=_take_pages(path, cache, len(ids)),
        hidden_D=tensors["hidden"].to(cache.pool.device) if "hidden" in tensors else None,
    )
    for kind, stored in (("keys", cache.pool.keys), ("values", cache.pool.values)):
        for number, x_GSKE in enumerate(stored):
            for page, part_TKE in zip(snapshot.pages, tensors[f"{kind}.{number}"].split(PAGE), strict=True):
                x_GSKE[page, : len(part_TKE)] = part_TKE
    return Session(ids, cache.adopt(snapshot))


def _take_pages(path: Path, cache: StateCache, length: int) -> tuple[int, ...]:
    """Pages for so many tokens, each held once."""
    allocator, wanted = cache.pool.allocator, cache.pool.layout.pages_for(length)
    if allocator.free < wanted:
        cache.evict_pages(wanted - allocator.free)
    if allocator.free < wanted:
        raise UserError(
            f"{path}: the session of {length} tokens needs {wanted} pages, {allocator.free} are free; "
            f"wait for others to end, or give the engine more memory"
        )
    pages = [allocator.alloc() for _ in range(wanted)]
    return tuple(page for page in pages if page is not None)


def read_session(path: Path, pool: StatePool, origin: Origin) -> dict[str, Tensor]:
    """The first half of `load_session`: a file's tensors, all as they were written. The pool is not touched."""
    if not path.is_file():
        raise UserError(f"{path}: no such session file")
    try:
        with safe_open(path, framework="pt") as file:
            label = _label(path, file.metadata() or {})
            _check_origin(path, label, pool, origin)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: corrupted session ({error}); it cannot be used") from error
    _check_tensors(path, label, tensors)
    return tensors


def _label(path: Path, metadata: Mapping[str, str]) -> _Label:
    names = {field.name for field in fields(_Label)}
    if not metadata.get("format", "").startswith(FORMAT.rsplit(" ", 1)[0]) or set(metadata) != {*names, "seal"}:
        raise UserError(f"{path}: not a session file, or its label is corrupted")
    label = _Label(**{name: metadata[name] for name in names})
    if label.seal != metadata["seal"]:
        raise UserError(f"{path}: corrupted session (its label does not have the hash it had); it cannot be used")
    if label.format != FORMAT:
        raise UserError(
            f"{path}: written as {label.format!r}, read here is {FORMAT!r}; save it again with this version"
        )
    return label


def _check_origin(path: Path, label: _Label, pool: StatePool, origin: Origin) -> None:
    if label.model != origin.model:
        raise UserError(f"{path}: the session is of another model (another configuration); load that model")
    if label.dtype != str(pool.dtype):
        raise UserError(f"{path}: the session's states are {label.dtype}, this engine's are {pool.dtype}")
    if label.weights != origin.weights:
        raise UserError(
            f"{path}: the session is of other weights of this model (another checkpoint or precision); load those"
        )


def _check_tensors(path: Path, label: _Label, tensors: Mapping[str, Tensor]) -> None:
    """Names and hashes; what has the hash it was written with has its kind and shape too."""
    hashes = json.loads(label.hashes)
    if set(hashes) != set(tensors):
        raise UserError(f"{path}: corrupted session (tensors are missing or too many); it cannot be used")
    for name, tensor in tensors.items():
        if _hash(tensor) != hashes[name]:
            raise UserError(f"{path}: corrupted session (tensor {name} does not have the hash it had)")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
