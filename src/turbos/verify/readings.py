"""What a model computed for some documents: rows of tensors, by the place in the model where they arise.

A `Place` is a sublayer and a tensor in it; rows of several calls are put together by document, so that two ways of
reading the same text can be laid side by side. No model is run here.

>>> reading = Reading(2)
>>> reading.add([1, 0], [1, 2], {LOGITS: torch.tensor([[7.0], [1.0], [2.0]])})
>>> reading.add([1], [1], {LOGITS: torch.tensor([[8.0]])})
>>> reading.rows(LOGITS).flatten().tolist(), reading.lengths
([1.0, 2.0, 7.0, 8.0], [2, 2])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from turbos.model.config import KINDS, ModelConfig
from turbos.model.families import Family


class Place(NamedTuple):
    """A tensor of a sublayer; -1 is what comes before the first, `len(layers)` what comes after the last."""

    sublayer: int
    tensor: str


EMBEDDING = Place(-1, "embedding")
LOGITS = Place(1 << 30, "logits")
FINAL_NORM = Place((1 << 30) - 1, "final norm")
ROUTER, GATES, RESIDUAL, NORM = "router logits", "gates", "residual", "norm"

Rows = dict[Place, Tensor]
"""Tensors of one call, each `[T, ...]` with the packed tokens first."""


class Reading:
    """Rows of a number of documents, gathered from one call or many."""

    def __init__(self, documents: int):
        self._pieces: dict[Place, list[list[Tensor]]] = {}
        self._documents = documents

    def add(self, which: Sequence[int], lengths: Sequence[int], rows: Mapping[Place, Tensor]) -> None:
        """Append a call's rows: its packed pieces have these lengths and belong to these documents."""
        for place, tensor in rows.items():
            kept = self._pieces.setdefault(place, [[] for _ in range(self._documents)])
            for document, piece in zip(which, tensor.detach().flatten(1).split(list(lengths)), strict=True):
                kept[document].append(piece)

    @property
    def places(self) -> list[Place]:
        """In the order in which the model computes them."""
        return sorted(self._pieces, key=lambda place: place.sublayer)

    @property
    def lengths(self) -> list[int]:
        """Rows of each document."""
        return [sum(len(piece) for piece in pieces) for pieces in self._pieces[LOGITS]]

    @property
    def starts(self) -> list[int]:
        """First row of each document, and the end of the last."""
        return [sum(self.lengths[:number]) for number in range(self._documents + 1)]

    def rows(self, place: Place) -> Tensor:
        """`[T, X]`, document after document."""
        return torch.cat([piece for pieces in self._pieces[place] for piece in pieces])

    def where(self, row: int) -> str:
        """Name of a row: its document and token."""
        document = max(number for number, start in enumerate(self.starts[:-1]) if start <= row)
        return f"document {document}, token {row - self.starts[document]}"


def row_ranges(starts: Sequence[int]) -> Iterator[range]:
    """Rows of each document."""
    return (range(start, end) for start, end in pairwise(starts))


@dataclass(frozen=True)
class Names:
    """Places in words, with the names of a family's files.

    >>> config = ModelConfig(vocab_size=8, hidden_size=8, layers="MFAF", num_heads=2, num_kv_heads=1, head_dim=4)
    >>> names = Names.of(replace(config, mamba_heads=2, mamba_head_dim=8), family_by_type("granitemoehybrid", ""))
    >>> names.of_place(Place(3, "gates"))
    'sublayers.3 (mixture of experts, model.layers.1): gates'
    """

    kinds: tuple[str, ...]
    layers: Mapping[int, str]

    @classmethod
    def of(cls, config: ModelConfig, family: Family) -> Names:
        """The names of a model's sublayers: a layer is called as its norm is, without the norm's own name."""
        layers = {}
        for name in family.tensor_names(config):
            parts = name.ours.split(".")
            if len(parts) == 3 and parts[0] == "sublayers" and parts[2] == "norm_weight" and name.file != name.ours:
                layers[int(parts[1])] = name.file.removesuffix(".weight").rpartition(".")[0]
        return cls(tuple(KINDS[letter] for letter in config.layers), layers)

    def of_place(self, place: Place) -> str:
        """A place's sublayer, its kind, its layer in the files, and the tensor."""
        if not 0 <= place.sublayer < len(self.kinds):
            return place.tensor
        file = f", {self.layers[place.sublayer]}" if place.sublayer in self.layers else ""
        return f"sublayers.{place.sublayer} ({self.kinds[place.sublayer]}{file}): {place.tensor}"
