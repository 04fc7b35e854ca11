"""From packed weights and a pool to the program that the compiled step reads: instructions, sizes, working memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turbos.engine.fused import huge
from turbos.engine.fused.program import (
    ATTEND,
    FEED_IN,
    FEED_OUT,
    HEAD,
    INSTRUCTION,
    JOIN,
    MATRIX,
    MERGE,
    PART,
    PROJECT,
    SCAN,
    SIZES,
)
from turbos.engine.fused.support import MAX_BATCH
from turbos.engine.fused.tiles import BF16, FP32, INT8
from turbos.engine.fused.weights import Matrix, PackedModel, PackedSublayer
from turbos.engine.fused.workspace import Workspace
from turbos.engine.layout import ScanPlace
from turbos.engine.pool import StatePool
from turbos.model.config import ModelConfig

THREADS_PAY = 1 << 16
"""Bytes of weights and state below which a phase is done by the calling thread alone."""

_KIND = {torch.float32: FP32, torch.bfloat16: BF16, torch.int8: INT8}


@dataclass(frozen=True)
class Built:
    """Arrays of `program` records; `workspace` keeps the memory that they point to."""

    program: np.ndarray
    matrices: np.ndarray
    sizes: np.ndarray
    routers: int
    workspace: Workspace


def build(packed: PackedModel, pool: StatePool, threads: int) -> Built:
    """The program of a packed model over a pool."""
    for tensor in (pool.scan_SX, *pool.keys, *pool.values):
        huge.prefer(tensor, collapse=False)
    workspace = Workspace()
    writer = _Writer(packed.config, workspace)
    scans = {place.sublayer: place for place in pool.layout.scans}
    caches = dict(zip(pool.layout.attention, zip(pool.keys, pool.values, strict=True), strict=True))
    for index, sublayer in enumerate(packed.sublayers):
        if sublayer.kind == "M":
            writer.mamba(sublayer, scans[index])
        elif sublayer.kind == "A":
            writer.attention(sublayer, *caches[index])
        else:
            writer.feed(sublayer)
    writer.head(packed)
    sizes = _sizes(packed, pool, workspace, threads, writer.routers)
    return Built(writer.program(), writer.matrices(), sizes, writer.routers, workspace)


class _Writer:
    """Collects instructions and matrices."""

    def __init__(self, config: ModelConfig, workspace: Workspace) -> None:
        self.config, self.workspace = config, workspace
        self.routers = 0
        self._instructions: list[dict[str, int]] = []
        self._matrices: list[Matrix] = []

    def program(self) -> np.ndarray:
        records = np.zeros(len(self._instructions), INSTRUCTION)
        for record, fields in zip(records, self._instructions, strict=True):
            for name, value in fields.items():
                record[name] = value
        return records

    def matrices(self) -> np.ndarray:
        records = np.zeros(len(self._matrices), MATRIX)
        for record, matrix in zip(records, self._matrices, strict=True):
            record["weights"], record["scales"] = self._address(matrix.weights), self._address(matrix.scales)
            record["kind"] = _KIND[matrix.weights.dtype]
            record["rows"], record["width"] = matrix.weights.shape
        return records

    def mamba(self, sublayer: PackedSublayer, place: ScanPlace) -> None:
        config = self.config
        into, out = sublayer.matrices
        self._add(PROJECT, [into], norm=self._address(sublayer.norm_D))
        self._add(
            SCAN,
            [],
            row_work=8 * config.mamba_inner * config.mamba_state,
            conv_weight=self._address(sublayer.conv_weight_KC),
            conv_bias=self._address(sublayer.conv_bias_C),
            dt_bias=self._address(sublayer.dt_bias_H),
            decay=self._address(sublayer.decay_H),
            skip=self._address(sublayer.skip_H),
            conv_start=place.conv.start,
            scan_start=place.scan.start,
        )
        self._add(MERGE, [out], gate_norm=self._address(sublayer.gate_norm_I))

    def attention(self, sublayer: PackedSublayer, keys: Tensor, values: Tensor) -> None:
        config = self.config
        *into, out = sublayer.matrices
        self._add(PROJECT, into, norm=self._address(sublayer.norm_D))
        self._add(
            ATTEND,
            [],
            row_work=8 * config.num_heads * config.head_dim,
            keys=self._address(keys),
            values=self._address(values),
            q_norm=self._address(sublayer.q_norm_E),
            k_norm=self._address(sublayer.k_norm_E),
        )
        self._add(JOIN, [], row_work=4 * config.num_heads * config.head_dim // PART)
        self._add(MERGE, [out])

    def feed(self, sublayer: PackedSublayer) -> None:
        config, routed = self.config, sublayer.kind == "F"
        shared = config.shared_expert_size if routed else config.ffn_size
        fields = {"shared_size": shared}
        if routed:
            fields |= {"experts": config.num_experts, "top_k": config.top_k, "expert_size": config.expert_size}
            fields |= {"router": self._address(sublayer.router_ED), "layer": self.routers}
            fields |= {"selection_bias": self._address(sublayer.selection_bias_E)}
            self.routers += 1
        first = len(self._matrices)
        self._matrices += sublayer.matrices
        # Of stacked experts only the chosen are read.
        read = (config.top_k * config.expert_size if routed else 0) + shared
        work = read * config.hidden_size
        fields |= {"matrix": first, "matrices": len(sublayer.matrices), "row_work": work}
        self._instructions.append({"code": FEED_IN, "norm": self._address(sublayer.norm_D), **fields})
        self._instructions.append({"code": FEED_OUT, **fields})

    def head(self, packed: PackedModel) -> None:
        self._add(HEAD, [packed.head], norm=self._address(packed.norm_D))

    def _add(self, code: int, matrices: list[Matrix], **fields: int) -> None:
        read = sum(matrix.nbytes for matrix in matrices)
        place = {"matrix": len(self._matrices), "matrices": len(matrices), "bytes": read}
        self._matrices += matrices
        self._instructions.append({"code": code, **place, **fields})

    def _address(self, tensor: Tensor | None) -> int:
        """The address of a tensor that is kept alive; 0 for none."""
        if tensor is None:
            return 0
        if not tensor.is_contiguous():
            raise ValueError(f"fused: a tensor of shape {list(tensor.shape)} is not contiguous")
        return self.workspace.keep(tensor)


def _sizes(packed: PackedModel, pool: StatePool, workspace: Workspace, threads: int, routers: int) -> np.ndarray:
    config = packed.config
    sizes: Any = np.zeros(1, SIZES)
    record = sizes[0]
    for name, value in (_shape_fields(config, routers) | _buffer_fields(config, workspace, threads)).items():
        record[name] = value
    record["conv_numbers"], record["scan_numbers"] = pool.layout.conv_numbers, pool.layout.scan_numbers
    record["conv"], record["scan"] = workspace.keep(pool.conv_SX), workspace.keep(pool.scan_SX)
    record["embed"], record["embed_kind"] = (
        workspace.keep(packed.embedding.weights),
        _KIND[packed.embedding.weights.dtype],
    )
    record["embed_scales"] = 0 if packed.embedding.scales is None else workspace.keep(packed.embedding.scales)
    if config.rope_theta is not None and "A" in config.layers:
        record["frequencies"] = workspace.keep(rotary_frequencies(config))
    return np.asarray(sizes)


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair, fp32 `[E / 2]`, computed as `ops.attention.rotate` does."""
    width = config.head_dim
    assert config.rope_theta is not None
    base = config.rope_theta * config.rope_alpha ** (width / (width - 2))
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return torch.as_tensor(base**-exponents)


def _shape_fields(config: ModelConfig, routers: int) -> dict[str, float]:
    kinds = set(config.layers)
    rotary = config.rope_theta is not None and "A" in kinds
    return {
        "hidden": config.hidden_size,
        "vocabulary": config.vocab_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rotary": int(rotary),
        "mamba_heads": config.mamba_heads,
        "mamba_head_dim": config.mamba_head_dim,
        "mamba_state": config.mamba_state,
        "groups": config.mamba_groups,
        "conv_kernel": config.conv_kernel,
        "inner": config.mamba_inner,
        "channels": config.conv_channels,
        "swiglu": int(config.activation == "swiglu"),
        "sigmoid": int(config.router == "sigmoid"),
        "normalise": int(config.router_normalise),
        "routers": routers,
        "threads_pay": THREADS_PAY,
        "wide": _widest_projection(config),
        "mixed": _widest_mixer(config),
        "eps": config.norm_eps,
        "embedding_multiplier": config.embedding_multiplier,
        "attention_scale": config.attention_scale,
        "residual_multiplier": config.residual_multiplier,
        "logit_scale": 1.0 / config.logits_scaling,
        "router_scale": config.router_scale,
    }


def _widest_projection(config: ModelConfig) -> int:
    mamba = config.mamba_inner + config.conv_channels + config.mamba_heads if "M" in config.layers else 1
    attention = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim if "A" in config.layers else 1
    return max(mamba, attention)


def _widest_mixer(config: ModelConfig) -> int:
    mamba = config.mamba_inner if "M" in config.layers else 1
    return max(mamba, config.num_heads * config.head_dim if "A" in config.layers else 1)


def _buffer_fields(config: ModelConfig, workspace: Workspace, threads: int) -> dict[str, int]:
    fields: dict[str, int] = {}
    rows, hidden = MAX_BATCH, config.hidden_size

    def add(name: str, count: int, width: int) -> None:
        fields[name] = workspace.buffer(count, width)

    def add_listed(name: str, count: int, width: int) -> None:
        add(name, count, width)
        fields[f"{name}_rows"] = workspace.listed(workspace.rows_of(fields[name], count, width))

    add("x", rows, hidden)
    for name, width in (("normed", hidden), ("merged", hidden)):
        add_listed(name, rows, width)
    add_listed("projected", rows, _widest_projection(config))
    add_listed("mixing", rows, _widest_mixer(config))
    fields["logits_rows"] = workspace.buffer(2, rows, torch.int64)
    if "M" in config.layers:
        add("bc", rows, config.conv_channels - config.mamba_inner)
        add("conv_x", rows, config.mamba_inner)
        add("squares", rows, config.mamba_heads)
    if "A" in config.layers:
        fields |= _attention_buffers(config, workspace, threads)
    if set("FD") & set(config.layers):
        fields |= _feed_buffers(config, workspace)
    return fields


def _attention_buffers(config: ModelConfig, workspace: Workspace, threads: int) -> dict[str, int]:
    heads, width = config.num_heads, config.head_dim
    query, scores = workspace.buffer(MAX_BATCH * heads, width), workspace.buffer(threads * heads, PART)
    return {
        "rope": workspace.buffer(MAX_BATCH, width),
        "query": query,
        "query_rows": workspace.listed(workspace.rows_of(query, MAX_BATCH * heads, width)),
        "scores": scores,
        "scores_rows": workspace.listed(workspace.rows_of(scores, threads * heads, PART)),
        "part_rows": workspace.buffer(threads, heads, torch.int64),
        "weights_rows": workspace.buffer(threads, heads, torch.int64),
    }


def _feed_buffers(config: ModelConfig, workspace: Workspace) -> dict[str, int]:
    """Hidden rows and outputs: first those of (row, choice), then one for each row's shared or dense network."""
    routed = "F" in config.layers
    top_k = config.top_k if routed else 0
    up = 2 if config.activation == "swiglu" else 1
    sizes = [config.expert_size, config.shared_expert_size] if routed else []
    sizes += [config.ffn_size] if "D" in config.layers else []
    # A dense network has no choices: its rows are the first ones of the same buffers.
    count, width = MAX_BATCH * (top_k + 1), up * max(sizes)
    hidden_in, hidden_out = workspace.buffer(count, width), workspace.buffer(count, config.hidden_size)
    fields = {
        "hidden_in": hidden_in,
        "hidden_in_rows": workspace.listed(workspace.rows_of(hidden_in, count, width)),
        "hidden_out": hidden_out,
        "hidden_out_rows": workspace.listed(workspace.rows_of(hidden_out, count, config.hidden_size)),
    }
    if routed:
        logits = workspace.buffer(MAX_BATCH, config.num_experts)
        fields |= {
            "router_logits": logits,
            "router_rows": workspace.listed(workspace.rows_of(logits, MAX_BATCH, config.num_experts)),
            "chosen": workspace.buffer(MAX_BATCH, top_k, torch.int64),
            "gates": workspace.buffer(MAX_BATCH, top_k),
            "groups_list": workspace.buffer(MAX_BATCH * top_k + 2, 2, torch.int64),
            "slots": workspace.buffer(3 * MAX_BATCH, top_k, torch.int64),
        }
    return fields
