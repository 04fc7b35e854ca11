"""GGUF files: what stands in them, what is refused, and that nothing half-written remains. No llama.cpp here."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from gguf_cases import CASES, gguf_model
from model_cases import tiny_config
from tiny import tiny_tokenizer
from turbos.common.errors import UserError
from turbos.model.lm import LanguageModel
from turbos.model.token_ids import TokenIds
from turbos.text.tokenizer import QWEN2_PATTERN, Tokenizer

gguf = pytest.importorskip("gguf")

from turbos.model.gguf import KINDS, gguf_obstacles, write_gguf  # noqa: E402
from turbos.model.gguf_vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary  # noqa: E402

EXACT = {
    *("output_norm.weight", "attn_norm.weight", "ffn_norm.weight", "ffn_gate_inp.weight", "ssm_norm.weight"),
    *("ssm_a", "ssm_d", "ssm_dt.bias", "ssm_conv1d.weight", "ssm_conv1d.bias"),
}
"""What a Granite file holds in fp32 whatever its kind."""

HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as fp32, by name."""
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).copy() for tensor in tensors}


def stored_numbers(path: Path) -> dict[str, str]:
    """How each tensor of a file is stored."""
    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_stored_as_asked_and_the_rest_exactly(kind: str, tmp_path: Path) -> None:
    model = gguf_model("granite, wide")
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", kind)
    tensors, numbers = read_tensors(tmp_path / "model.gguf"), stored_numbers(tmp_path / "model.gguf")
    matrices = {name for name, stored in numbers.items() if stored == kind.upper()}
    exact = {re.sub(r"blk\.\d+\.", "", name) for name in set(numbers) - matrices}
    assert exact == (EXACT if kind != "f32" else set())
    assert all(numbers[name] == "F32" for name in set(numbers) - matrices)
    q_proj = model.sublayers[2].mixer.q_proj.weight.detach()
    found = torch.from_numpy(tensors["blk.1.attn_q.weight"])
    if kind == "q8_0":
        # Half a step by rounding to a step; the step itself is an f16, so that 127 of them are wrong by 0.062 steps.
        steps = q_proj.view(-1, 32).abs().amax(-1, keepdim=True) / 127
        assert bool(((found - q_proj).view(-1, 32).abs() <= 0.563 * steps).all())
    elif kind == "q4_0":
        # Sixteen steps from the block's largest number, which lies at -8: one of the other sign is cut at 7.
        steps = q_proj.view(-1, 32).abs().amax(-1, keepdim=True) / 8
        assert bool(((found - q_proj).view(-1, 32).abs() <= 1.01 * steps).all())
        assert float(((found - q_proj).view(-1, 32).abs() / steps).median()) < 0.3
    else:
        assert torch.equal(found, q_proj.to(HALF.get(kind, torch.float32)).float())
    router = model.sublayers[1].mixer.router_weight.detach()
    assert torch.equal(torch.from_numpy(tensors["blk.0.ffn_gate_inp.weight"]), router)


def test_rows_that_q8_0_cannot_hold_are_stored_as_f16(tmp_path: Path) -> None:
    write_gguf(gguf_model("granite"), tiny_tokenizer(), tmp_path / "model.gguf", "q8_0")
    numbers = stored_numbers(tmp_path / "model.gguf")
    assert numbers["blk.0.ssm_in.weight"] == "F16" and numbers["output_norm.weight"] == "F32"


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_the_model_is_in_the_file(name: str, tmp_path: Path) -> None:
    model = gguf_model(name)
    write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "f32")
    count = sum(tensor.size for tensor in read_tensors(tmp_path / "model.gguf").values())
    assert count == sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"layers": "MFAF", "rope_theta": 10000.0}, "rope_theta"),
        ({"layers": "MFAF", "mamba_head_dim": 3}, "mamba_heads"),
        ({"layers": "MFAF", "residual_multiplier": 0.0}, "residual_multiplier"),
        ({"layers": "MFAF", "vocab_size": 314}, "vocab_size"),
        ({"layers": "MFMF"}, "layers"),
        ({"layers": "AFAF"}, "layers"),
        ({"layers": "MDAD" * 257}, "layers"),
        ({"layers": "MFAF", "qk_norm": True}, "turbos"),
        ({"layers": "MFA"}, "turbos"),
        ({"layers": "ADAD", "rope_theta": 10000.0}, "llama"),
        ({**CASES["nemotron"], "layers": "MFAD"}, "layers mix"),
        ({**CASES["nemotron"], "tied": True}, "turbos"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused_by_name(changes: dict[str, object], option: str, tmp_path: Path) -> None:
    granite = {**CASES["granite"], "vocab_size": tiny_tokenizer().vocab_size}
    config = tiny_config(**{**granite, **changes})
    assert option in next(gguf_obstacles(config))
    with torch.device("meta"):
        model = LanguageModel(config)
    with pytest.raises(UserError, match=option):
        write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="q5_1"):
        write_gguf(gguf_model("granite"), tiny_tokenizer(), tmp_path / "model.gguf", "q5_1")


@pytest.mark.parametrize(
    ("value", "kind", "complaint"), [(torch.nan, "f32", "NaN"), (1e6, "f16", "beyond f16"), (torch.inf, "q8_0", "inf")]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    value: float, kind: str, complaint: str, tmp_path: Path
) -> None:
    model, path = gguf_model("granite"), tmp_path / "model.gguf"
    path.write_bytes(b"old")
    with torch.no_grad():
        model.sublayers[-1].mixer.w_out[0, 0, 0] = value
    with pytest.raises(UserError, match=f"ffn_down_exps.*{complaint}"):
        write_gguf(model, tiny_tokenizer(), path, kind)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_the_users_to_mend_and_leaves_nothing(tmp_path: Path) -> None:
    model, limits = gguf_model("granite"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot save"):
            write_gguf(model, tiny_tokenizer(), tmp_path / "model.gguf", "f32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_fills_the_embedding_and_tells_tokens_apart() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = read_vocabulary(tokenizer, tokenizer.vocab_size + 8)
    types = dict(zip(vocabulary.tokens, vocabulary.types, strict=True))
    assert (types["<|user|>"], types["<think>"], types["a"]) == (CONTROL, USER_DEFINED, NORMAL)
    assert vocabulary.types[-8:] == (UNUSED,) * 8 and len(set(vocabulary.tokens)) == len(vocabulary.tokens)
    assert vocabulary.ids.eos[0] == tokenizer.special("<|end|>") and vocabulary.ids.pad == tokenizer.special("<|pad|>")
    assert vocabulary.chat_template == tokenizer.chat_template and not vocabulary.adds_bos
    assert read_vocabulary(tokenizer, tokenizer.vocab_size, TokenIds(eos=(9,))).ids.eos == (9,)


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(UserError, match="vocab_size 304"):
        read_vocabulary(tiny_tokenizer(), 304)


def trained(pattern: str = QWEN2_PATTERN, **options: object) -> tokenizers.Tokenizer:
    """A small byte-level BPE of another make."""
    backend = tokenizers.Tokenizer(models.BPE(**options))
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), spell])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["</s>"], show_progress=False
    )
    backend.train_from_iterator(["ab ab 12 abc 123"] * 3, trainer)
    return backend


def foreign(backend: tokenizers.Tokenizer, directory: Path, **settings: object) -> Tokenizer:
    """A tokenizer read from files that are not ours."""
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Tokenizer.load(directory)


def test_a_foreign_tokenizer_brings_its_own_ends_and_template(tmp_path: Path) -> None:
    settings = {"eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}", "add_bos_token": True}
    vocabulary = read_vocabulary(foreign(trained(), tmp_path, **settings), 320)
    assert vocabulary.ids == TokenIds(0, (0,), None)
    assert (vocabulary.pre, vocabulary.chat_template, vocabulary.adds_bos) == ("qwen2", "{{ messages }}", True)


@pytest.mark.parametrize("fault", ["pattern", "normalizer", "ignore_merges", "no end"])
def test_what_llama_cpp_would_tokenise_otherwise_is_refused(fault: str, tmp_path: Path) -> None:
    backend = trained(r"\w+|\s+" if fault == "pattern" else QWEN2_PATTERN)
    if fault == "normalizer":
        backend.normalizer = normalizers.NFC()
    if fault == "ignore_merges":
        backend.model.ignore_merges = True
    settings = {} if fault == "no end" else {"eos_token": "</s>"}
    named = {"pattern": "pre_tokenizer", "normalizer": "NFC", "no end": "eos_token"}
    with pytest.raises(UserError, match=named.get(fault, fault)):
        read_vocabulary(foreign(backend, tmp_path, **settings), 320)
