"""The model learns: every kind of sublayer overfits two documents, and both ways of balancing even a skewed router."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model_cases import random_tokens, tiny_model
from turbos.common.records import IGNORED, Documents
from turbos.model.lm import LanguageModel
from turbos.ops.loss import chunked_cross_entropy

LENGTHS = (14, 9)


def next_tokens(tokens: Tensor) -> Tensor:
    """Target of each token: the next of its document."""
    pieces = [torch.cat([piece[1:], torch.tensor([IGNORED])]) for piece in tokens.split(LENGTHS)]
    return torch.cat(pieces)


def overfit(model: LanguageModel, tokens: Tensor, steps: int) -> float:
    """Mean loss per token after training on two documents with AdamW."""
    targets, documents = next_tokens(tokens), Documents.from_lengths(LENGTHS)
    weights = torch.ones(len(tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(tokens, documents)
        loss = chunked_cross_entropy(output.hidden_TD, model.head_weight, targets, weights, model.logit_scale)
        loss = loss / (len(tokens) - len(LENGTHS))
        (loss + output.balance_loss + output.z_loss).backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ("MM", {}),
        ("SS", {}),
        ("AA", {"rope_theta": 10000.0}),
        ("AA", {"rope_theta": 10000.0, "qk_norm": True, "tied": False}),
        ("MF", {}),
        ("MF", {"router": "sigmoid", "activation": "relu2", "bias_update": "update"}),
        ("MD", {}),
        ("MFAF", {}),
    ],
    ids=str,
)
def test_two_documents_are_learnt_by_heart(layers: str, options: dict[str, object]) -> None:
    assert overfit(tiny_model(layers, **options), random_tokens(sum(LENGTHS), seed=4), 120) < 0.05


def test_feed_forwards_alone_learn_what_one_token_tells() -> None:
    # Without a mixer the next token can depend on the last only: every token is used once.
    tokens = torch.randperm(61, generator=torch.Generator().manual_seed(0))[: sum(LENGTHS)]
    for layers in ("F", "D"):
        assert overfit(tiny_model(layers), tokens, 120) < 0.05


def skewed(**options: object) -> LanguageModel:
    """One router, all of whose tokens prefer expert 0."""
    model = tiny_model("F", top_k=1, num_experts=4, **options)
    with torch.no_grad():
        model.embed_weight[:, 0] = 1.0
        model.sublayers[0].mixer.router_weight[0, 0] += 3.0
        if model.config.router == "sigmoid":
            model.sublayers[0].mixer.selection_bias.zero_()
    return model


def largest_share(load_LE: Tensor) -> float:
    """Share of the busiest expert, 1/4 when even."""
    return float(load_LE[0].max() / load_LE[0].sum())


def test_the_selection_bias_evens_a_skewed_router() -> None:
    model = skewed(router="sigmoid", bias_update="update", bias_rate=0.01)
    tokens, documents = random_tokens(400), Documents.from_lengths([400])
    with torch.no_grad():
        first = largest_share(model(tokens, documents).load_LE)
        for _ in range(150):
            model.update_selection_bias(model(tokens, documents).load_LE)
        last = largest_share(model(tokens, documents).load_LE)
    assert first > 0.8 and last < 0.35


def test_the_auxiliary_loss_evens_a_skewed_router() -> None:
    model = skewed(aux_loss=1.0, z_loss=0.0)
    tokens, documents = random_tokens(400), Documents.from_lengths([400])
    optimizer = torch.optim.Adam([model.sublayers[0].mixer.router_weight], lr=0.03)
    shares = []
    for _ in range(100):
        output = model(tokens, documents)
        shares.append(largest_share(output.load_LE))
        optimizer.zero_grad()
        output.balance_loss.backward()
        optimizer.step()
    assert shares[0] > 0.8 and shares[-1] < 0.4
