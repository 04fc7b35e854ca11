"""Weights as the fused step reads them: fp32 where they lie, or rounded to bf16 or int8 with a scale for each row.

Only matrices are rounded: projections, experts, the head, and the embedding where it is the head too. Router, norms,
convolutions and everything about dt stay fp32, as do activations and all sums. `round_to_packed` writes the rounded
numbers back into the model, so that a prompt is read with the same numbers as the answer is written with.

>>> packed = pack_matrix(torch.tensor([[0.5, -1.27], [0.0, 0.0]]), "int8")
>>> packed.weights.tolist(), packed.dequantised().tolist()[0][0] == round(50 * 0.01, 2)
([[50, -127], [0, 0]], True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from turbos.common.errors import UserError
from turbos.engine.fused import huge
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel, Sublayer
from turbos.model.mixers import Attention, DenseFFN, Experts, Mamba2

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
_DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Matrix:
    """Weights `[rows, width]` (stacked experts: one after another); int8 has scales `[rows]`."""

    weights: Tensor
    scales: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of weights and scales."""
        return self.weights.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantised(self) -> Tensor:
        """The numbers that it stands for, fp32 `[rows, width]`."""
        wide = self.weights.float()
        return wide if self.scales is None else wide * self.scales[:, None]


@dataclass(frozen=True)
class PackedSublayer:
    """One sublayer: its matrices in the order of use, and the fp32 vectors that its kind has."""

    kind: str
    norm_D: Tensor
    matrices: tuple[Matrix, ...]
    conv_weight_KC: Tensor | None = None
    conv_bias_C: Tensor | None = None
    dt_bias_H: Tensor | None = None
    decay_H: Tensor | None = None
    skip_H: Tensor | None = None
    gate_norm_I: Tensor | None = None
    q_norm_E: Tensor | None = None
    k_norm_E: Tensor | None = None
    router_ED: Tensor | None = None
    selection_bias_E: Tensor | None = None


@dataclass(frozen=True)
class PackedModel:
    """A model's weights for the fused step. In fp32 matrices share the model's memory; small vectors are copies.

    After the model's weights change, pack it again.
    """

    config: ModelConfig
    precision: Precision
    sublayers: tuple[PackedSublayer, ...]
    norm_D: Tensor
    embedding: Matrix
    head: Matrix

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices beside the model's own memory: none in fp32."""
        if self.precision == "fp32":
            return 0
        return self.head.nbytes + sum(matrix.nbytes for layer in self.sublayers for matrix in layer.matrices)

    @torch.no_grad()
    def round_to_packed(self, model: LanguageModel) -> None:
        """Write the numbers that the matrices stand for into the model that was packed."""
        if self.precision == "fp32":
            return
        pairs = [(model.head_weight, self.head)]
        for sublayer, packed in zip(model.sublayers, self.sublayers, strict=True):
            pairs += zip(_weights_of(cast(Sublayer, sublayer)), packed.matrices, strict=True)
        for weight, matrix in pairs:
            weight.copy_(matrix.dequantised().view_as(weight))


class _Arena:
    """One block of memory on large pages, from which tensors of one dtype are cut."""

    def __init__(self, numbers: int, dtype: torch.dtype) -> None:
        self._all = self._rest = huge.empty(numbers, dtype)

    def copy(self, tensor: Tensor) -> Tensor:
        """A tensor's numbers, moved here."""
        copy = self._rest[: tensor.numel()].view(tensor.shape).copy_(tensor)
        self._rest = self._rest[_room(tensor) :]
        return copy

    def settle(self) -> None:
        """Once filled: move what the system, short of large pages at that moment, put on small ones."""
        huge.prefer(self._all, collapse=True)


def _room(tensor: Tensor) -> int:
    """Numbers that a tensor takes of an arena: rows of cache lines, whatever its dtype."""
    return -(-tensor.numel() // 64) * 64


def pack_matrix(weight: Tensor, precision: Precision) -> Matrix:
    """A weight `[..., rows, width]` as a matrix; int8 is scaled so that each row's largest number is 127."""
    flat = weight.detach().reshape(-1, weight.shape[-1]).contiguous()
    if precision == "fp32":
        return Matrix(flat, None)
    if precision == "bf16":
        return Matrix(flat.to(torch.bfloat16), None)
    scales = flat.abs().amax(1) / 127
    # A row of zeros has no scale: any will do.
    divisor = torch.where(scales > 0, scales, torch.ones_like(scales))
    return Matrix((flat / divisor[:, None]).round_().clamp_(-127, 127).to(torch.int8), scales)


@torch.no_grad()
def pack(model: LanguageModel, precision: Precision) -> PackedModel:
    """Pack a model's weights; UserError for an unknown precision or a model that is not fp32 on the CPU."""
    if precision not in PRECISIONS:
        raise UserError(f"fused: precision {precision!r} is none of {', '.join(PRECISIONS)}")
    weight = model.embed_weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise UserError(f"fused: packs fp32 models on the CPU, this one is {weight.dtype} on {weight.device}")
    weights = [model.head_weight, *(w for layer in model.sublayers for w in _weights_of(cast(Sublayer, layer)))]
    if precision == "fp32":
        for shared in weights:
            huge.prefer(shared.detach(), collapse=True)
    arena = _Arena(0 if precision == "fp32" else sum(map(_room, weights)), _DTYPES[precision])

    def packed(weight: Tensor) -> Matrix:
        matrix = pack_matrix(weight, precision)
        return matrix if precision == "fp32" else Matrix(arena.copy(matrix.weights), matrix.scales)

    head = packed(model.head_weight)
    sublayers = tuple(_pack_sublayer(cast(Sublayer, sublayer), packed) for sublayer in model.sublayers)
    arena.settle()
    return PackedModel(
        config=model.config,
        precision=precision,
        sublayers=sublayers,
        norm_D=_copy(model.norm_weight),
        embedding=head if model.config.tied else pack_matrix(model.embed_weight, "fp32"),
        head=head,
    )


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().float().clone(memory_format=torch.contiguous_format)


def _weights_of(sublayer: Sublayer) -> Iterator[Tensor]:
    """The matrices of a sublayer, in the order in which its phases use them."""
    mixer = sublayer.mixer
    if isinstance(mixer, Mamba2):
        yield from (mixer.in_proj.weight, mixer.out_proj.weight)
    elif isinstance(mixer, Attention):
        yield from (mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight, mixer.o_proj.weight)
    elif isinstance(mixer, Experts):
        yield from (mixer.w_in, mixer.w_out)
        if mixer.shared is not None:
            yield from (mixer.shared.w_in.weight, mixer.shared.w_out.weight)
    elif isinstance(mixer, DenseFFN):
        yield from (mixer.w_in.weight, mixer.w_out.weight)
    else:
        raise UserError(f"fused: sublayers of kind {sublayer.kind} are not among M, A, F and D")


def _pack_sublayer(sublayer: Sublayer, packed: Callable[[Tensor], Matrix]) -> PackedSublayer:
    mixer, norm_D = sublayer.mixer, _copy(sublayer.norm_weight)
    matrices = tuple(map(packed, _weights_of(sublayer)))
    if isinstance(mixer, Mamba2):
        return PackedSublayer(
            "M",
            norm_D,
            matrices,
            conv_weight_KC=_copy(mixer.conv_weight.T),
            conv_bias_C=_copy(mixer.conv_bias),
            dt_bias_H=_copy(mixer.dt_bias),
            decay_H=-torch.exp(_copy(mixer.A_log)),
            skip_H=_copy(mixer.D),
            gate_norm_I=_copy(mixer.norm_weight),
        )
    if isinstance(mixer, Attention) and mixer.config.qk_norm:
        norms = (_copy(mixer.q_norm_weight), _copy(mixer.k_norm_weight))
        return PackedSublayer("A", norm_D, matrices, q_norm_E=norms[0], k_norm_E=norms[1])
    if isinstance(mixer, Experts):
        steered = mixer.config.router == "sigmoid" and mixer.config.bias_update != "off"
        bias_E = _copy(mixer.selection_bias) if steered else None
        return PackedSublayer("F", norm_D, matrices, router_ED=_copy(mixer.router_weight), selection_bias_E=bias_E)
    return PackedSublayer(sublayer.kind, norm_D, matrices)
