"""The carried state: reading in pieces, step by step, in a batch or alone gives what reading the whole gives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model_cases import TOLERANCE, VARIANTS, logits_of, random_tokens, tiny_config, tiny_model
from op_cases import bit_equal, poisoned_memory, relative_error
from turbos.common.errors import UserError
from turbos.common.records import Documents
from turbos.model.generate import prefill
from turbos.model.lm import LanguageModel
from turbos.model.state import HybridState

DTYPES = [torch.float32, torch.float64]


def new_state(model: LanguageModel, batch: int, max_len: int = 128) -> HybridState:
    """An empty state in the model's dtype."""
    return HybridState.alloc(model.config, batch, max_len, dtype=model.embed_weight.dtype)


def read(model: LanguageModel, state: HybridState, pieces: Sequence[Tensor]) -> Tensor:
    """Logits of one piece of tokens per sequence, continuing the state."""
    documents = Documents.from_lengths([len(piece) for piece in pieces])
    with torch.no_grad():
        return model.logits(model(torch.cat(list(pieces)), documents, state).hidden_TD)


def tensors_of(state: HybridState) -> list[Tensor]:
    """All tensors of a state."""
    return [tensor for layer in state.layers if layer is not None for tensor in layer.tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_step_by_step_is_the_whole(variant: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype, **VARIANTS[variant])
    tokens = random_tokens(37)
    want = logits_of(model, tokens, [37])
    state = new_state(model, 1)
    got = torch.cat([read(model, state, [token]) for token in tokens.split(1)])
    assert relative_error(got, want) <= TOLERANCE[dtype] * 3
    assert state.lengths == [37]


@pytest.mark.parametrize("pieces", [(37,), (1, 36), (36, 1), (16, 16, 5), (7, 1, 1, 20, 8)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_reading_in_pieces_is_the_whole(variant: str, pieces: tuple[int, ...]) -> None:
    for dtype in DTYPES:
        model = tiny_model(dtype=dtype, **VARIANTS[variant])
        tokens = random_tokens(37)
        state = new_state(model, 1)
        got = torch.cat([read(model, state, [piece]) for piece in tokens.split(pieces)])
        assert relative_error(got, logits_of(model, tokens, [37])) <= TOLERANCE[dtype] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_is_its_sequences_alone(dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    texts = [random_tokens(n, seed=n) for n in (30, 9, 21)]
    cuts = [(5, 1, 24), (1, 1, 7), (19, 1, 1)]
    state = new_state(model, 3)
    rounds = [read(model, state, [text.split(cut)[i] for text, cut in zip(texts, cuts, strict=True)]) for i in range(3)]
    for row, (text, cut) in enumerate(zip(texts, cuts, strict=True)):
        sizes = [[c[i] for c in cuts] for i in range(3)]
        got = torch.cat([rounds[i].split(sizes[i])[row] for i in range(3)])
        assert relative_error(got, logits_of(model, text, [len(text)])) <= TOLERANCE[dtype] * 3, f"row {row}, {cut}"
    assert state.lengths == [30, 9, 21]


@pytest.mark.parametrize("segment", [1, 7, 16, 25, 1024])
def test_prefill_in_any_segments_is_the_whole(segment: int) -> None:
    model = tiny_model(dtype=torch.float64)
    texts = [random_tokens(n, seed=n) for n in (3, 25, 1, 8, 40)]
    state = new_state(model, len(texts))
    with torch.no_grad():
        hidden = prefill(model, [text.tolist() for text in texts], state, segment)
        got = model.logits(hidden)
    want = torch.cat([logits_of(model, text, [len(text)])[-1:] for text in texts])
    assert relative_error(got, want) <= 1e-11
    assert state.lengths == [3, 25, 1, 8, 40]
    following = [random_tokens(1, seed=90 + row) for row in range(5)]
    stepped = read(model, state, following)
    whole = [torch.cat([text, token]) for text, token in zip(texts, following, strict=True)]
    assert relative_error(stepped, torch.cat([logits_of(model, text, [len(text)])[-1:] for text in whole])) <= 1e-11


def test_fork_copies_and_the_copies_part() -> None:
    model = tiny_model(dtype=torch.float64)
    texts = [random_tokens(n, seed=n) for n in (6, 11)]
    state = new_state(model, 2)
    read(model, state, texts)
    kept = [tensor.clone() for tensor in tensors_of(state)]
    forked = state.fork(2)
    assert forked.lengths == [6, 6, 11, 11] and forked.max_len == state.max_len
    ends = [random_tokens(4, seed=50 + i) for i in range(4)]
    got = read(model, forked, ends).split(4)
    for row, end in enumerate(ends):
        text = torch.cat([texts[row // 2], end])
        assert relative_error(got[row], logits_of(model, text, [len(text)])[-4:]) <= 1e-11
    assert state.lengths == [6, 11]
    assert all(bit_equal(a, b) for a, b in zip(kept, tensors_of(state), strict=True)), "a fork wrote into its parent"


def test_select_reorders_drops_and_repeats() -> None:
    model = tiny_model(dtype=torch.float64)
    texts = [random_tokens(n, seed=n) for n in (6, 11, 2)]
    state = new_state(model, 3)
    read(model, state, texts)
    picked = [2, 0, 2]
    selected = state.select(picked)
    assert selected.lengths == [2, 6, 2] and selected.batch == 3
    got = read(model, selected, [random_tokens(1, seed=70 + i) for i in range(3)])
    for row, source in enumerate(picked):
        text = torch.cat([texts[source], random_tokens(1, seed=70 + row)])
        assert relative_error(got[row : row + 1], logits_of(model, text, [len(text)])[-1:]) <= 1e-11
    assert state.lengths == [6, 11, 2]


def test_rows_is_a_view_that_its_parent_remembers() -> None:
    model = tiny_model(dtype=torch.float64)
    texts = [random_tokens(n, seed=n) for n in (6, 11, 2)]
    together, apart = new_state(model, 3), new_state(model, 3)
    read(model, together, texts)
    read(model, apart.rows(1, 3), texts[1:])
    assert apart.lengths == [0, 11, 2]
    read(model, apart.rows(0, 1), texts[:1])
    assert apart.lengths == together.lengths
    for a, b in zip(tensors_of(apart), tensors_of(together), strict=True):
        assert relative_error(a, b) <= 1e-11


def test_nbytes_counts_every_byte_and_only_keys_grow_with_length() -> None:
    config = tiny_config("MAFDM")
    keys = 2 * config.num_kv_heads * config.head_dim * 4
    conv = (config.conv_kernel - 1) * config.conv_channels * 4
    scan = config.mamba_inner * config.mamba_state * 4
    for batch, length in ((1, 10), (3, 50)):
        state = HybridState.alloc(config, batch, length)
        assert state.nbytes == batch * (length * keys + 2 * (conv + scan))
    assert HybridState.alloc(config, 2, 8).fork(3).nbytes == 3 * HybridState.alloc(config, 2, 8).nbytes


def test_scan_state_is_fp32_under_half_precision() -> None:
    state = HybridState.alloc(tiny_config("MAS"), 1, 4, dtype=torch.bfloat16)
    assert state.layers[2].ssm_BNI.dtype == torch.float32 and state.layers[2].conv_BKC.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in state.layers[0].tensors} == {torch.bfloat16, torch.float32}
    assert state.layers[0].ssm_BHPN.dtype == torch.float32
    assert {tensor.dtype for tensor in state.layers[1].tensors} == {torch.bfloat16}


@pytest.mark.parametrize("layers", ["AF", "MD", "SD", "MA"])
def test_a_full_state_is_refused_before_anything_is_written(layers: str) -> None:
    model = tiny_model(layers)
    state = new_state(model, 2, max_len=10)
    read(model, state, [random_tokens(9), random_tokens(2)])
    kept = [tensor.clone() for tensor in tensors_of(state)]
    with pytest.raises(UserError, match="11 tokens do not fit into max_len 10"):
        read(model, state, [random_tokens(2), random_tokens(1)])
    assert state.lengths == [9, 2] and all(bit_equal(a, b) for a, b in zip(kept, tensors_of(state), strict=True))
    read(model, state, [random_tokens(1), random_tokens(8)])
    assert state.lengths == [10, 10]


def test_another_number_of_documents_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="3 documents for a state of 2"):
        read(model, new_state(model, 2), [random_tokens(1)] * 3)


def test_a_nan_sequence_spoils_only_itself() -> None:
    model = tiny_model("MASM")
    plain, dirty = new_state(model, 2), new_state(model, 2)
    for state in (plain, dirty):
        read(model, state, [random_tokens(5), random_tokens(9, seed=1)])
    for tensor in tensors_of(dirty):
        tensor[0] = float("nan")
    for pieces in ([random_tokens(1)] * 2, [random_tokens(4), random_tokens(6)]):
        want, got = read(model, plain, pieces), read(model, dirty, pieces)
        own = len(pieces[0])
        assert got[:own].isnan().all() and bit_equal(got[own:], want[own:])


def test_no_uninitialised_memory_is_read() -> None:
    model = tiny_model()
    pieces = [random_tokens(5), random_tokens(19)]
    want = read(model, new_state(model, 2), pieces)
    with poisoned_memory():
        state = new_state(model, 2)
        got = read(model, state, pieces)
        stepped = read(model, state, [random_tokens(1)] * 2)
    assert relative_error(got, want) <= 1e-5 and stepped.isfinite().all()
