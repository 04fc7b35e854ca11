"""How memory is shared out between running states, keys and kept states, before anything is allocated.

It counts bytes from the model's shape alone, cuts wishes down to what fits and says so; it allocates nothing.

>>> config = ModelConfig(vocab_size=512, hidden_size=64, layers="(MD)*7AD")
>>> MemoryPlan.describe(plan(config, weights_bytes=0, memory=64 * 2**20, context=2048, max_running=8))
'state 0.5 MB, KV 0.5 MB per 1k tokens: 8 sessions at 2k; kept states 15.3 MB'
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from turbos.common.errors import UserError
from turbos.engine.config import SEGMENT
from turbos.engine.layout import Layout
from turbos.engine.pages import PAGE
from turbos.model.config import ModelConfig

SHARE = 0.7
"""Part of the available memory that is taken where nobody says how much."""

LEAST_CAP = 2**16
"""Pages that are taken in any case where memory allows: the tables of so many cost a megabyte."""

_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Where Linux tells a container's limit and use, in its two versions."""


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes of the pool and the cache, and what a session costs.

    `context` is the longest sequence that fits (as wished, or less), `sessions` how many of that length run at once;
    `clamped` has a line for each wish that was cut.
    """

    slots: int
    pages: int
    cache_bytes: int
    context: int
    sessions: int
    state_bytes: int
    kv_bytes_per_token: int
    working_bytes: int
    clamped: tuple[str, ...] = ()

    def describe(self) -> str:
        """One line: cost of a session, how many fit, what was cut."""
        costs = [f"state {_megabytes(self.state_bytes)}"] if self.state_bytes else []
        costs += [f"KV {_megabytes(1024 * self.kv_bytes_per_token)} per 1k tokens"] if self.kv_bytes_per_token else []
        where = f"at {_tokens(self.context)}" if self.kv_bytes_per_token else "of any length"
        plural = "" if self.sessions == 1 else "s"
        kept = f"; kept states {_megabytes(self.cache_bytes)}"
        cut = f"; clamped: {', '.join(self.clamped)}" if self.clamped else ""
        return f"{', '.join(costs) or 'no state'}: {self.sessions} session{plural} {where}{kept}{cut}"


def plan(
    config: ModelConfig,
    weights_bytes: int,
    memory: int | None,
    context: int,
    max_running: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    segment: int = SEGMENT,
    static: bool = False,
) -> MemoryPlan:
    """Share out `memory` bytes (weights and working memory included) for sequences of up to `context` tokens.

    Prompts are read `segment` tokens at once. `static` steps keep a slot and a page for rows that nobody needs, and
    their working memory for good.

    `memory` None takes 70 % of what is available at present, where the weights have their place already. A quarter is
    for kept states, as far as one sequence of full length fits beside them; up to a quarter of the rest may go to slots
    for more sequences than fit at full length.
    UserError where not even one sequence of one page fits.
    """
    layout = Layout.of(config, dtype)
    working = _working_bytes(config, max_running, segment)
    if static:
        working += layout.state_bytes + layout.page_bytes + _static_bytes(layout, max_running, context)
    free = int(SHARE * available_memory(device)) - working if memory is None else memory - weights_bytes - working
    least = layout.state_bytes + layout.page_bytes
    if free < least:
        beside = f"{_megabytes(working)} of working memory"
        beside += f" and {_megabytes(weights_bytes)} of weights" if memory is not None else ""
        raise UserError(
            f"memory: one session of {PAGE} tokens takes {_megabytes(least)}, but beside {beside} there are "
            f"{_megabytes(max(free, 0))}; give the engine more memory or take a smaller model"
        )
    cache_bytes = max(0, min(free // 4, free - layout.state_bytes - layout.pages_for(context) * layout.page_bytes))
    slots, pages = _share_out(layout, free - cache_bytes, context, max_running)
    fits = pages * PAGE if layout.attention else context
    shorter = min(context, fits)
    sessions = min(slots, pages // layout.pages_for(shorter)) if layout.attention else slots
    return MemoryPlan(
        slots=slots,
        pages=pages,
        cache_bytes=cache_bytes,
        context=shorter,
        sessions=sessions,
        state_bytes=layout.state_bytes,
        kv_bytes_per_token=layout.kv_bytes_per_token,
        working_bytes=working,
        clamped=tuple(_clamped(context, shorter, max_running, slots)),
    )


def _share_out(layout: Layout, free: int, context: int, max_running: int) -> tuple[int, int]:
    """Slots and pages: as many sequences as fit at full length, a few more that may be shorter, the rest for pages."""
    state, page, whole = layout.state_bytes, layout.page_bytes, layout.pages_for(context)
    slots = max_running
    if state:
        at_full_length = free // (state + whole * page)
        slots = max(1, min(max_running, max(at_full_length, free // 4 // state), (free - page) // state))
    if not page:
        return slots, 0
    # Twice what all sequences need at full length is enough, unless that is little: kept states share their pages only
    # up to the last one.
    return slots, min((free - slots * state) // page, max(2 * slots * whole, LEAST_CAP))


def _clamped(context: int, shorter: int, max_running: int, slots: int) -> list[str]:
    cuts = [f"context {context} to {shorter}"] if shorter < context else []
    return cuts + ([f"max_running {max_running} to {slots}"] if slots < max_running else [])


def _working_bytes(config: ModelConfig, max_running: int, segment: int = SEGMENT) -> int:
    """An estimate of what one call of the model needs at its peak, in fp32: one segment, or a step of all sequences."""
    widest = max(
        config.hidden_size,
        2 * config.mamba_inner + config.conv_channels if "M" in config.layers else 0,
        2 * config.mamba1_inner if "S" in config.layers else 0,
        3 * config.num_heads * config.head_dim if "A" in config.layers else 0,
        2 * config.ffn_size if "D" in config.layers else 0,
        2 * config.top_k * config.expert_size + 2 * config.shared_expert_size if "F" in config.layers else 0,
    )
    return 4 * (segment * (4 * config.hidden_size + 3 * widest) + 3 * max_running * config.vocab_size)


def _static_bytes(layout: Layout, max_running: int, context: int) -> int:
    """An estimate of what static steps hold beside that: states of all rows, gathered and next, one sublayer's keys."""
    keys = layout.pages_for(context) * layout.page_bytes // max(1, len(layout.attention))
    return max_running * (2 * layout.state_bytes + 2 * keys)


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that could be allocated without pushing others out; a container's limit counts.

    UserError where the system does not tell.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    if platform.system() == "Linux":
        return min(_meminfo(Path("/proc/meminfo")), *(_left(Path(limit), Path(used)) for limit, used in _CGROUPS))
    if "SC_PHYS_PAGES" in os.sysconf_names:
        # What others use is not told: half of all is a guess on the safe side.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    raise UserError("memory: this system does not tell how much is available; say how much the engine may take")


def _meminfo(path: Path) -> int:
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"memory: {path} does not tell what is available; say how much the engine may take")


def _left(limit: Path, used: Path) -> int:
    """What a limit leaves; without one, more than any machine has."""
    if not limit.is_file() or not used.is_file():
        return 2**62
    text = limit.read_text(encoding="ascii").strip()
    return 2**62 if text == "max" else max(0, int(text) - int(used.read_text(encoding="ascii")))


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count} tokens"
