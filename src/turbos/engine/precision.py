"""In which precision an engine's weights are held, and which step decodes: decided once, and said.

int8 and bf16 are of the weights only. The model's own weights are replaced by the numbers that the packed ones stand
for, so that prompts (read by the model) and answers (written by the fused step) know the same weights. It is not the
packing itself (`engine.fused.weights`). On an accelerator the model itself becomes bf16, all but what `WIDE` names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from turbos.common.errors import UserError
from turbos.engine.config import EngineConfig
from turbos.engine.fused.support import KINDS_OF_FUSED, refusal, threads_refusal
from turbos.engine.fused.weights import PackedModel, pack
from turbos.engine.graphs import StaticSteps, cuda_capture, uncaptured
from turbos.engine.pool import StatePool
from turbos.engine.runner import Runner
from turbos.model.config import KINDS
from turbos.model.lm import LanguageModel

if TYPE_CHECKING:
    from turbos.engine.fused.step import FusedStep

Held = Literal["fp32", "bf16", "int8", "fp64"]
NAME_OF: dict[torch.dtype, Held] = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}

WIDE = frozenset(
    ("norm_weight", "q_norm_weight", "k_norm_weight", "router_weight", "selection_bias", "A_log", "dt_bias", "D")
)
"""Last names of parameters that stay fp32 in a bf16 model: what decides, and what is summed or decays over a text."""


@dataclass
class Weights:
    """A model whose weights an engine uses: the torch model, and the same numbers packed where the fused step runs.

    `why_torch` says why the fused step does not run; it is empty where it does. `static` says whether static steps take
    its place.
    """

    model: LanguageModel
    precision: Held
    packed: PackedModel | None
    why_torch: str
    threads: int
    segment: int
    static: Literal["", "graphs", "static"] = ""

    @classmethod
    def prepare(cls, model: LanguageModel, config: EngineConfig) -> Weights:
        """Move and round the model as the options say (in place); UserError where they cannot be honoured."""
        model = model.to(_device(model, config)).eval().requires_grad_(False)
        if model.embed_weight.device.type != "cpu" and config.precision != "own":
            model = model.float() if config.precision == "fp32" else to_bf16(model)
        why_torch = _why_torch(model, config)
        if config.path == "fused" and why_torch:
            raise UserError(f"engine: the fused step cannot run: {why_torch}; leave path at 'auto'")
        precision = _precision(model, config, fused=not why_torch)
        threads = 1 if threads_refusal() else config.threads or torch.get_num_threads()
        weights = cls(model, precision, None, why_torch, threads, config.segment, _static(model, config))
        weights.pack()
        return weights

    def pack(self) -> None:
        """Pack the model's present weights, and give the model the numbers that the packed ones stand for."""
        # A model that is bf16 itself has nothing to round.
        rounded = self.precision in ("int8", "bf16") and self.model.embed_weight.dtype == torch.float32
        if self.why_torch and not rounded:
            return
        assert self.precision != "fp64"
        packed = pack(self.model, self.precision)
        packed.round_to_packed(self.model)
        self.packed = None if self.why_torch else packed

    def runner(self, pool: StatePool) -> Runner:
        """What runs the model over a pool, all that is compiled or captured at first ready.

        A pool for static steps has scratch places (`StatePool`, `scratch=bool(weights.static)`).
        """
        if not self.static:
            return Runner(self.model, pool, self.fused_step(pool))
        capture = cuda_capture(pool.device) if self.static == "graphs" else uncaptured
        return Runner(self.model, pool, static=StaticSteps(self.model, pool, capture))

    def fused_step(self, pool: StatePool) -> FusedStep | None:
        """The fused step over a pool, compiled; None where it does not run."""
        if self.packed is None:
            return None
        # Only here, since it imports numba.
        from turbos.engine.fused.step import FusedStep

        return FusedStep(self.packed, pool, self.threads)

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors and of the packed ones (in fp32 those are the same)."""
        own = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        return own + (0 if self.packed is None or self.precision == "fp32" else self.packed.nbytes)

    def describe(self, runner: Runner) -> str:
        """Which step of a runner runs, on what, and why: one line."""
        weights = {"fp32": "fp32", "fp64": "float64", "bf16": "bf16", "int8": "int8 (a scale for each row)"}
        step = f"plain torch step ({self.why_torch})" if self.why_torch else f"fused step, {_threads(self.threads)}"
        if runner.static is not None:
            name = "CUDA graphs" if self.static == "graphs" else "static step, not captured"
            refusal = runner.static.refusal
            step = f"plain torch step (no {name}: {refusal})" if refusal else name
        return f"{step}, weights {weights[self.precision]}; prompts in segments of {self.segment} tokens"


def _threads(count: int) -> str:
    return f"{count} thread{'' if count == 1 else 's'}{f' ({reason})' if (reason := threads_refusal()) else ''}"


def _device(model: LanguageModel, config: EngineConfig) -> torch.device:
    """Where the engine runs; UserError for a device that is none, or not here."""
    if config.device is None:
        return model.embed_weight.device
    try:
        device = torch.empty(0, device=config.device).device
    # What torch raises depends on the kind of device and on how torch was built.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"engine: device {config.device!r} is not here: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UserError("engine: device 'meta' holds no numbers: nothing can run there; use 'cpu' or 'cuda'")
    return device


def to_bf16(model: LanguageModel) -> LanguageModel:
    """A model's weights as bf16, in place, those that `WIDE` names as fp32."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.data = tensor.data.to(torch.float32 if name.rsplit(".", 1)[-1] in WIDE else torch.bfloat16)
    return model


def _static(model: LanguageModel, config: EngineConfig) -> Literal["", "graphs", "static"]:
    """Whether static steps decode, and captured or not; UserError for graphs where there is no CUDA."""
    device = model.embed_weight.device.type
    if config.path == "graphs" and device != "cuda":
        raise UserError(
            f"engine: CUDA graphs need a model on a CUDA device, this one is on {device}; "
            "set device 'cuda', or leave path at 'auto'"
        )
    if config.path in ("graphs", "static"):
        return "graphs" if config.path == "graphs" else "static"
    return "graphs" if config.path == "auto" and device == "cuda" else ""


def _why_torch(model: LanguageModel, config: EngineConfig) -> str:
    if config.path in ("graphs", "static", "torch"):
        return f"path is {config.path!r}"
    return refusal(model.config, model.embed_weight.device, model.embed_weight.dtype) or ""


def _precision(model: LanguageModel, config: EngineConfig, fused: bool) -> Held:
    own = NAME_OF.get(model.embed_weight.dtype)
    if own is None:
        raise UserError(f"engine: weights of {model.embed_weight.dtype} are not supported; load the model as fp32")
    if model.embed_weight.device.type != "cpu":
        if config.precision == "int8":
            raise UserError("engine: int8 weights are for the CPU; use bf16 or fp32 on an accelerator")
        return own
    packs = config.precision in ("bf16", "int8") and config.precision != own
    missing = next((kind for kind in model.config.layers if kind not in KINDS_OF_FUSED), None)
    if packs and missing is not None:
        raise UserError(
            f"engine: precision {config.precision} is for models that the fused step knows, and it has no "
            f"{KINDS[missing]} sublayers ({missing}); choose precision 'fp32' or 'own'"
        )
    if config.precision == "own" or (config.precision == "auto" and not (fused and own == "fp32")):
        return own
    if own != "fp32" and config.precision != own:
        raise UserError(f"engine: precision {config.precision} needs a model loaded as fp32, this one is {own}")
    return "int8" if config.precision == "auto" else config.precision
