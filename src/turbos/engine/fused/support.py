"""Whether the fused step can run: what the model is made of, where it lies, and what numba has on this machine."""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from turbos.model.config import KINDS, ModelConfig

KINDS_OF_FUSED = "MAFD"

MAX_BATCH = 64
"""Most rows of a step."""


def refusal(config: ModelConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str | None:
    """Why the fused step cannot run a model, in one line; None where it can."""
    kind = torch.device(device).type
    if kind != "cpu":
        return f"the fused step is for the CPU, the model is on {kind}"
    if dtype != torch.float32:
        return f"the fused step keeps activations in fp32, the model is {str(dtype).removeprefix('torch.')}"
    for letter in config.layers:
        if letter not in KINDS_OF_FUSED:
            return f"the fused step has no {KINDS[letter]} sublayers ({letter})"
    return _numba_refusal()


def _numba_refusal() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed (pip install numba)"
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return "numba's compiler is switched off (NUMBA_DISABLE_JIT)"
    return None


@lru_cache(maxsize=1)
def threads_refusal() -> str | None:
    """Why only one thread can be used; None where OpenMP is there."""
    try:
        # OpenMP's part of numba is compiled code: it is there or it is not.
        from numba.np.ufunc import omppool  # type: ignore[attr-defined]
    except ImportError as error:
        return f"numba has no OpenMP here ({error}): the fused step runs on one thread"
    return None if omppool.openmp_vendor else "numba's OpenMP is of an unknown make: the fused step runs on one thread"
