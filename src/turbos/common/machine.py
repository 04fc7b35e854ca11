"""What this machine is and what its matrix products reach: the yardstick beside every speed that is reported.

>>> describe_machine().cores >= 1
True

Not a profiler: `sgemm_flops` is one number, the best fp32 matmul rate of the present thread count.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""

SGEMM_SIZE = 1024
"""Side of the square matrices that are multiplied: 12 MiB in all, far beyond the L2 cache."""


@dataclass(frozen=True)
class Machine:
    """The machine as a result's footnote names it; `accelerator` is empty where there is none."""

    cpu: str
    cores: int
    torch: str
    python: str
    accelerator: str


def describe_machine() -> Machine:
    """CPU model, usable cores, versions and accelerator of this process."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return Machine(cpu_name(), usable_cores(), torch.__version__, platform.python_version(), accelerator)


def cpu_name() -> str:
    """Model name of the CPU, or its architecture where the system does not tell."""
    if platform.system() == "Linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on."""
    if platform.system() == "Linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_threads(count: int | None) -> None:
    """Let torch compute with `count` threads; None leaves torch's choice."""
    if count is not None:
        torch.set_num_threads(count)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor (glibc only; elsewhere nothing happens).

    By default it hands blocks of megabytes back at once, and the next operation pays for fresh, zeroed pages: measured
    here, about 8 % of a prefill. The process's peak stays the same, it just shrinks later.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def sgemm_flops(seconds: float = 0.3) -> float:
    """Best fp32 matmul rate seen within `seconds`, in FLOP/s; measured once per process and thread count."""
    return measured_sgemm(seconds, torch.get_num_threads())


@cache
def measured_sgemm(seconds: float, threads: int) -> float:
    """Rate of the fastest of the repeated products; the fastest one was disturbed least by other processes."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(SGEMM_SIZE, SGEMM_SIZE, generator=generator) for _ in range(2))
    product = left @ right
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right, out=product)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * SGEMM_SIZE**3 / fastest
