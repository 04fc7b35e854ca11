"""The three Hugging Face families beside transformers: logits, gradients, greedy tokens and files, both ways.

Each family on a dozen random configurations. What is refused and what is kept in config.json is in test_families.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from family_cases import (
    FAMILIES,
    assert_close,
    file_gradients,
    peer_gradients,
    peer_logits,
    prompts,
    random_config,
    shake,
    stored_tensors,
)
from model_cases import logits_of, random_tokens, tiny_model
from turbos.model.checkpoint import load_model, read_family, save_model, stored_dtypes
from turbos.model.generate import generate
from turbos.model.lm import LanguageModel

transformers = pytest.importorskip("transformers")

CASES = [(family, seed) for family in FAMILIES for seed in range(12)]
TOKENS = 45


def our_model(family: str, seed: int) -> LanguageModel:
    """A random model of a random configuration of the family."""
    config = random_config(family, seed)
    return tiny_model(seed=seed, **{name: getattr(config, name) for name in vars(config)})


def load_peer(directory: Path, dtype: torch.dtype | str = torch.float32):  # type: ignore[no-untyped-def]
    """What transformers makes of a directory, without remote code (`grouped_mm` refuses sizes this odd)."""
    options = {"dtype": dtype, "trust_remote_code": False, "experts_implementation": "eager"}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_our_files_give_the_same_logits_there(family: str, seed: int, tmp_path: Path) -> None:
    model = our_model(family, seed)
    save_model(model, tmp_path)
    peer = load_peer(tmp_path)
    assert peer.config.model_type == family
    tokens = random_tokens(TOKENS, seed)
    assert_close(logits_of(model, tokens, [TOKENS]), peer_logits(peer, tokens))


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_gradients_of_a_training_loss_are_the_same(family: str, seed: int, tmp_path: Path) -> None:
    model = our_model(family, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Steps of the training init: a scan that forgets at once leaves its decays no gradient worth comparing.
            parameter -= 2.0 if name.endswith("dt_bias") else 0.0
    save_model(model, tmp_path)
    tokens = random_tokens(TOKENS, seed)
    ours = file_gradients(model, tokens)
    theirs = peer_gradients(load_peer(tmp_path), tokens, tmp_path / "gradients")
    assert ours.keys() == {name for name in theirs if "e_score" not in name}
    largest = max(float(gradient.abs().max()) for gradient in theirs.values())
    for name, gradient in ours.items():
        bound = 1e-4 * max(float(theirs[name].abs().max()), 1e-3 * largest)
        assert float((gradient - theirs[name]).abs().max()) <= bound, name


@pytest.mark.parametrize(("family", "seed"), CASES)
def test_their_files_load_here_and_are_written_back_to_the_bit(family: str, seed: int, tmp_path: Path) -> None:
    save_model(our_model(family, seed), tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(seed)
    peer = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(peer, seed)
    theirs = tmp_path / "theirs"
    dtype = torch.bfloat16 if seed % 2 else torch.float32
    peer.to(dtype).save_pretrained(theirs, max_shard_size="8KB" if seed % 3 == 0 else "5GB")
    model = load_model(theirs)
    tokens = random_tokens(TOKENS, seed)
    assert_close(logits_of(model, tokens, [TOKENS]), peer_logits(load_peer(theirs), tokens))
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, again, family=read_family(theirs)[0], dtypes=stored_dtypes(theirs), shard_bytes=10_000)
    before, after = stored_tensors(theirs), stored_tensors(again)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == dtype and torch.equal(tensor, after[name]), name
    assert_close(peer_logits(load_peer(again), tokens), peer_logits(load_peer(theirs), tokens), 0.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [1, 2])
def test_greedy_tokens_are_the_same(family: str, seed: int, tmp_path: Path) -> None:
    model = our_model(family, seed)
    save_model(model, tmp_path)
    peer = load_peer(tmp_path)
    for length in (7, 30):
        some = prompts(4, length)
        with torch.no_grad():
            theirs = peer.generate(
                torch.tensor(some),
                attention_mask=torch.ones(4, length, dtype=torch.int64),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=None,
            )
        ours = [list(completion.ids) for completion in generate(model, some, 64)]
        assert ours == theirs[:, length:].tolist()
