"""Random configurations of each Hugging Face family, and how models of transformers are compared with ours.

Not a test file. A seed decides everything; sizes are tiny and odd, weights large enough that a mistake in any sublayer
shows in the logits.

>>> random_config("llama", seed=0).layers[:2]
'AD'
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn

from model_cases import random_tokens, tiny_config
from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.model.families import family_of
from turbos.model.lm import LanguageModel
from turbos.ops.loss import chunked_cross_entropy

FAMILIES = ("granitemoehybrid", "nemotron_h", "llama")


def random_config(family: str, seed: int) -> ModelConfig:
    """A configuration that the named family expresses."""
    rng = random.Random(f"{family} {seed}")
    kv_heads, repeat = rng.choice([1, 2, 3]), rng.choice([1, 2, 3])
    shapes: dict[str, object] = {
        "num_heads": kv_heads * repeat,
        "num_kv_heads": kv_heads,
        "norm_eps": rng.choice([1e-6, 1e-5, 1e-3]),
        "chunk_size": rng.choice([8, 16]),
        "conv_kernel": rng.choice([2, 3, 4]),
        "mamba_state": rng.choice([3, 5, 8]),
        "ffn_size": rng.choice([9, 20, 32]),
        "num_experts": rng.choice([2, 5, 8]),
        "top_k": rng.choice([1, 2]),
        "expert_size": rng.choice([6, 12]),
        "shared_expert_size": rng.choice([5, 8]),
    }
    shapes |= _OPTIONS[family](rng, kv_heads * repeat)
    # Weights that keep the size of what they multiply, as a trained model's do: wider matrices of the base's 0.2 would
    # amplify rounding until transformers itself is 4e-5 away from float64.
    return tiny_config(**{**shapes, "init_std": cast(int, shapes["hidden_size"]) ** -0.5})


def _granite(rng: random.Random, heads: int) -> dict[str, object]:
    feed, head_dim = rng.choice("FFD"), rng.choice([4, 6, 8])
    groups, per_group = rng.choice([1, 2, 3]), rng.choice([1, 2])
    hidden = 2 * heads * head_dim * groups * per_group
    mixers = [rng.choice("MMA") for _ in range(rng.choice([2, 3, 4]))]
    multiplied = rng.random() < 0.5
    return {
        "hidden_size": hidden,
        "layers": "".join(mixer + feed for mixer in mixers),
        "head_dim": hidden // heads,
        "rope_theta": rng.choice([None, 10000.0, 500.0]),
        "mamba_groups": groups,
        "mamba_heads": groups * per_group,
        "mamba_head_dim": rng.choice([1, 2]) * hidden // (groups * per_group),
        "tied": rng.random() < 0.5,
        "embedding_multiplier": 6.0 if multiplied else 1.0,
        # Always Granite's own: with none of the four, attention alone would be a Llama.
        "attention_multiplier": 0.17,
        "residual_multiplier": 0.4 if multiplied else 1.0,
        "logits_scaling": 3.0 if multiplied else 1.0,
    }


def _nemotron(rng: random.Random, heads: int) -> dict[str, object]:
    groups = rng.choice([1, 2, 3])
    letters = [*"MAFD", *(rng.choice("MMAFFD") for _ in range(rng.choice([0, 1, 3])))]
    rng.shuffle(letters)
    return {
        "hidden_size": rng.choice([20, 24, 33]),
        "layers": "".join(letters),
        "head_dim": rng.choice([4, 5, 8]),
        "mamba_groups": groups,
        "mamba_heads": groups * rng.choice([1, 2]),
        "mamba_head_dim": rng.choice([5, 8]),
        "activation": "relu2",
        "router": "sigmoid",
        "router_normalise": rng.random() < 0.7,
        "router_scale": rng.choice([1.0, 2.5]),
        "bias_update": rng.choice(["freeze", "update"]),
        "tied": False,
    }


def _llama(rng: random.Random, heads: int) -> dict[str, object]:
    return {
        "hidden_size": heads * rng.choice([6, 8, 10]),
        "layers": "AD" * rng.choice([1, 2, 4]),
        "head_dim": rng.choice([4, 6, 8]),
        "rope_theta": rng.choice([10000.0, 100000.0, 300.0]),
        "tied": rng.random() < 0.5,
    }


_OPTIONS = {"granitemoehybrid": _granite, "nemotron_h": _nemotron, "llama": _llama}


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's safetensors files, by name."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def peer_logits(peer: nn.Module, tokens_T: Tensor) -> Tensor:
    """Logits that a model of transformers gives one document."""
    with torch.no_grad():
        return peer(tokens_T[None], use_cache=False).logits[0]


def shake(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter and buffer of transformers' making, so that none is still 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in [*module.parameters(), *(b for name, b in module.named_buffers() if "e_score" in name)]:
            parameter += 0.08 * torch.randn(parameter.shape, generator=generator)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest number, so that logits of any scale are judged as if of order 1."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())


def file_gradients(model: LanguageModel, tokens_T: Tensor) -> dict[str, Tensor]:
    """Gradients of the mean next-token loss, in the names and layouts of the family's files."""
    targets_T = tokens_T.roll(-1)
    weights_T = torch.ones(len(tokens_T))
    weights_T[-1] = 0.0
    output = model(tokens_T, Documents.from_lengths([len(tokens_T)]))
    loss = chunked_cross_entropy(output.hidden_TD, model.head_weight, targets_T, weights_T, model.logit_scale)
    (loss / weights_T.sum()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    names = family_of(model.config).tensor_names(model.config)
    return {name.file: name.place(gradients[name.ours]) for name in names if name.ours in gradients}


def peer_gradients(peer: nn.Module, tokens_T: Tensor, directory: Path) -> dict[str, Tensor]:
    """The same of a model of transformers; its own writer puts them into the names of the files."""
    peer.zero_grad()
    peer(tokens_T[None], labels=tokens_T[None], use_cache=False).loss.backward()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    peer.save_pretrained(directory)
    return stored_tensors(directory)


def prompts(count: int, length: int) -> list[list[int]]:
    """Random prompts."""
    return random_tokens(count * length, seed=5).view(count, length).tolist()
