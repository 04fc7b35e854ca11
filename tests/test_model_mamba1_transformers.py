"""The Mamba-1 mixer against transformers' own (`MambaForCausalLM`): one layer, whole models, gradients and decoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model_cases import logits_of, random_tokens, tiny_config
from op_cases import assert_close, relative_error
from turbos.common.records import Documents
from turbos.model.config import ModelConfig
from turbos.model.lm import LanguageModel
from turbos.model.mixers import Mamba1, Pass
from turbos.model.state import HybridState

transformers = pytest.importorskip("transformers")

SHAPES: dict[str, dict[str, object]] = {
    "small": {"hidden_size": 24, "mamba1_inner": 48, "mamba1_state": 5, "mamba1_dt_rank": 3},
    "rank from the width": {"hidden_size": 40, "mamba1_inner": 80, "mamba1_state": 16, "mamba1_dt_rank": None},
    "one state, kernel 2": {"hidden_size": 12, "mamba1_inner": 24, "mamba1_state": 1, "conv_kernel": 2},
}
NAMES = {
    **{"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "dt_bias": "dt_proj.bias"},
    **{name: name for name in ("in_proj.weight", "x_proj.weight", "dt_proj.weight", "A_log", "D", "out_proj.weight")},
}


def peer_model(config: ModelConfig):  # type: ignore[no-untyped-def]
    """transformers' model of the same shape, with random weights everywhere."""
    shape = transformers.MambaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=len(config.layers),
        state_size=config.mamba1_state, expand=config.mamba1_inner // config.hidden_size, time_step_rank=config.dt_rank,
        conv_kernel=config.conv_kernel, layer_norm_epsilon=config.norm_eps, residual_in_fp32=True, use_mambapy=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.MambaForCausalLM(shape).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if parameter.dim() == 1 or "A_log" in name else parameter[0].numel() ** -0.5
            parameter += scale * torch.randn(parameter.shape)
    return model


def our_model(config: ModelConfig, peer) -> LanguageModel:  # type: ignore[no-untyped-def]
    """Our model with the peer's weights."""
    model, theirs = LanguageModel(config).init_weights(0), dict(peer.named_parameters())
    with torch.no_grad():
        model.embed_weight.copy_(theirs["backbone.embeddings.weight"])
        model.norm_weight.copy_(theirs["backbone.norm_f.weight"])
        for index, sublayer in enumerate(model.sublayers):
            sublayer.norm_weight.copy_(theirs[f"backbone.layers.{index}.norm.weight"])
            for ours, name in NAMES.items():
                parameter = sublayer.mixer.get_parameter(ours)
                parameter.copy_(theirs[f"backbone.layers.{index}.mixer.{name}"].view(parameter.shape))
    return model


def shaped(name: str, layers: str) -> ModelConfig:
    """A configuration of one of the shapes."""
    return tiny_config(layers, chunk_size=16, **SHAPES[name])


@pytest.mark.parametrize("length", [1, 3, 50])
@pytest.mark.parametrize("name", SHAPES)
def test_the_mixer_is_transformers_mixer_forward_and_gradient(name: str, length: int) -> None:
    config = shaped(name, "S")
    peer = peer_model(config)
    theirs, ours = peer.backbone.layers[0].mixer, our_model(config, peer).sublayers[0].mixer
    assert isinstance(ours, Mamba1) and len(NAMES) == len(list(ours.parameters())) == len(list(theirs.parameters()))
    documents = Documents.from_lengths([length])
    x = torch.randn(length, config.hidden_size, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))

    def run(mixer: torch.nn.Module, names: list[str], form) -> list[Tensor]:  # type: ignore[no-untyped-def]
        rows = x.clone().requires_grad_()
        output = form(rows)
        parameters = [mixer.get_parameter(name) for name in names]
        gradients = torch.autograd.grad((output * weight).sum(), [rows, *parameters])
        return [output.detach(), *gradients]

    got = run(ours, list(NAMES), lambda rows: ours(rows, Pass(documents, documents.positions_T, False, ()), None))
    want = run(theirs, list(NAMES.values()), lambda rows: theirs(rows[None])[0])
    want = [tensor.view(mine.shape) for tensor, mine in zip(want, got, strict=True)]
    # Where no document has a second token nothing decays, and the gradient of A_log is zero.
    assert_close(got, want, 1e-5, ["output", "x", *NAMES], floor=1e-2)


@pytest.mark.parametrize("name", SHAPES)
def test_a_whole_model_is_transformers_model(name: str) -> None:
    config = shaped(name, "SSS")
    peer = peer_model(config)
    model, tokens = our_model(config, peer), random_tokens(45, seed=1)
    with torch.no_grad():
        want = peer(tokens[None], use_cache=False).logits[0]
    assert relative_error(logits_of(model, tokens, [45]), want) <= 1e-5


def test_decoding_with_a_state_is_transformers_decoding_with_its_cache() -> None:
    config = shaped("small", "SS")
    peer = peer_model(config)
    model, tokens = our_model(config, peer), random_tokens(30, seed=2)
    state = HybridState.alloc(config, 1, 30)
    with torch.no_grad():
        theirs = peer(tokens[None, :20], use_cache=True)
        ours = model.logits(model(tokens[:20], Documents.from_lengths([20]), state).hidden_TD)
        assert relative_error(ours, theirs.logits[0]) <= 1e-5
        for t in range(20, 30):
            theirs = peer(tokens[None, t : t + 1], use_cache=True, cache_params=theirs.cache_params)
            ours = model.logits(model(tokens[t, None], Documents.from_lengths([1]), state).hidden_TD)
            assert relative_error(ours, theirs.logits[0]) <= 1e-5, t
