"""Held-out figures: bits per byte, source by source, of texts and of what the assistant says in conversations.

figures = held_out_figures(model, tokenizer, ingredients, batch_tokens=4096, tokens=16_384)
figures["bits_per_byte/english"]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from turbos.common.records import IGNORED, Batch
from turbos.data.loader import batches_once
from turbos.data.shards import ShardReader
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.train.ingredients import Ingredient
from turbos.train.trainer import next_token_loss


def held_out_figures(
    model: LanguageModel, tokenizer: Tokenizer, ingredients: Sequence[Ingredient], batch_tokens: int, tokens: int
) -> dict[str, float]:
    """Bits per byte of about `tokens` held-out tokens of each source, as `bits_per_byte/<name>`."""
    figures = {}
    for one in ingredients:
        reader = ShardReader(one.shards.held_out, tokenizer)
        batches: list[Batch] = []
        for batch in batches_once(reader, batch_tokens, one.targets):
            if sum(earlier.documents.total for earlier in batches) >= tokens:
                break
            batches.append(batch)
        figures[f"bits_per_byte/{one.shards.name}"] = bits_per_byte(model, tokenizer, batches)
    return figures


@torch.no_grad()
def bits_per_byte(model: LanguageModel, tokenizer: Tokenizer, batches: Sequence[Batch]) -> float:
    """Bits over UTF-8 bytes of the predicted text; a document's first token is context, its end is predicted too.

    NaN where that leaves no text (documents of a single token).
    """
    nats, num_bytes = 0.0, 0
    for batch in batches:
        nats += next_token_loss(model, batch).loss_sum.item()
        predicted = batch.targets_T[batch.targets_T != IGNORED].tolist()
        num_bytes += len(tokenizer.decode(predicted, skip_special=True).encode())
    return nats / math.log(2) / num_bytes if num_bytes else math.nan
