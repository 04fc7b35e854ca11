"""`turbos bench train`: forward, loss and backward of one packed sequence, ours against transformers, fp32.

The rate is also given as a share of the machine's own: 6 FLOP per active parameter and token, over the rate of a large
fp32 matrix product measured in the same rounds. Scan, attention and norms are not in that count, so the share cannot
reach 1. The optimizer's step is left out on both sides.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from turbos.bench.peers import bench_model, interleave, load_transformers, require_agreement, save_for_peers
from turbos.bench.rows import Row
from turbos.common.records import IGNORED, Documents
from turbos.model.describe import describe
from turbos.model.lm import LanguageModel
from turbos.ops.loss import chunked_cross_entropy

LENGTH, ROUNDS = 2048, 7
SGEMM_SIZE, SGEMM_PRODUCTS = 2048, 4


def bench_train(length: int = LENGTH, rounds: int = ROUNDS) -> Sequence[Row]:
    """Row `train <length>`, tok/s; its ratio to `sgemm floor` is the share of the machine's matrix rate."""
    model = bench_model()
    tokens_T = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    matrix = torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    with tempfile.TemporaryDirectory() as parent:
        peer = load_transformers(save_for_peers(model, parent)).train()
    require_agreement("losses", our_step(model, tokens_T), their_step(peer, tokens_T))
    work = {
        "sgemm": lambda: [matrix @ matrix for _ in range(SGEMM_PRODUCTS)],
        "turbos": lambda: our_step(model, tokens_T),
        "transformers": lambda: their_step(peer, tokens_T),
    }
    print(f"bench train: {rounds} rounds at T={length}, {torch.get_num_threads()} threads", file=sys.stderr)
    times = interleave(work, rounds)
    floor = [
        6 * describe(model.config).active_params * length / (2 * SGEMM_PRODUCTS * SGEMM_SIZE**3 / seconds)
        for seconds in times.seconds["sgemm"]
    ]
    shares = [least / ours for least, ours in zip(floor, times.seconds["turbos"], strict=True)]
    ratios = {"transformers": times.ratio("turbos", "transformers"), "sgemm floor": statistics.median(shares)}
    return [Row(f"train {length}", length / times.median("turbos"), "tok/s", ratios)]


def our_step(model: LanguageModel, tokens_T: Tensor) -> Tensor:
    """Mean next-token loss of one document, and its gradients."""
    model.zero_grad(set_to_none=True)
    output = model(tokens_T, Documents.from_lengths([len(tokens_T)], tokens_T.device))
    targets_T = torch.cat([tokens_T[1:], tokens_T.new_tensor([IGNORED])])
    weights_T = torch.full((len(tokens_T),), 1 / (len(tokens_T) - 1))
    loss = chunked_cross_entropy(output.hidden_TD, model.head_weight, targets_T, weights_T, model.logit_scale)
    (loss + output.balance_loss + output.z_loss).backward()
    return loss.detach()


def their_step(peer: nn.Module, tokens_T: Tensor) -> Tensor:
    """The same by transformers' own model and loss."""
    peer.zero_grad(set_to_none=True)
    loss: Tensor = peer(input_ids=tokens_T[None], labels=tokens_T[None], use_cache=False).loss
    loss.backward()
    return loss.detach()
