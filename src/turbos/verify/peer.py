"""transformers' own model behind the `Implementation` protocol, and a fresh copy of a checkpoint for it to read.

Packed documents are given as transformers asks for them: one row with `position_ids` that restart, and in a second way
`seq_idx` too, which only its kernels honour. A batch of unlike prompts is padded on the left with an attention mask.
Which module computes which tensor follows from the family's tensor names; nothing here knows a family's modules.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turbos.common.errors import UserError
from turbos.common.records import IGNORED, Documents
from turbos.model.config import ModelConfig
from turbos.model.families import Family
from turbos.model.families.nemotron import NO_CLAMP
from turbos.verify.implementation import next_tokens
from turbos.verify.readings import EMBEDDING, FINAL_NORM, LOGITS, NORM, RESIDUAL, ROUTER, Place, Rows

# By the end of our name of a parameter: which tensor its module gives out or takes in.
OUTPUTS = {
    "in_proj.weight": "in_proj",
    "mixer.norm_weight": "gated norm",
    "q_proj.weight": "q_proj",
    "k_proj.weight": "k_proj",
    "v_proj.weight": "v_proj",
    "out_proj.weight": "output",
    "o_proj.weight": "output",
    "shared.w_out.weight": "shared expert",
    "mixer.w_out.weight": "output",
}
INPUTS = {"mixer.norm_weight": "scan + D", "o_proj.weight": "attention"}
POSITIONS, SEQUENCES = "position_ids", "position_ids and seq_idx"
UNCLAMPED = {"nemotron_h": {"time_step_min": NO_CLAMP}}
"""Config entries without which a family's own code in transformers computes something else than the family means."""


@dataclass(frozen=True)
class Tap:
    """A tensor that a module takes in (`input`), gives out (`output`) or decides by (`router`: input times weight)."""

    place: Place
    module: nn.Module
    side: str


@dataclass
class PeerState:
    """A cache of transformers, which changes in place, and the attention mask of what it has read."""

    cache: Any
    mask_BS: Tensor


class PeerModel:
    """A model of `transformers.AutoModelForCausalLM` behind the protocol."""

    name = "transformers"

    def __init__(
        self, model: nn.Module, config: ModelConfig, family: Family, misplaced: Sequence[str], packing: str = POSITIONS
    ):
        self.model: Any = model
        self.config, self.family = config, family
        self._misplaced, self._packing = list(misplaced), packing
        self.packings: tuple[str, ...] = (POSITIONS, SEQUENCES) if "M" in config.layers else (POSITIONS,)
        # Its batches are padded, and a scan that goes on would read the padding.
        self.continues_unlike = "M" not in config.layers
        self._taps = list(taps_of(model, config, family))

    def packed_by(self, packing: str) -> PeerModel:
        """The same model, told of borders in another way."""
        return PeerModel(self.model, self.config, self.family, self._misplaced, packing)

    def read(self, pieces: Sequence[Tensor], state: PeerState | None, everything: bool = False) -> Rows:
        """Rows of packed pieces; with a state, piece b continues its sequence b."""
        with torch.no_grad():
            return self._rows(pieces, state, everything)

    def _rows(self, pieces: Sequence[Tensor], state: PeerState | None, everything: bool) -> Rows:
        if state is None:
            inputs, mask = packed_inputs(pieces, self._packing), torch.ones(1, sum(map(len, pieces)), dtype=torch.bool)
        else:
            inputs, mask = padded_inputs(pieces, state)
        taps = [tap for tap in self._taps if everything or tap.side == "router"]
        with recorded(taps, mask) as rows:
            rows[LOGITS] = self.model(**inputs).logits[mask].float()
        return rows

    def start(self, batch: int, max_len: int) -> PeerState:
        """An empty state; transformers grows it as it reads."""
        import transformers

        cache = transformers.DynamicCache(config=self.model.config)
        return PeerState(cache, torch.zeros(batch, 0, dtype=torch.int64))

    def fork(self, state: PeerState, copies: int) -> PeerState:
        """Copies of a state of one sequence, side by side; the given state stays as it is."""
        cache = copy.deepcopy(state.cache)
        cache.reorder_cache(torch.zeros(copies, dtype=torch.int64))
        return PeerState(cache, state.mask_BS.expand(copies, -1).clone())

    def restored(self, state: PeerState, directory: Path) -> PeerState:
        """A state written to a file and read back."""
        path = directory / "state.pt"
        torch.save((state.cache, state.mask_BS), path)
        return PeerState(*torch.load(path, weights_only=False))

    @contextmanager
    def chunk_sized(self, size: int) -> Iterator[None]:
        """Inside, the scan works in chunks of another size."""
        modules: list[Any] = [module for module in self.model.modules() if "chunk_size" in vars(module)]
        before = [module.chunk_size for module in modules]
        try:
            for module in modules:
                module.chunk_size = size
            yield
        finally:
            for module, old in zip(modules, before, strict=True):
                module.chunk_size = old

    def loss(self, pieces: Sequence[Tensor], auxiliary: bool) -> Tensor:
        """Summed next-token loss of packed documents, differentiable; its own auxiliary losses are left out."""
        targets_T = torch.cat([next_tokens(piece) for piece in pieces])
        logits_TV = self.model(**packed_inputs(pieces, self._packing)).logits[0]
        return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")

    def parameters(self) -> Mapping[str, nn.Parameter]:
        """Every parameter once, by name."""
        return dict(self.model.named_parameters())

    def misplaced(self) -> list[str]:
        """Parameters that the checkpoint lacks or has no name for, one line each."""
        return self._misplaced

    def tensors(self) -> Mapping[str, Tensor]:
        """Parameters and persistent buffers."""
        return self.model.state_dict()

    def saved_and_loaded(self, directory: Path) -> PeerModel:
        """The model written into an empty directory and loaded from there."""
        self.model.save_pretrained(directory)
        return load_peer(directory, self.config, self.family)

    def written_back(self, original: Path, directory: Path) -> bool:
        """transformers keeps a checkpoint's values, not its files."""
        return False


def packed_inputs(pieces: Sequence[Tensor], packing: str) -> dict[str, Any]:
    """Arguments of one call that reads documents packed in one row; one document needs no borders."""
    tokens_T = torch.cat(list(pieces))
    if len(pieces) == 1:
        return {"input_ids": tokens_T[None], "use_cache": False}
    documents = Documents.from_lengths([len(piece) for piece in pieces])
    borders = {"position_ids": documents.positions_T[None]}
    if packing == SEQUENCES:
        borders["seq_idx"] = documents.index_T.to(torch.int32)[None]
    return {"input_ids": tokens_T[None], "use_cache": False, **borders}


def padded_inputs(pieces: Sequence[Tensor], state: PeerState) -> tuple[dict[str, Any], Tensor]:
    """Arguments of one call that continues a batch, and which of its places hold tokens; the state's mask grows."""
    longest = max(len(piece) for piece in pieces)
    mask_BL = torch.stack([torch.arange(longest) >= longest - len(piece) for piece in pieces])
    ids_BL = torch.zeros(mask_BL.shape, dtype=torch.int64).masked_scatter_(mask_BL, torch.cat(list(pieces)))
    state.mask_BS = torch.cat([state.mask_BS, mask_BL.long()], 1)
    inputs: dict[str, Any] = {"input_ids": ids_BL, "past_key_values": state.cache, "use_cache": True}
    if not state.mask_BS.all():
        positions_BS = (state.mask_BS.cumsum(1) - 1).clamp(min=0)
        inputs |= {"attention_mask": state.mask_BS, "position_ids": positions_BS[:, -longest:]}
    return inputs, mask_BL


def taps_of(model: nn.Module, config: ModelConfig, family: Family) -> Iterator[Tap]:
    """The modules whose tensors have a name here, found through the family's tensor names."""
    modules = {name.partition(".")[2] or name: module for name, module in model.named_modules()}
    layers: dict[str, int] = {}
    for name in family.tensor_names(config):
        path = name.file.removesuffix(".weight").partition(".")[2]
        found = re.fullmatch(r"sublayers\.(\d+)\.(.+)", name.ours)
        if name.ours == "norm_weight" and path in modules:
            yield Tap(FINAL_NORM, modules[path], "output")
        if found is None:
            continue
        index, ours = int(found[1]), found[2]
        if ours == "norm_weight" and path in modules:
            layers[re.sub(r"(layers\.\d+)\..*", r"\1", path)] = index
            yield Tap(Place(index, NORM), modules[path], "output")
        if ours == "mixer.router_weight":
            # transformers may hold a released file's `router.layer.weight` as `router.weight`.
            owner = path if path in modules else path.rpartition(".")[0]
            if owner in modules:
                yield Tap(Place(index, ROUTER), modules[owner], "router")
        for side, table in (("output", OUTPUTS), ("input", INPUTS)):
            for end, tensor in table.items():
                if f".{ours}".endswith(f".{end}") and path in modules:
                    yield Tap(Place(index, tensor), modules[path], side)
    for number, (path, index) in enumerate(layers.items()):
        if number == 0:
            yield Tap(EMBEDDING, modules[path], "input")
        yield Tap(Place(index, RESIDUAL), modules[path], "output")


@contextmanager
def recorded(taps: Sequence[Tap], mask_BL: Tensor) -> Iterator[Rows]:
    """Rows that the next call fills: the tapped tensors at the places that hold tokens."""
    rows: Rows = {}
    with ExitStack() as stack:
        for tap in taps:
            handle: Any
            if tap.side == "output":
                handle = tap.module.register_forward_hook(_output_hook(rows, tap, mask_BL))
            else:
                handle = tap.module.register_forward_pre_hook(_input_hook(rows, tap, mask_BL), with_kwargs=True)
            stack.callback(handle.remove)
        yield rows


def _kept(tensor: Tensor, mask_BL: Tensor) -> Tensor:
    """Rows with tokens of `[B, L, X]` or `[B * L, X]`."""
    return tensor.detach().reshape(mask_BL.numel(), -1)[mask_BL.flatten()]


def _output_hook(rows: Rows, tap: Tap, mask_BL: Tensor):  # type: ignore[no-untyped-def]
    def record(module: nn.Module, args: Any, result: Any) -> None:
        rows[tap.place] = _kept(result[0] if isinstance(result, tuple) else result, mask_BL)

    return record


def _input_hook(rows: Rows, tap: Tap, mask_BL: Tensor):  # type: ignore[no-untyped-def]
    def record(module: Any, args: Any, kwargs: Any) -> None:
        tensor = _kept(args[0] if args else kwargs["hidden_states"], mask_BL)
        rows[tap.place] = F.linear(tensor.float(), module.weight.float()) if tap.side == "router" else tensor

    return record


def transformers_version() -> str | None:
    """The installed version, None without transformers."""
    try:
        import transformers
    except ImportError:
        return None
    return str(transformers.__version__)


def load_peer(directory: Path, config: ModelConfig, family: Family) -> PeerModel:
    """transformers' own model of a checkpoint directory, fp32, without remote code."""
    if transformers_version() is None:
        raise UserError("verify: transformers is not installed; install it with pip install 'turbos[export]'")
    import transformers

    # It reports missing CUDA kernels and loading bars on every start; both are expected here.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    words = {
        "missing_keys": "is in no file",
        "unexpected_keys": "is not in the model",
        "mismatched_keys": "has two shapes",
    }
    lines = [f"{name} {words[kind]}" for kind in words for name in sorted(map(str, info[kind]))]
    return PeerModel(model.eval(), config, family, lines)


def unclamped_copy(directory: Path, copied: Path) -> Path:
    """The checkpoint with `UNCLAMPED` entries in its config, as links in `copied`; itself where none apply."""
    files = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    changes = UNCLAMPED.get(files.get("model_type"))
    if changes is None:
        return directory
    for path in directory.iterdir():
        if path.is_file() and path.name != "config.json":
            (copied / path.name).symlink_to(path.resolve())
    (copied / "config.json").write_text(json.dumps({**files, **changes}), encoding="utf-8")
    return copied
