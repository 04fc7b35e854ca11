"""llama.cpp and vLLM beside the certificate: what they tell of our files, what is left out, and why they fail."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import save_tiny
from turbos.model.lm import LanguageModel
from turbos.text.tokenizer import Tokenizer
from turbos.verify import servers
from turbos.verify.certificate import subject_of
from turbos.verify.implementation import OurModel
from turbos.verify.report import Check
from turbos.verify.subject import Subject
from verify_cases import certificate, check_named, saved

ROW = "export == native (llama.cpp)"


def subject_in(directory: Path, tmp_path: Path) -> tuple[Subject, OurModel]:
    """A checkpoint ready to be checked, with a scratch directory."""
    from turbos.model.checkpoint import load_model, read_family

    ours = OurModel(load_model(directory), read_family(directory)[0])
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return subject_of(directory, scratch, ours, True, "turbos"), ours


def test_llama_cpp_tells_the_same(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    check = check_named(certificate(save_tiny(tmp_path / "model")), ROW)
    assert check.ok, check.where
    assert 0 < check.error < check.tolerance / 3 and "greedy tokens after 4 prompts" in check.note


def test_a_wrong_gguf_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    gguf = pytest.importorskip("turbos.model.gguf")
    plain = gguf.write_gguf

    def write_without_D(model: LanguageModel, tokenizer: Tokenizer, path: Path, kind: str) -> None:
        wrong = LanguageModel(model.config)
        wrong.load_state_dict(model.state_dict())
        with torch.no_grad():
            wrong.sublayers[0].mixer.D.zero_()
        plain(wrong, tokenizer, path, kind)

    monkeypatch.setattr(gguf, "write_gguf", write_without_D)
    subject, ours = subject_in(save_tiny(tmp_path / "model"), tmp_path)
    check = servers.llama_cpp_is_native(subject, ours)
    assert not check.ok and check.error > check.tolerance and "there and" in check.where and "document" in check.where


def answered(monkeypatch: pytest.MonkeyPatch, ours: OurModel, change: Any) -> None:
    """Let a program tell what our own model says, changed."""

    def ask(program: str, path: Path, asked: dict[str, Any], folder: Path) -> tuple[list[Any], str]:
        told = []
        for prompt in asked["prompts"]:
            (logits,) = [ours.read([torch.tensor(prompt)], None)[servers.LOGITS][-1]]
            top = torch.log_softmax(logits.double(), -1).topk(3)
            answer = {"tokens": [int(top.indices[0])], "likeliest": []}
            answer["likeliest"] = [[int(i), float(p)] for i, p in zip(top.indices, top.values, strict=True)]
            told.append(change(answer))
        return told, ""

    monkeypatch.setattr(servers, "ask", ask)


def check_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> Check:
    subject, ours = subject_in(save_tiny(tmp_path / "model"), tmp_path)
    answered(monkeypatch, ours, change)
    return servers.told_is_ours(subject, ours, "vllm", subject.directory, 320)


def test_what_is_told_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_told(tmp_path, monkeypatch, lambda answer: answer)
    assert check.ok and check.error < 1e-6 and check.where == ""


def test_a_wrong_probability_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(answer: dict[str, Any]) -> dict[str, Any]:
        token, logprob = answer["likeliest"][1]
        return {**answer, "likeliest": [answer["likeliest"][0], [token, logprob + 0.5]]}

    check = check_told(tmp_path, monkeypatch, shifted)
    assert not check.ok and "has log-probability" in check.where


def test_another_greedy_token_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_told(
        tmp_path, monkeypatch, lambda answer: {**answer, "tokens": [(answer["tokens"][0] + 1) % 320], "likeliest": []}
    )
    assert not check.ok and "step 0 chose token" in check.where and "nats apart" in check.where


def test_a_program_that_ends_badly_has_failed(tmp_path: Path) -> None:
    nowhere = tmp_path / "missing.gguf"
    told, complaint = servers.ask("nothing", nowhere, {"prompts": [[1]], "steps": 1}, tmp_path)
    assert told == [] and complaint.startswith("nothing ended with code 1: KeyError")


def test_what_cannot_be_asked_is_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    subject, ours = subject_in(save_tiny(tmp_path / "model"), tmp_path)
    rows, left_out = servers.server_rows(subject, ours)
    assert rows == [] and left_out == [
        "native (llama.cpp): not installed (pip install xllamacpp gguf)",
        "native (vllm): not installed",
    ]


def test_a_model_that_llama_cpp_cannot_run_says_why(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("gguf")
    subject, _ = subject_in(saved(tmp_path / "model", "granite dense"), tmp_path)
    assert "rope_theta" in servers.llama_cpp_obstacle(subject) or "vocab_size" in servers.llama_cpp_obstacle(subject)
    (tmp_path / "other").mkdir()
    bare = save_tiny(tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    subject, _ = subject_in(bare, tmp_path / "other")
    assert "tokenizer.json" in servers.llama_cpp_obstacle(subject)
