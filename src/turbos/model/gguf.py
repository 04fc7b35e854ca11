"""GGUF files: a model and its tokenizer in one file that llama.cpp runs, of the Granite and Nemotron families.

Written with the `gguf` package, which knows the container; the names, layouts and keys are ours to get right, because
llama.cpp's own converter takes no tokenizer that it has not seen. What llama.cpp cannot run is refused by name.

    write_gguf(model, tokenizer, Path("model.gguf"), "q8_0")
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from turbos.common.errors import UserError
from turbos.model.config import ModelConfig
from turbos.model.families import family_of
from turbos.model.gguf_tensors import FileTensor, file_tensors
from turbos.model.gguf_vocabulary import Vocabulary, read_vocabulary
from turbos.model.lm import LanguageModel
from turbos.model.token_ids import TokenIds
from turbos.text.tokenizer import Tokenizer

try:
    import gguf
    from gguf import GGMLQuantizationType as Numbers
except ImportError as error:
    raise UserError("gguf: the package is missing; install it with pip install 'turbos[export]'") from error

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Numbers that matrices may be stored in; norms, scan parameters and routers are always fp32."""

NUMBERS = {
    "f32": Numbers.F32,
    "f16": Numbers.F16,
    "bf16": Numbers.BF16,
    "q8_0": Numbers.Q8_0,
    "q4_0": Numbers.Q4_0,
}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
GRANITE, NEMOTRON = "granitemoehybrid", "nemotron_h"
ROUNDING, MOST_BLOCKS = 8, 512
"""Rows of an embedding come in multiples of 8, to which llama.cpp's own converter pads both families; it loads no more
than 512 blocks."""


def write_gguf(
    model: LanguageModel, tokenizer: Tokenizer, path: Path, kind: str, token_ids: TokenIds | None = None
) -> None:
    """Write one file, whole or not at all; UserError for what llama.cpp cannot run.

    `kind` is one of `KINDS`; a matrix whose rows are no multiple of 32 is stored as f16 in a q8_0 or q4_0 file.
    `token_ids` None takes the ids that the tokenizer's files name.
    """
    if kind not in KINDS:
        raise UserError(f"gguf: kind {kind!r} is none of {', '.join(KINDS)}")
    for problem in gguf_obstacles(model.config):
        raise UserError(f"gguf: llama.cpp cannot run this model: {problem}")
    vocabulary = read_vocabulary(tokenizer, model.config.vocab_size, token_ids)
    granite = family_of(model.config).name == GRANITE
    tensors = list(file_tensors(model, sublayers_per_block=2 if granite else 1))
    aside = path.with_name(f".writing-{path.name}")
    writer = gguf.GGUFWriter(aside, _architecture(model.config))
    try:
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _describe(writer, model.config)
        _describe_granite(writer, model.config) if granite else _describe_nemotron(writer, model.config)
        _add_vocabulary(writer, vocabulary)
        _write_tensors(writer, tensors, NUMBERS[kind])
        writer.close()
        _replace(aside, path)
    except OSError as error:
        # numpy's carry no errno: a full disk looks like "1440 requested and 1008 written".
        raise UserError(f"cannot save {path}: {error}; make room and run again") from error
    finally:
        with suppress(OSError):
            writer.close()
        aside.unlink(missing_ok=True)


def gguf_obstacles(config: ModelConfig) -> Iterator[str]:
    """Why llama.cpp cannot run a model, one line each that names the option; nothing if it can."""
    family = family_of(config)
    if family.name not in (GRANITE, NEMOTRON):
        yield f"its family is {family.name}, and only {GRANITE} and {NEMOTRON} are written"
        return
    if config.vocab_size % ROUNDING:
        yield f"vocab_size {config.vocab_size} must be a multiple of {ROUNDING}"
    if not {"M", "A"} <= set(config.layers):
        yield "layers must have both M and A: it ends itself where one of the two memories is empty"
    blocks = len(config.layers) // (2 if family.name == GRANITE else 1)
    if blocks > MOST_BLOCKS:
        yield f"layers make {blocks} blocks, at most {MOST_BLOCKS} are loaded"
    yield from _granite_obstacles(config) if family.name == GRANITE else _nemotron_obstacles(config)


def _granite_obstacles(config: ModelConfig) -> Iterator[str]:
    if "A" in config.layers and config.rope_theta is not None:
        yield "rope_theta must be null: its Granite hybrids have no positions"
    if "M" in config.layers and config.mamba_inner != 2 * config.hidden_size:
        yield (
            f"mamba_heads * mamba_head_dim is {config.mamba_inner}, "
            f"it must be 2 * hidden_size ({2 * config.hidden_size})"
        )
    if config.residual_multiplier == 0.0:
        yield "residual_multiplier 0 reads as absent there"


def _nemotron_obstacles(config: ModelConfig) -> Iterator[str]:
    if {"F", "D"} <= set(config.layers):
        yield "layers mix F and D: its Nemotron has experts in every feed-forward or in none"


def _architecture(config: ModelConfig) -> str:
    if family_of(config).name == GRANITE:
        return gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.GRANITE_HYBRID]
    return gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.NEMOTRON_H_MOE if "F" in config.layers else gguf.MODEL_ARCH.NEMOTRON_H]


def _describe(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Keys that both architectures have; sizes of absent sublayers are wanted too."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    # Nemotron's loader asks for this spelling too, though it has RMS norms only.
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_state_size(config.mamba_state)
    writer.add_ssm_group_count(config.mamba_groups)
    # llama.cpp keeps the number of Mamba2's heads where Mamba1 has the rank of dt.
    writer.add_ssm_time_step_rank(config.mamba_heads)
    if "F" in config.layers:
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.top_k)
        writer.add_expert_feed_forward_length(config.expert_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_size)


def _describe_granite(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """A block is a mixer and a feed-forward; one without key-value heads is Mamba."""
    mixers = config.layers[0::2]
    writer.add_block_count(len(mixers))
    writer.add_feed_forward_length(config.expert_size if "F" in config.layers else config.ffn_size)
    writer.add_head_count_kv([config.num_kv_heads if kind == "A" else 0 for kind in mixers])
    writer.add_ssm_inner_size(2 * config.hidden_size)
    writer.add_embedding_scale(config.embedding_multiplier)
    writer.add_attention_scale(config.attention_scale)
    writer.add_residual_scale(config.residual_multiplier)
    writer.add_logit_scale(config.logits_scaling)
    # Here this key says whether attention has rotary positions.
    writer.add_rope_scaling_finetuned(False)


def _describe_nemotron(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """A block is one sublayer: attention has key-value heads, a feed-forward has a width, Mamba neither."""
    width = config.expert_size if "F" in config.layers else config.ffn_size
    writer.add_block_count(len(config.layers))
    writer.add_feed_forward_length([width if kind in "FD" else 0 for kind in config.layers])
    writer.add_head_count_kv([config.num_kv_heads if kind == "A" else 0 for kind in config.layers])
    writer.add_ssm_inner_size(config.mamba_inner)
    if "F" in config.layers:
        writer.add_expert_shared_count(1)
        writer.add_expert_group_count(1)
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(config.router_normalise)
        writer.add_expert_weights_scale(config.router_scale)


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_add_bos_token(vocabulary.adds_bos)
    ids = vocabulary.ids
    writer.add_bos_token_id(ids.bos)
    writer.add_eos_token_id(ids.eos[0])
    # There is room for two ends; llama.cpp finds more by their spelling.
    if len(ids.eos) > 1:
        writer.add_eot_token_id(ids.eos[1])
    if ids.pad is not None:
        writer.add_pad_token_id(ids.pad)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _write_tensors(writer: gguf.GGUFWriter, tensors: list[FileTensor], kind: Numbers) -> None:
    """Announce all tensors, then write one after the other, so that no more than one is converted at a time."""
    numbers = [_numbers(tensor, kind) for tensor in tensors]
    for tensor, stored in zip(tensors, numbers, strict=True):
        shape = tuple(tensor.tensor.shape)
        block, size = gguf.GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), prod(shape) // block * size, stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, stored in zip(tensors, numbers, strict=True):
        array = np.ascontiguousarray(tensor.tensor.float().cpu().numpy())
        _check_range(tensor.name, array, stored)
        writer.write_tensor_data(gguf.quantize(array, stored))


def _check_range(name: str, array: np.ndarray, stored: Numbers) -> None:
    """UserError for numbers that the file could not hold."""
    largest = float(np.abs(array).max())
    if not np.isfinite(largest):
        raise UserError(f"gguf: tensor {name} holds NaN or infinity")
    if stored == Numbers.F16 and largest > float(np.finfo(np.float16).max):
        raise UserError(f"gguf: tensor {name} holds {largest:.3g}, beyond f16; write f32 or bf16")


def _numbers(tensor: FileTensor, kind: Numbers) -> Numbers:
    """How a tensor is stored in a file of a kind."""
    if tensor.exact:
        return Numbers.F32
    return Numbers.F16 if tensor.tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] else kind


def _replace(aside: Path, path: Path) -> None:
    """Put a finished file in its place once it is on the disk."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
