"""What the checks ask of a model, whoever computes it: `Implementation`, and `OurModel` for this project's own.

`read` returns rows by place (see `readings`); with `everything` also what every sublayer computed, taken by hooks that
are removed before it returns. The adapter for transformers is in `verify.peer`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from turbos.common.records import IGNORED, Documents
from turbos.model.checkpoint import load_model, save_model, stored_dtypes
from turbos.model.config import ModelConfig
from turbos.model.families import Family
from turbos.model.lm import LanguageModel, Sublayer
from turbos.model.parameters import parameter_spec
from turbos.model.state import HybridState
from turbos.ops.loss import chunked_cross_entropy
from turbos.ops.moe import Routing
from turbos.verify.readings import EMBEDDING, FINAL_NORM, GATES, LOGITS, NORM, RESIDUAL, ROUTER, Place, Rows

S = TypeVar("S")


class Implementation(Protocol[S]):
    """A model that can be read whole, in pieces and in batches; `S` is its running state."""

    name: str
    config: ModelConfig
    packings: tuple[str, ...]
    """Ways of saying where packed documents end, the usual one first; "" where there is only one."""
    continues_unlike: bool
    """Whether one call may continue a batch's documents by unlike lengths."""

    def packed_by(self, packing: str) -> Implementation[S]:
        """The same model, told of borders in another way."""
        ...

    def read(self, pieces: Sequence[Tensor], state: S | None, everything: bool = False) -> Rows:
        """Rows of packed pieces; with a state, piece b continues its sequence b."""
        ...

    def start(self, batch: int, max_len: int) -> S:
        """An empty state."""
        ...

    def fork(self, state: S, copies: int) -> S:
        """Copies of a state of one sequence, side by side; the given state stays as it is."""
        ...

    def restored(self, state: S, directory: Path) -> S:
        """A state written to a file and read back."""
        ...

    def chunk_sized(self, size: int) -> AbstractContextManager[None]:
        """Inside, the scan works in chunks of another size."""
        ...

    def loss(self, pieces: Sequence[Tensor], auxiliary: bool) -> Tensor:
        """Summed next-token loss of packed documents, differentiable; `auxiliary` adds what the routers ask for."""
        ...

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter once, by name."""
        ...

    def misplaced(self) -> list[str]:
        """Parameters that the checkpoint lacks or has no name for, one line each."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and persistent buffers."""
        ...

    def saved_and_loaded(self, directory: Path) -> Implementation[S]:
        """The model written into an empty directory and loaded from there."""
        ...

    def written_back(self, original: Path, directory: Path) -> bool:
        """Write the files of a checkpoint again, each tensor stored as it was; False where that is not promised."""
        ...


class OurModel:
    """`LanguageModel` behind the protocol."""

    name = "turbos"
    packings: tuple[str, ...] = ("",)
    continues_unlike = True

    def __init__(self, model: LanguageModel, family: Family):
        self.model, self.config, self.family = model, model.config, family

    def packed_by(self, packing: str) -> OurModel:
        """The same model: documents are its only way."""
        return self

    def read(self, pieces: Sequence[Tensor], state: HybridState | None, everything: bool = False) -> Rows:
        """Rows of packed pieces; with a state, piece b continues its sequence b."""
        documents = Documents.from_lengths([len(piece) for piece in pieces])
        with torch.no_grad(), tapped(self.model, everything) as rows:
            hidden_TD = self.model(torch.cat(list(pieces)), documents, state).hidden_TD
            rows[FINAL_NORM], rows[LOGITS] = hidden_TD, self.model.logits(hidden_TD)
        return rows

    def start(self, batch: int, max_len: int) -> HybridState:
        """An empty state."""
        weight = self.model.embed_weight
        return HybridState.alloc(self.config, batch, max_len, weight.device, weight.dtype)

    def fork(self, state: HybridState, copies: int) -> HybridState:
        """Copies of a state of one sequence, side by side; the given state stays as it is."""
        return state.fork(copies)

    def restored(self, state: HybridState, directory: Path) -> HybridState:
        """A state written to a file and read back."""
        path = directory / "state.safetensors"
        save_file(_state_tensors(state), path)
        again = self.start(state.batch, state.max_len)
        for name, tensor in load_file(path).items():
            _state_tensors(again)[name].copy_(tensor)
        return again

    @contextmanager
    def chunk_sized(self, size: int) -> Iterator[None]:
        """Inside, the scan works in chunks of another size."""
        mixers = [sublayer.mixer for sublayer in sublayers_of(self.model) if sublayer.kind in "MS"]
        try:
            for mixer in mixers:
                mixer.config = cast(Any, replace(self.config, chunk_size=size))
            yield
        finally:
            for mixer in mixers:
                mixer.config = cast(Any, self.config)

    def loss(self, pieces: Sequence[Tensor], auxiliary: bool) -> Tensor:
        """Summed next-token loss of packed documents, differentiable; `auxiliary` adds what the routers ask for."""
        documents = Documents.from_lengths([len(piece) for piece in pieces])
        targets_T = torch.cat([next_tokens(piece) for piece in pieces])
        output = self.model(torch.cat(list(pieces)), documents)
        weights_T = (targets_T != IGNORED).to(output.hidden_TD.dtype)
        loss = chunked_cross_entropy(
            output.hidden_TD, self.model.head_weight, targets_T, weights_T, self.model.logit_scale
        )
        return loss + output.balance_loss + output.z_loss if auxiliary else loss

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter once, by name."""
        return dict(self.model.named_parameters())

    def misplaced(self) -> list[str]:
        """Parameters that the checkpoint lacks or has no name for, one line each."""
        filed = {name.ours for name in self.family.tensor_names(self.config)}
        here = self.model.state_dict()
        lines = [f"{name} is in no file" for name in here if name not in filed]
        lines += [f"{name} is not in the model" for name in sorted(filed - set(here))]
        return lines + [
            f"{name} has no row in the parameter table" for name in self.parameters() if not _declared(name)
        ]

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and persistent buffers."""
        return self.model.state_dict()

    def saved_and_loaded(self, directory: Path) -> OurModel:
        """The model written into an empty directory and loaded from there."""
        save_model(self.model, directory, family=self.family)
        return OurModel(load_model(directory, self.model.embed_weight.dtype), self.family)

    def written_back(self, original: Path, directory: Path) -> bool:
        """Write the files of a checkpoint again, each tensor stored as it was."""
        save_model(self.model, directory, family=self.family, dtypes=stored_dtypes(original))
        return True


def next_tokens(piece_T: Tensor) -> Tensor:
    """Targets of one document: the following token, `IGNORED` after the last."""
    return torch.cat([piece_T[1:], torch.full_like(piece_T[:1], IGNORED)])


def sublayers_of(model: LanguageModel) -> list[Sublayer]:
    """The sublayers, typed."""
    return [cast(Sublayer, sublayer) for sublayer in model.sublayers]


def _declared(name: str) -> bool:
    try:
        return bool(parameter_spec(name))
    except KeyError:
        return False


def _state_tensors(state: HybridState) -> dict[str, Tensor]:
    tensors = {"lengths": state.lengths_B}
    for number, layer in enumerate(state.layers):
        if layer is not None:
            tensors |= {f"{number}.{part}": tensor for part, tensor in enumerate(layer.tensors)}
    return tensors


@contextmanager
def tapped(model: LanguageModel, everything: bool) -> Iterator[Rows]:
    """Rows that the model's next call fills: router logits and gates, with `everything` every sublayer's tensors."""
    rows: Rows = {}
    with ExitStack() as stack:
        for index, sublayer in enumerate(sublayers_of(model)):
            if sublayer.kind == "F":
                _tap_method(stack, sublayer.mixer, "_route", _routing_rows(rows, index))
            if everything:
                _tap_sublayer(stack, rows, index, sublayer)
        yield rows


def _tap_sublayer(stack: ExitStack, rows: Rows, index: int, sublayer: Sublayer) -> None:
    """Hooks that record a sublayer's tensors in the order of their computation."""
    if index == 0:
        _tap_input(stack, rows, EMBEDDING, sublayer)
    mixer = sublayer.mixer
    _tap_input(stack, rows, Place(index, NORM), mixer)
    if sublayer.kind == "M":
        _tap_output(stack, rows, Place(index, "in_proj"), mixer.in_proj)
        _tap_method(stack, mixer, "_convolve", lambda args, result: rows.update({Place(index, "conv"): result}))
        _tap_method(stack, mixer, "_scan", _scan_rows(rows, index))
        _tap_input(stack, rows, Place(index, "gated norm"), mixer.out_proj)
    elif sublayer.kind == "S":
        _tap_output(stack, rows, Place(index, "in_proj"), mixer.in_proj)
        _tap_method(stack, mixer, "_convolve", lambda args, result: rows.update({Place(index, "conv"): result}))
        _tap_output(stack, rows, Place(index, "x_proj"), mixer.x_proj)
        _tap_method(stack, mixer, "_scan", _scan_rows(rows, index))
        _tap_input(stack, rows, Place(index, "gated"), mixer.out_proj)
    elif sublayer.kind == "A":
        for name in ("q_proj", "k_proj", "v_proj"):
            _tap_output(stack, rows, Place(index, name), getattr(mixer, name))
        _tap_method(stack, mixer, "_attend", _attention_rows(rows, index))
    elif sublayer.kind == "F" and mixer.shared is not None:
        _tap_output(stack, rows, Place(index, "shared expert"), mixer.shared)
        _tap_method(stack, mixer, "_mix", lambda args, result: rows.update({Place(index, "routed experts"): result}))
    elif sublayer.kind == "D":
        _tap_output(stack, rows, Place(index, "w_in"), mixer.w_in)
    _tap_output(stack, rows, Place(index, "output"), mixer)
    _tap_output(stack, rows, Place(index, RESIDUAL), sublayer)


def _tap_input(stack: ExitStack, rows: Rows, place: Place, module: Any) -> None:
    handle = module.register_forward_pre_hook(lambda module, args: rows.update({place: args[0]}))
    stack.callback(handle.remove)


def _tap_output(stack: ExitStack, rows: Rows, place: Place, module: Any) -> None:
    handle = module.register_forward_hook(lambda module, args, result: rows.update({place: result}))
    stack.callback(handle.remove)


def _tap_method(stack: ExitStack, mixer: Any, name: str, record: Callable[[tuple[Tensor, ...], Any], object]) -> None:
    """Record the arguments and result of one mixer's method; the other mixers of the class are left alone."""
    method = getattr(mixer, name)

    def recorded(*args: Any) -> Any:
        result = method(*args)
        record(args, result)
        return result

    setattr(mixer, name, recorded)
    stack.callback(delattr, mixer, name)


def _routing_rows(rows: Rows, index: int) -> Callable[[tuple[Tensor, ...], Routing], None]:
    def record(args: tuple[Tensor, ...], routing: Routing) -> None:
        gates_TE = torch.zeros_like(args[0])
        rows[Place(index, ROUTER)] = args[0]
        rows[Place(index, GATES)] = gates_TE.scatter_(1, routing.experts_TK, routing.gates_TK.to(gates_TE.dtype))

    return record


def _scan_rows(rows: Rows, index: int) -> Callable[[tuple[Tensor, ...], Tensor], None]:
    def record(args: tuple[Tensor, ...], result: Tensor) -> None:
        for name, tensor in zip(("x", "dt", "B", "C"), args, strict=False):
            rows[Place(index, name)] = tensor
        rows[Place(index, "scan")] = result

    return record


def _attention_rows(rows: Rows, index: int) -> Callable[[tuple[Tensor, ...], Tensor], None]:
    def record(args: tuple[Tensor, ...], result: Tensor) -> None:
        for name, tensor in zip(("queries", "keys", "values"), args, strict=False):
            rows[Place(index, name)] = tensor
        rows[Place(index, "attention")] = result

    return record
