"""The safetensors files of a checkpoint: one file, or shards that an index names; each is opened once.

Names, numbers and layouts are taken as the files have them: what a tensor means is the families' business.

    with open_weights(directory) as weights:
        weights.names, weights.read("lm_head.weight")
    write_weights(directory, [("lm_head.weight", tensor)], {}, shard_bytes=5 << 30)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from turbos.common.errors import UserError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5 * 2**30
"""A checkpoint beyond this size is written in shards, as Hugging Face's are."""

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be stored in; narrower ones carry scales that are not read here."""


class Weights:
    """The open files of a checkpoint."""

    def __init__(self, directory: Path, files: Mapping[Path, Any]) -> None:
        """Collect the names of all tensors; UserError where two files hold one."""
        self._path = directory / (INDEX_FILE if len(files) > 1 else WEIGHTS_FILE)
        self._files = files
        self._places: dict[str, Path] = {}
        for path, file in files.items():
            for name in file.keys():  # noqa: SIM118 (an open file is no dictionary)
                if name in self._places:
                    raise UserError(f"{path}: tensor {name} is in {self._places[name].name} too")
                self._places[name] = path

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._places)

    def path_of(self, name: str) -> Path:
        """The file that holds a tensor; for one that is missing the file that should."""
        return self._places.get(name, self._path)

    def dtype(self, name: str) -> torch.dtype:
        """How a tensor is stored; UserError for anything but floating-point numbers that stand for themselves."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            wanted = ", ".join(DTYPES)
            raise UserError(f"{self.path_of(name)}: tensor {name} holds {stored}, not one of {wanted}")
        return DTYPES[stored]

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor."""
        return list(self._slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored; UserError where its numbers are not all finite."""
        path = self.path_of(name)
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error}); copy the checkpoint again") from error
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: tensor {name} holds NaN or infinity")
        return tensor

    def _slice(self, name: str) -> Any:
        return self._files[self.path_of(name)].get_slice(name)


@contextmanager
def open_weights(directory: Path) -> Iterator[Weights]:
    """The weights of a checkpoint directory; UserError for files that are missing, broken or at odds with the index."""
    index = directory / INDEX_FILE
    shards = _read_index(index) if index.is_file() else {}
    paths = sorted({directory / shard for shard in shards.values()}) if shards else [directory / WEIGHTS_FILE]
    with ExitStack() as stack:
        files = {path: stack.enter_context(_opened(path, bool(shards))) for path in paths}
        held = {path: frozenset(file.keys()) for path, file in files.items()}
        for name, shard in shards.items():
            if name not in held[directory / shard]:
                raise UserError(f"{directory / shard}: tensor {name} is missing, though {INDEX_FILE} names it")
        yield Weights(directory, files)


def _read_index(index: Path) -> dict[str, str]:
    """Which shard holds each tensor; shards lie beside the index, whatever folder it names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): Path(shard).name for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: not an index of safetensors files ({error!r})") from error
    if not shards:
        raise UserError(f"{index}: names no tensors")
    return shards


def _opened(path: Path, indexed: bool) -> Any:
    """An open safetensors file; a missing or broken one is the user's to mend."""
    if not path.is_file():
        why = f"though {INDEX_FILE} names it" if indexed else f"a checkpoint directory holds {WEIGHTS_FILE}"
        raise UserError(f"{path}: no such file, {why}")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: broken safetensors file ({error}); copy or save the checkpoint again") from error


def write_weights(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write named tensors as one file, or as shards of at most `shard_bytes` (a larger tensor stands alone) with index.

    Tensors are copied shard by shard, so views of one parameter may be given; no more than a shard is held at a time.
    """
    written: list[tuple[Path, list[str]]] = []
    total = size = 0
    shard: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            written.append(_write_shard(directory, len(written) + 1, shard))
            shard, size = {}, 0
        shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        total, size = total + tensor.nbytes, size + tensor.nbytes
    written.append(_write_shard(directory, len(written) + 1, shard))
    _name_shards(directory, written, total)


def _write_shard(directory: Path, number: int, tensors: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = directory / f"model-{number:05d}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    # safetensors makes files for their owner alone; these are as open as their folder.
    path.chmod(directory.stat().st_mode & 0o666)
    return path, list(tensors)


def _name_shards(directory: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    """Give shards their final names, which count them, and write the index; a single one needs none."""
    if len(written) == 1:
        written[0][0].rename(directory / WEIGHTS_FILE)
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(written, start=1):
        final = path.rename(directory / f"model-{number:05d}-of-{len(written):05d}.safetensors")
        weight_map |= dict.fromkeys(names, final.name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
