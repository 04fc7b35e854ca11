"""Whole checkpoints: tokenizer, token ids, card, hub ids, and the verbs `import` and `export`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from family_cases import stored_tensors
from model_cases import logits_of
from tiny import save_tiny, tiny_model, tiny_tokenizer
from turbos.cli.import_ import rewrite
from turbos.cli.main import main
from turbos.common.config import recipe_hash, save_recipe
from turbos.common.errors import UserError
from turbos.data.problems import make_problem
from turbos.model.card import Card, EvalRow, card_text, set_section
from turbos.model.checkpoint import save_model
from turbos.model.hub import resolve_checkpoint
from turbos.model.package import load_package, write_package
from turbos.model.token_ids import TokenIds, read_token_ids
from turbos.text.foreign import foreign_prompt_ids
from turbos.text.messages import Message
from turbos.text.tokenizer import Tokenizer
from turbos.train.card import run_card
from turbos.train.loop import TrainConfig
from turbos.train.problems import ProblemMix
from turbos.train.sft import SFTRecipe

transformers = pytest.importorskip("transformers")


def saved(path: Path, card: Card | None = None) -> Path:
    """A whole checkpoint of the tiny model."""
    path.mkdir(parents=True)
    write_package(path, tiny_model(), tiny_tokenizer(), card or Card(title="Tiny"))
    return path


def test_a_package_comes_back_whole(tmp_path: Path) -> None:
    package = load_package(saved(tmp_path / "tiny"))
    assert package.family.name == "granitemoehybrid" and package.tokenizer.speaks_chat
    end, document = tiny_tokenizer().special("<|end|>"), tiny_tokenizer().special("<|endoftext|>")
    assert package.token_ids == TokenIds(eos=(end, document), pad=tiny_tokenizer().special("<|pad|>"))
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["eos_token_id"] == [end, document]


def test_transformers_stops_where_we_stop(tmp_path: Path) -> None:
    peer = transformers.AutoModelForCausalLM.from_pretrained(saved(tmp_path / "tiny"))
    assert peer.generation_config.eos_token_id == list(load_package(tmp_path / "tiny").token_ids.eos)
    assert peer.generation_config.do_sample is False
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.eos_token_id in peer.generation_config.eos_token_id
    assert tokenizer("gcd of 12")["input_ids"] == tiny_tokenizer().encode("gcd of 12")


def test_the_card_says_data_recipe_and_figures(tmp_path: Path) -> None:
    rows = (EvalRow("gcd", "solved", "81 %", "turbos eval final"),)
    card = Card("Tiny", "apache-2.0", "runs/before/final", ("problems",), "train:\n  steps: 5\n", "abc123", rows)
    text = card_text(card, tiny_model().config)
    for words in ("license: apache-2.0", "# Tiny", "granitemoehybrid", "- problems", "steps: 5", "`abc123`"):
        assert words in text
    assert "| gcd | solved | 81 % | `turbos eval final` |" in text
    assert "library_name: transformers" in text and "base_model" not in text


def test_a_section_of_the_card_is_replaced_and_the_others_stay(tmp_path: Path) -> None:
    card = saved(tmp_path / "tiny") / "README.md"
    before = card.read_text()
    set_section(card.parent, "Parity", "All equal.")
    assert card.read_text() == before + "\n## Parity\n\nAll equal.\n"
    set_section(card.parent, "Evaluation", "| 1 |")
    set_section(card.parent, "Parity", "All \\1 equal, again.")
    text = card.read_text()
    assert text.count("## Parity") == 1 and "All equal" not in text and "All \\1 equal, again.\n" in text
    assert "Not measured yet" not in text and text.index("## Data") < text.index("| 1 |") < text.index("## Parity")
    set_section(tmp_path, "Parity", "Alone.")
    assert "## Parity\n\nAlone.\n" in (tmp_path / "README.md").read_text()


def test_the_card_of_a_run_carries_its_recipe(tmp_path: Path) -> None:
    recipe = SFTRecipe("owner/base", TrainConfig(steps=3), ProblemMix({"gcd/0": 1.0}))
    save_recipe(recipe, tmp_path / "run")
    card = run_card(tmp_path / "run")
    assert card.recipe_hash == recipe_hash(recipe) and card.base == "owner/base" and "gcd/0" in card.data[0]
    assert "base_model: owner/base" in card_text(card, tiny_model().config)
    assert run_card(tmp_path / "none") == Card(title="none")


def test_a_directory_wins_and_nonsense_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_checkpoint(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve_checkpoint("owner/name") == Path("owner/name")
    (tmp_path / "a_file").write_text("")
    for name in ("nowhere", "a_file", "../nowhere", str(tmp_path / "absent"), "owner/name/more"):
        with pytest.raises(UserError, match="no such directory; name a checkpoint directory, or a hub id"):
            resolve_checkpoint(name)


@pytest.mark.parametrize(
    "words", [["generate", "owner/absent-model", "--prompt", "x"], ["describe", "owner/absent-model"]]
)
def test_without_a_network_a_hub_id_is_one_clear_line(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "owner/absent-model: no such directory, and the Hugging Face hub" in error


def test_a_tokenizer_larger_than_the_embedding_is_named(tmp_path: Path) -> None:
    save_model(tiny_model(), tmp_path)
    Tokenizer.train(["other words entirely, and more of them " * 9], 400).save(tmp_path)
    tokens = Tokenizer.load(tmp_path).vocab_size
    if tokens <= tiny_tokenizer().vocab_size:
        Tokenizer.train([make_problem("gcd", seed, 1).question for seed in range(200)], 400).save(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json: \d+ tokens, but tensor model\.embed_tokens\.weight has 3"):
        load_package(tmp_path)


def test_broken_token_ids_are_named(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(UserError, match=r"generation_config\.json: token ids"):
        read_token_ids(tmp_path)


def test_import_keeps_every_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_tiny(tmp_path / "source")
    peer = transformers.AutoModelForCausalLM.from_pretrained(source).to(torch.bfloat16)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    peer.save_pretrained(theirs, max_shard_size="20KB")
    tiny_tokenizer().save(theirs)
    assert main(["import", str(theirs), "--out", str(ours)]) == 0
    assert capsys.readouterr().out == f"{ours}\n"
    before, after = stored_tensors(theirs), stored_tensors(ours)
    assert before.keys() == after.keys()
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert load_package(ours).tokenizer.fingerprint == tiny_tokenizer().fingerprint
    assert main(["import", str(theirs), "--out", str(tmp_path / "wide"), "--dtype", "float32"]) == 0
    assert {tensor.dtype for tensor in stored_tensors(tmp_path / "wide").values()} == {torch.float32}


def test_import_keeps_how_a_checkpoint_is_sampled(tmp_path: Path) -> None:
    source = saved(tmp_path / "source")
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (source / "generation_config.json").write_text(json.dumps(settings))
    rewrite(str(source), tmp_path / "ours", "keep", hugging_face=False)
    assert json.loads((tmp_path / "ours" / "generation_config.json").read_text()) == settings
    # Where these settings name no end of text, config.json still does.
    assert read_token_ids(tmp_path / "ours") == read_token_ids(source)


def test_import_keeps_float64_and_refuses_what_float16_cannot_hold(tmp_path: Path) -> None:
    model = tiny_model().double()
    with torch.no_grad():
        model.norm_weight[0] = 1e5 + 1e-9
    source = tmp_path / "source"
    source.mkdir()
    write_package(source, model, tiny_tokenizer(), Card())
    rewrite(str(source), tmp_path / "ours", "keep", hugging_face=False)
    before, after = stored_tensors(source), stored_tensors(tmp_path / "ours")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    with pytest.raises(UserError, match=r"tensor model\.norm\.weight holds 1e\+05, beyond torch\.float16"):
        rewrite(str(source), tmp_path / "narrow", "float16", hugging_face=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "source"]


@pytest.mark.parametrize("target", ["hf", "gguf"])
def test_a_link_that_leads_nowhere_is_not_replaced(target: str, tmp_path: Path) -> None:
    source, out = saved(tmp_path / "source"), tmp_path / "out"
    out.symlink_to(tmp_path / "unplugged")
    assert main(["export", str(source), "--to", target, "--out", str(out)]) == 2
    assert out.is_symlink() and sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_export_to_hugging_face_loads_there(tmp_path: Path) -> None:
    source, out = saved(tmp_path / "source", Card("Mine", data=("problems",))), tmp_path / "out"
    assert main(["export", str(source), "--to", "hf", "--out", str(out)]) == 0
    assert (out / "README.md").read_text() == (source / "README.md").read_text()
    peer = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.tensor(tiny_tokenizer().encode("gcd of 12 and 18?"))
    with torch.no_grad():
        theirs = peer(tokens[None], use_cache=False).logits[0]
    ours = logits_of(tiny_model(), tokens, [len(tokens)])
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


def test_export_to_gguf_writes_one_file(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source, out = saved(tmp_path / "source"), tmp_path / "new" / "model.gguf"
    assert main(["export", str(source), "--to", "gguf", "--type", "q8_0", "--out", str(out)]) == 0
    assert out.read_bytes()[:4] == b"GGUF" and [path.name for path in out.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "hf"], "no Hugging Face family expresses this model (llama: layers must be A + D throughout"),
        (["--to", "gguf"], "llama.cpp cannot run this model"),
        (["--to", "hf", "--type", "q8_0"], "--type says nothing with --to hf"),
        (["--to", "gguf", "--dtype", "float32"], "--dtype says nothing with --to gguf"),
    ],
)
def test_export_names_what_the_target_cannot_say(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    source = tmp_path / "source"
    source.mkdir()
    model = tiny_model(layers="MFAD")
    save_model(model, source)
    tiny_tokenizer().save(source)
    assert main(["export", str(source), "--out", str(tmp_path / "out"), *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("words", [["export", "--to", "hf"], ["import"]])
def test_what_is_there_is_never_overwritten(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path / "source")
    (tmp_path / "out").write_text("mine")
    assert main([words[0], str(source), *words[1:], "--out", str(tmp_path / "out")]) == 2
    assert "already there" in capsys.readouterr().err and (tmp_path / "out").read_text() == "mine"


def test_a_half_written_export_never_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = saved(tmp_path / "source"), tmp_path / "out"

    def fails(*_: object, **__: object) -> None:
        assert list(tmp_path.glob(".saving-out/model*.safetensors")), "the weights were being written"
        raise failure

    monkeypatch.setattr("turbos.model.package.write_card", fails)
    failure: BaseException
    for failure in (KeyboardInterrupt(), RuntimeError("a defect")):
        with pytest.raises(type(failure)):
            rewrite(str(source), out, "keep", hugging_face=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    failure = OSError(28, "No space left on device")
    with pytest.raises(UserError, match="No space left"):
        rewrite(str(source), out, "keep", hugging_face=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def foreign_tokenizer(folder: Path) -> Tokenizer:
    """A tokenizer with another chat layout, as somebody else saved it."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer()._backend.to_str().replace("<|user|>", "<|im_start|>"))
    folder.mkdir()
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    template += "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "tokenizer.json").write_text(backend.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return Tokenizer.load(folder)


def test_a_foreign_chat_is_rendered_as_transformers_does(tmp_path: Path) -> None:
    tokenizer = foreign_tokenizer(tmp_path / "foreign")
    assert not tokenizer.speaks_chat
    turns = [Message("user", "gcd of 12?"), Message("assistant", "6"), Message("user", "and 18?\n")]
    peer = transformers.AutoTokenizer.from_pretrained(tmp_path / "foreign")
    theirs = peer.apply_chat_template(
        [{"role": t.role, "content": t.content} for t in turns], add_generation_prompt=True
    )
    assert foreign_prompt_ids(tokenizer, turns) == list(theirs["input_ids"])
    with pytest.raises(UserError, match=r"message 0: the text spells <\|im_start\|>"):
        foreign_prompt_ids(tokenizer, [Message("user", "a <|im_start|> b")])
    with pytest.raises(UserError, match="no tools here"):
        foreign_prompt_ids(tokenizer, [Message("tool", "x")])


def test_files_of_a_foreign_tokenizer_go_with_its_checkpoint(tmp_path: Path) -> None:
    tokenizer = foreign_tokenizer(tmp_path / "foreign")
    out = tmp_path / "out"
    out.mkdir()
    write_package(out, tiny_model(), tokenizer, Card(), token_ids=TokenIds(eos=(6,)))
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "foreign" / "tokenizer.json").read_bytes()
    again = tmp_path / "again"
    again.mkdir()
    package = load_package(out)
    write_package(again, package.model, package.tokenizer, Card())
    assert load_package(again).token_ids == TokenIds(eos=(6,))
