"""The step as a list of instructions over addresses: one compiled function reads it, whatever the model is.

An instruction is a phase that all threads do together: a mixer is three or four of them, a feed-forward network two.
Records hold sizes, addresses of weights and of the pool's tensors; who makes them keeps that memory alive.
"""

from __future__ import annotations

import numpy as np

PROJECT, SCAN, ATTEND, JOIN, MERGE, FEED_IN, FEED_OUT, HEAD = range(8)
"""Codes of the phases: norm and projections; conv and state; attention over parts of the cache; the parts joined; a
mixer's output added to the stream; a feed-forward network's two halves; final norm and logits."""

PART = 256
"""Cached tokens that are attended to at once, between fixed borders: no bit depends on the number of threads."""


def _record(integers: str, floats: str = "") -> np.dtype:
    return np.dtype([(name, np.int64) for name in integers.split()] + [(name, np.float32) for name in floats.split()])


MATRIX = _record("weights scales kind rows width")
"""A weight matrix `[rows, width]` (stacked experts: one after another) and where its scales are."""

INSTRUCTION = _record(
    "code matrix matrices norm bytes row_work"
    " conv_weight conv_bias dt_bias decay skip gate_norm conv_start scan_start"
    " keys values q_norm k_norm"
    " router selection_bias layer"
    " experts top_k expert_size shared_size"
)
"""One phase; fields that a code does not use are zero. `bytes` and `row_work` say whether threads pay."""

SIZES = _record(
    "hidden vocabulary heads kv_heads head_dim rotary"
    " mamba_heads mamba_head_dim mamba_state groups conv_kernel inner channels conv_numbers scan_numbers"
    " swiglu sigmoid normalise routers wide mixed feed"
    " conv scan embed embed_scales embed_kind frequencies"
    " x x_rows normed normed_rows projected projected_rows mixing mixing_rows merged merged_rows"
    " bc conv_x squares query query_rows rope scores scores_rows part_rows weights_rows"
    " router_logits router_rows chosen gates groups_list slots hidden_in hidden_in_rows hidden_out hidden_out_rows"
    " logits_rows threads_pay",
    "eps embedding_multiplier attention_scale residual_multiplier logit_scale router_scale",
)
"""Sizes of the model and addresses of the working memory; `*_rows` are lists of a buffer's row addresses."""

CALL = _record(
    "batch threads tokens slots positions tables table_width hidden logits routes"
    " cached parts partial partial_maxima partial_sums"
)
"""What changes with every step."""
