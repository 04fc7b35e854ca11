"""The plan: within its bytes whatever is asked, honest about what it cut, refused where nothing fits."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_cases import tiny_config
from turbos.common.errors import UserError
from turbos.engine import memory
from turbos.engine.config import SEGMENT
from turbos.engine.layout import Layout
from turbos.engine.memory import MemoryPlan, available_memory, plan
from turbos.engine.pool import PAGE, StatePool
from turbos.model.config import ModelConfig

GB = 10**9

LARGE = ModelConfig(
    vocab_size=1000, hidden_size=512, layers="(MD)*8AD", mamba_heads=32, mamba_head_dim=64, mamba_state=256
)


def pool_bytes(made: MemoryPlan) -> int:
    """Bytes of all slots and pages."""
    return made.slots * made.state_bytes + made.pages * PAGE * made.kv_bytes_per_token


def test_examples() -> None:
    result = doctest.testmod(memory)
    assert result.attempted > 1 and result.failed == 0


@settings(max_examples=150, deadline=None)
@given(
    layers=st.sampled_from(["(MD)*8AD", "MFMF", "ADAD", "SD", "DF"]),
    total=st.integers(10**6, 10**9),
    context=st.integers(1, 200_000),
    max_running=st.integers(1, 200),
    weights=st.integers(0, 10**8),
)
def test_a_plan_stays_within_its_bytes(layers: str, total: int, context: int, max_running: int, weights: int) -> None:
    config = tiny_config(layers, mamba_heads=16, mamba_head_dim=32, mamba_state=64)
    layout = Layout.of(config)
    try:
        made = plan(config, weights, total, context, max_running)
    except UserError:
        assert total - weights < layout.state_bytes + layout.page_bytes + memory._working_bytes(
            config, max_running, SEGMENT
        )
        return
    spent = pool_bytes(made) + made.cache_bytes + weights + made.working_bytes
    assert spent <= total, "more than the user gave"
    assert 1 <= made.slots <= max_running and 1 <= made.sessions <= made.slots and 1 <= made.context <= context
    assert made.sessions * layout.pages_for(made.context) <= made.pages
    assert any("context" in cut for cut in made.clamped) == (made.context < context)
    assert any("max_running" in cut for cut in made.clamped) == (made.slots < max_running)
    if "A" in layers and made.context < context:
        assert total - spent < layout.page_bytes + layout.state_bytes, "the context was cut though there was room"
        assert made.cache_bytes == 0, "kept states before the session itself"


def test_sessions_that_are_promised_do_fit() -> None:
    config = tiny_config("MDAD")
    made = plan(config, 0, 10**6, 1000, 16)
    pool = StatePool(config, made.slots, made.pages)
    for _ in range(made.sessions):
        row = pool.new_row()
        assert row is not None and pool.ensure(row, made.context)
        row.length = made.context
    tensors = (pool.conv_SX, pool.scan_SX, *pool.keys, *pool.values)
    assert sum(tensor.nbytes for tensor in tensors) == pool_bytes(made)


def test_it_says_what_a_session_costs_and_what_was_cut() -> None:
    assert plan(LARGE, 0, 2 * GB, 32768, 64).describe() == (
        "state 17.0 MB, KV 0.5 MB per 1k tokens: 43 sessions at 32k; kept states 488.5 MB; "
        "clamped: max_running 64 to 43"
    )
    assert plan(LARGE, GB, 2 * GB, 32768, 4).describe() == (
        "state 17.0 MB, KV 0.5 MB per 1k tokens: 4 sessions at 32k; kept states 238.7 MB"
    )
    one = plan(LARGE, 0, 100 * 10**6, 262144, 2)
    assert one.describe().startswith("state 17.0 MB, KV 0.5 MB per 1k tokens: 1 session at ")
    assert one.describe().endswith(f"kept states 0.0 MB; clamped: context 262144 to {one.context}, max_running 2 to 1")
    mamba = ModelConfig(vocab_size=1000, hidden_size=512, layers="(MD)*2", mamba_heads=32, mamba_head_dim=64)
    assert plan(mamba, 0, GB, 999, 9).describe() == "state 1.1 MB: 9 sessions of any length; kept states 239.3 MB"
    twin = ModelConfig(vocab_size=1000, hidden_size=512, layers="(AD)*2")
    assert (
        plan(twin, 0, GB, 999, 9).describe()
        == "KV 1.0 MB per 1k tokens: 9 sessions at 999 tokens; kept states 248.1 MB"
    )
    assert "state" not in plan(twin, 0, GB, 999, 9).describe().split(":")[0]


def test_slots_leave_room_for_a_page() -> None:
    """Keys that cost far more than the scan state: a quarter of the rest for slots would leave no page."""
    config = tiny_config("MAAAA", num_kv_heads=4, head_dim=64)
    layout, working = Layout.of(config), memory._working_bytes(config, 900, SEGMENT)
    assert layout.page_bytes > 300 * layout.state_bytes
    for spare in range(0, 160, 20):
        total = working + layout.page_bytes + (1 + spare) * layout.state_bytes
        made = plan(config, 0, total, 10_000, 900)
        assert made.pages == 1 and made.context == PAGE and made.slots == 1 + spare
        assert pool_bytes(made) + made.cache_bytes + made.working_bytes <= total


def test_long_contexts_are_cheap_for_a_hybrid() -> None:
    """The attention twin's sessions cost what its keys cost."""
    twin = ModelConfig(vocab_size=1000, hidden_size=512, layers="(AD)*12")
    hybrid, attention = (plan(config, 0, 4 * GB, 32768, 1000).sessions for config in (LARGE, twin))
    assert hybrid >= 6 * attention > 0


def test_nothing_fits() -> None:
    with pytest.raises(
        UserError, match=r"one session of 64 tokens takes 17\.1 MB, but beside .* 1000\.0 MB of weights"
    ):
        plan(LARGE, GB, GB + 10**7, 100, 4)
    with pytest.raises(UserError, match=r"there are 0\.0 MB; give the engine more memory"):
        plan(LARGE, 2 * GB, GB, 100, 4)


def test_what_the_system_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < available_memory() < 2**50
    made = plan(tiny_config("MDAD"), 10**15, None, 1000, 4)
    assert made.slots == 4 and made.cache_bytes > 0, "weights that are loaded are not counted twice"
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(memory, "_CGROUPS", ((str(limit), str(used)),))
    limit.write_text("max\n")
    used.write_text("5\n")
    assert available_memory() > 2**20
    limit.write_text(f"{2**21 + 5}\n")
    assert available_memory() == 2**21
    limit.write_text("3\n")
    assert available_memory() == 0
    with pytest.raises(UserError, match="does not tell what is available"):
        memory._meminfo(used)


def test_wider_numbers_cost_more() -> None:
    config = tiny_config("MDAD")
    narrow, wide = (plan(config, 0, GB, 1000, 4, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    assert wide.kv_bytes_per_token == 4 * narrow.kv_bytes_per_token and wide.state_bytes > narrow.state_bytes
