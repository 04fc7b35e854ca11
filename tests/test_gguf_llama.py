"""llama.cpp runs our GGUF files: the same greedy tokens, the same text in tokens, the same chat."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from gguf_cases import CASES, gguf_model
from model_cases import tiny_model
from tiny import tiny_tokenizer
from turbos.cli.main import main
from turbos.common.records import Documents
from turbos.model.card import Card
from turbos.model.generate import generate
from turbos.model.lm import LanguageModel
from turbos.model.package import write_package
from turbos.text.chat import prompt_ids
from turbos.text.messages import Message
from turbos.text.tokenizer import QWEN2_PATTERN, Tokenizer

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

from llama_cpp import LlamaServer
from turbos.model.gguf import write_gguf
from turbos.model.gguf_vocabulary import PRE_TOKENIZERS

STEPS = 24
LENGTHS = (1, 2, 3, 4, 5, 63, 64, 65, 129, 300)
TEXTS = (
    "The quick brown fox isn't what we've wanted; I'LL say it'S fine... (twice)!",
    "def f(x: int) -> str:\n    return f'{x ** 2!r}'  # square\n\n\nclass A:\n\tpass\r\n\r\n",
    "混合专家模型在长文本推理中更快。我们训练了它,它能回答问题吗?「是的」。\u3000全角空格",
    "🙂👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ok",
    "3.14159 12345678 1,000,000 ²³ ⅷ ١٢٣ 一二三 1a2b3c",
    "naïve café Straße ÅΩ e\u0301 ﬁ Ǆ ǅ ʰ ª º don’t “quote” ₹100 €5",
    "日本語テキスト カタカナ 한국어 العربية עברית हिन्दी ไทย 𝒜𝓑 𐍈",
    "  leading and   multiple   spaces  \n \n trailing   ",
    "\u00a0nbsp\u2003em\u200bzw\u0085nel\u2028ls\ufeffbom \x00\x01\x7f",
    "<|user|>no<|end|>",
)


def served(model: LanguageModel, tokenizer: Tokenizer, path: Path, kind: str = "f32") -> LlamaServer:
    """llama.cpp with the model."""
    write_gguf(model, tokenizer, path, kind)
    return LlamaServer(path)


def random_prompt(length: int) -> list[int]:
    """Ids of ordinary tokens."""
    tokenizer = tiny_tokenizer()
    first = len(tokenizer.special_ids)
    generator = torch.Generator().manual_seed(length)
    return torch.randint(first, tokenizer.vocab_size, (length,), generator=generator).tolist()


def our_greedy(model: LanguageModel, prompt: list[int], steps: int) -> list[int]:
    """Our greedy tokens up to an end of text, included, as llama.cpp stops there too."""
    ends = [tiny_tokenizer().special(name) for name in ("<|end|>", "<|endoftext|>")]
    return list(generate(model, [prompt], steps, stop_ids=ends)[0].ids)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_ours(name: str, tmp_path: Path) -> None:
    model = gguf_model(name)
    server = served(model, tiny_tokenizer(), tmp_path / "model.gguf")
    for length in LENGTHS:
        prompt = random_prompt(length)
        assert server.greedy(prompt, STEPS) == our_greedy(model, prompt, STEPS), f"prompt of {length} tokens"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["granite", "nemotron"])
def test_greedy_tokens_are_ours_after_every_prompt_length(name: str, tmp_path: Path) -> None:
    model = gguf_model(name, seed=5)
    server = served(model, tiny_tokenizer(), tmp_path / "model.gguf")
    for length in range(1, 301):
        prompt = random_prompt(length)
        assert server.greedy(prompt, 8) == our_greedy(model, prompt, 8), f"prompt of {length} tokens"


def distance(model: LanguageModel, server: LlamaServer, length: int) -> float:
    """Largest difference of log-probabilities after a prompt."""
    prompt = random_prompt(length)
    with torch.no_grad():
        hidden_TD = model(torch.tensor(prompt), Documents.from_lengths([length])).hidden_TD
        logprobs_V = torch.log_softmax(model.logits(hidden_TD[-1:])[0].double(), -1)
    theirs = server.likeliest(prompt, 40)
    return max(abs(float(logprobs_V[token]) - logprob) for token, logprob in theirs.items())


@pytest.mark.parametrize(
    ("kind", "tolerance"), [("f32", 1e-5), ("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.5), ("q4_0", 5.0)]
)
def test_log_probabilities_are_ours_up_to_the_rounding_of_the_kind(kind: str, tolerance: float, tmp_path: Path) -> None:
    model = gguf_model("granite, wide")
    server = served(model, tiny_tokenizer(), tmp_path / "model.gguf", kind)
    error = max(distance(model, server, length) for length in (1, 7, 100))
    assert error <= tolerance
    # Rounding must show, or the file is not of the kind that it says.
    assert error > tolerance / 1000


@cache
def text_tokenizer() -> Tokenizer:
    """A tokenizer with merges in all of the texts' scripts."""
    return Tokenizer.train(list(TEXTS) * 3, vocab_size=1024)


def with_pattern(pattern: str) -> Tokenizer:
    """The same with another pre-tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), spell])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    backend.train_from_iterator(list(TEXTS) * 3, trainer)
    return Tokenizer(backend)


def shuffled_texts(count: int) -> list[str]:
    """Random strings of the texts' characters and of others from all over Unicode."""
    rng = random.Random(0)
    pool = "".join(TEXTS) + "".join(chr(rng.randrange(0x20, 0x3000)) for _ in range(300))
    return ["".join(rng.choices(pool, k=rng.randrange(1, 60))) for _ in range(count)]


@pytest.mark.parametrize("pre", PRE_TOKENIZERS.values())
def test_text_has_the_same_tokens(pre: str, tmp_path: Path) -> None:
    pattern = next(pattern for pattern, name in PRE_TOKENIZERS.items() if name == pre)
    tokenizer = text_tokenizer() if pattern == QWEN2_PATTERN else with_pattern(pattern)
    model = tiny_model(vocab_size=1024, **CASES["granite"])
    server = served(model, tokenizer, tmp_path / "model.gguf")
    for text in (*TEXTS, *shuffled_texts(200)):
        assert server.tokenize(text) == tokenizer.encode(text), repr(text)


def test_chats_are_rendered_from_the_file_as_we_render_them(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    server = served(gguf_model("granite"), tokenizer, tmp_path / "model.gguf")
    turns = [{"role": "user", "content": "12 add 18?"}]
    asked = {"messages": turns, "chat_template_kwargs": {"thinking": "auto"}}
    text = server.post("/apply-template", asked)["prompt"]
    ours = prompt_ids(tokenizer, [Message("user", "12 add 18?")])
    assert text == tokenizer.decode(ours)
    parsed = server.post("/tokenize", {"content": text, "add_special": True, "parse_special": True})["tokens"]
    assert parsed == ours


def test_an_exported_checkpoint_answers_as_the_checkpoint_does(tmp_path: Path) -> None:
    model = gguf_model("nemotron")
    (tmp_path / "checkpoint").mkdir()
    write_package(tmp_path / "checkpoint", model, tiny_tokenizer(), Card(title="Tiny"))
    out = tmp_path / "out" / "model.gguf"
    assert main(["export", str(tmp_path / "checkpoint"), "--to", "gguf", "--out", str(out)]) == 0
    server, prompt = LlamaServer(out), random_prompt(20)
    assert server.greedy(prompt, STEPS) == our_greedy(model, prompt, STEPS)
