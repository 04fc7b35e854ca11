"""The curation run and its command: nothing is lost when it stops, what is broken is named, the report says it all."""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tiny import save_tiny
from turbos.cli.curate import checkpoint_embedding
from turbos.cli.main import main
from turbos.common.errors import UserError
from turbos.data.curate import contamination, pipeline
from turbos.data.curate.classifier import BUCKETS, features, train_classifier
from turbos.data.curate.contamination import EvaluationTexts
from turbos.data.curate.counts import counts_from
from turbos.data.curate.extraction import extracted, markup_of
from turbos.data.curate.labels import UNSURE, Labels, read_labels, write_labels, writing_of
from turbos.data.curate.pipeline import Aids, CurationConfig, batches, curate, read_documents
from turbos.data.curate.report import render_page
from turbos.data.curate.rules import Writing
from turbos.data.curate.semantic import SemanticCopies
from turbos.data.curate.spoil import WAYS, spoilt
from turbos.data.curate.words import scan_texts
from turbos.data.sources import documents

WORDS = [
    f"{start}{end}"
    for start in ("ka", "lo", "mi", "ne", "pu", "ra", "so", "ti")
    for end in ("rn", "st", "le", "nd", "mo")
]


def prose(generator: random.Random, sentences: int = 9) -> str:
    """Sentences of words that mean nothing, all different."""
    made = (" ".join(generator.choices(WORDS, k=generator.randint(6, 14))).capitalize() for _ in range(sentences))
    return ". ".join(made) + ".\n"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of 900 texts, a tenth of them copies, some near, a few with a menu."""
    generator = random.Random(0)
    texts = [prose(generator) for _ in range(800)]
    texts += generator.sample(texts, 60) + ["Kard" + text[4:] for text in generator.sample(texts, 40)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def labels() -> Labels:
    """Classifiers that tell prose of `prose` from code and from spoilt text."""
    generator = random.Random(1)
    good = [prose(generator) for _ in range(60)]
    code = list(islice(documents("python"), 60))
    both = [text.encode() for text in (*good, *code)]
    spoilt_texts = [spoilt(text, WAYS[number % len(WAYS)], generator).encode() for number, text in enumerate(good)]
    kinds = [0] * 60 + [1] * 60
    return Labels(
        train_classifier("bytes", ("en", "code"), both, kinds),
        train_classifier("words", ("tales", "programs"), both, kinds),
        train_classifier("bytes", ("good", "bad"), both[:60] + spoilt_texts, kinds),
        {"language": "2 classes", "topic": "2 classes", "quality": "2 classes", "sources": "python"},
    )


def files_of(folder: Path) -> dict[str, bytes]:
    """Names and contents of a curation's texts."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.jsonl"))}


def unseconded(counts: pipeline.Counts) -> object:
    """Counts without times."""
    plain = counts.plain() | {"seconds": 0}
    return plain | {"stages": [stage | {"seconds": 0} for stage in plain["stages"]]}


class Vanished(Exception):
    """What a source raises that breaks off."""


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(
    corpus: Path, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 20_000)
    monkeypatch.setattr(pipeline, "SHARD_BYTES", 150_000)
    aids, config = Aids(labels, EvaluationTexts([prose(random.Random(5))])), CurationConfig()
    whole = curate([str(corpus)], tmp_path / "whole", config, aids)
    assert len(files_of(tmp_path / "whole")) >= 3
    out = tmp_path / "stopped"
    read = documents

    for stop in (300, 301, 700):

        def broken(name: str, cache: object, stop: int = stop) -> Iterator[str]:
            yield from islice(read(name), stop)
            raise Vanished

        monkeypatch.setattr(pipeline, "documents", broken)
        with pytest.raises(Vanished):
            curate([str(corpus)], out, config, aids)
        assert not out.exists(), "an output is whole or not there"
    # A run that dies in mid-write leaves lines behind its snapshot.
    work = tmp_path / ".stopped.curating"
    shard = max(work.glob("part-*.jsonl"))
    shard.write_bytes(shard.read_bytes() + b'{"text": "torn')
    monkeypatch.setattr(pipeline, "documents", lambda name, cache: read(name))
    resumed = curate([str(corpus)], out, config, aids)
    assert files_of(out) == files_of(tmp_path / "whole") and unseconded(resumed) == unseconded(whole)
    assert not work.exists() and sorted(path.suffix for path in out.iterdir() if path.name[0] != "p") == [".json"]
    assert unseconded(curate([str(corpus)], out, config, aids)) == unseconded(whole), "a finished run is told again"
    assert next(iter(documents(str(out)))).endswith(".\n")


def test_a_changed_source_or_command_is_named(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "BATCH_BYTES", 20_000)
    out, config = tmp_path / "out", CurationConfig()

    def broken(name: str, cache: object) -> Iterator[str]:
        yield from islice(documents(name), 400)
        raise Vanished

    with monkeypatch.context() as patch, pytest.raises(Vanished):
        patch.setattr(pipeline, "documents", broken)
        curate([str(corpus)], out, config, Aids())
    with pytest.raises(UserError, match="another unfinished curation: delete it"):
        curate([str(corpus)], out, CurationConfig(rule_set="web"), Aids())
    text = corpus.read_text(encoding="utf-8")
    corpus.write_text(text.replace("karn", "KARN", 1), encoding="utf-8")
    with pytest.raises(UserError, match="a source changed since this curation was stopped"):
        curate([str(corpus)], out, config, Aids())
    corpus.write_text(text, encoding="utf-8")
    curate([str(corpus)], out, config, Aids())
    with pytest.raises(UserError, match="output of another curation"):
        curate([str(corpus)], out, CurationConfig(min_quality=0.5), Aids())
    with pytest.raises(UserError, match="not empty and no output of curation"):
        curate([str(corpus)], tmp_path, config, Aids())


def test_a_second_process_is_refused(corpus: Path, tmp_path: Path) -> None:
    work = tmp_path / ".out.curating"
    work.mkdir()
    descriptor = os.open(work, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is at work"):
        curate([str(corpus)], tmp_path / "out", CurationConfig(), Aids())
    os.close(descriptor)
    curate([str(corpus)], tmp_path / "out", CurationConfig(), Aids())


def test_a_full_disk_keeps_what_was_saved(corpus: Path, tmp_path: Path) -> None:
    """A real process whose files may not grow beyond 200 kB, then the same command without that limit."""
    command = [sys.executable, "-m", "turbos", "data", "curate", str(corpus), "--out", str(tmp_path / "out")]
    command += ["--labels", "none", "--skip", "contamination", "--json"]
    limits = (200_000, 200_000)
    limited = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    )
    assert limited.returncode == 2 and "File too large" in limited.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, capture_output=True).returncode == 0
    whole = curate([str(corpus)], tmp_path / "whole", CurationConfig(), Aids())
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole") and whole.total.documents_out > 700


def test_batches_do_not_decide_what_comes_out(
    corpus: Path, labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for number, size in enumerate((5_000, 70_000, 1 << 20)):
        monkeypatch.setattr(pipeline, "BATCH_BYTES", size)
        counts.append(unseconded(curate([str(corpus)], tmp_path / str(number), CurationConfig(), Aids(labels))))
    assert counts[0] == counts[1] == counts[2]
    assert files_of(tmp_path / "0") == files_of(tmp_path / "2")


def test_stages_say_what_they_drop_and_why_others_are_out(corpus: Path, tmp_path: Path) -> None:
    counts = curate([str(corpus)], tmp_path / "out", CurationConfig(skip=("blocks",)), Aids())
    stages = {stage.name: stage for stage in counts.stages}
    assert stages["exact"].reasons == {"the same text came before": 60}
    assert stages["near"].dropped >= 36 and "like document" in stages["near"].samples[0].detail
    assert stages["labels"].skipped == stages["quality"].skipped == "no classifiers"
    assert (
        stages["blocks"].skipped == "left out on request" and stages["semantic"].skipped == "no embedding model given"
    )
    for before, after in zip(counts.stages, counts.stages[1:], strict=False):
        assert after.skipped or before.skipped or after.documents_in == before.documents_out
    assert counts_from(json.loads(json.dumps(counts.plain()))) == counts


def test_bad_documents_do_not_stop_a_run(tmp_path: Path) -> None:
    generator = random.Random(3)
    odd = {
        "binary": "\x00\x01\x02PNG" * 50,
        "encoding": prose(generator).replace("e", "\ufffd"),
        "giant": "x" * 3_000_000,
        "giant line": " ".join(prose(generator, 2000).split()),
        "spaces": " \u3000\n\t" * 40,
        "signs": "!?.;" * 300,
        "half tag": "<div><p>" * 4000,
        "deep": "[[" * 5000 + "''' ]]",
        "templates": "{{a|" * 3000 + "[[x]] [[y]] [[z]] '''",
        "entities": "<p>&#xD800;&#0;</p><p>good text here</p><p>x</p>",
    }
    good = [prose(generator) for _ in range(5)]
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in (*odd.values(), *good)), encoding="utf-8")
    counts = curate([str(path)], tmp_path / "out", CurationConfig(), Aids(evaluation=EvaluationTexts(["x y z" * 9])))
    out = list(documents(str(tmp_path / "out")))
    assert set(good) <= set(out)
    reasons = {stage.name: stage.reasons for stage in counts.stages}
    assert reasons["readable"] == {"binary data": 1, "wrong encoding": 1}


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "a.jsonl", "no text in"),
        (b'{"text": "fine"}\n{"te', "a.jsonl", "line 2 is not JSON"),
        (b"caf\xe9 au lait", "a.txt", "not UTF-8"),
        (b"PAR1 and no more", "a.parquet", "not a parquet file"),
    ],
)
def test_broken_sources_are_named(tmp_path: Path, content: bytes, name: str, said: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        curate([str(tmp_path / name)], tmp_path / "out", CurationConfig(), Aids())
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rule_set": "strict"}, "rules are"),
        ({"min_quality": 2.0}, "probability"),
        ({"megabytes": 0.0}, "above 0"),
        ({"skip": ("nears",)}, "no stage 'nears'"),
        ({"languages": ("en",)}, "needs the classifiers"),
    ],
)
def test_wrong_settings_are_named(corpus: Path, tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        curate([str(corpus)], tmp_path / "out", CurationConfig(**settings), Aids())  # type: ignore[arg-type]


def test_sources_are_numbered_and_cut(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name}{n} " * 100}) for n in range(50)))
    names = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    found = list(read_documents(names, megabytes=0.003))
    assert [one.number for one in found] == list(range(len(found))) and 14 <= len(found) <= 22
    assert {one.source for one in found} == set(names)
    assert [one for group in batches(iter(found)) for one in group] == found


def test_languages_that_are_not_asked_for_go(labels: Labels, tmp_path: Path) -> None:
    generator = random.Random(8)
    texts = [prose(generator) for _ in range(20)] + list(islice(documents("python"), 100, 120))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    config = CurationConfig(languages=("en",), rule_set="none")
    counts = curate([str(tmp_path / "a.jsonl")], tmp_path / "out", config, Aids(labels))
    assert counts.languages["en"] == 20 and sum(counts.languages.values()) <= 21
    rows = [json.loads(line) for line in (tmp_path / "out" / "part-00000.jsonl").open(encoding="utf-8")]
    assert rows[0]["language"] == "en" and rows[0]["topic"] == "tales" and 0.5 < rows[0]["quality"] <= 1


def test_labels_come_back_from_their_file(labels: Labels, tmp_path: Path) -> None:
    scan = scan_texts([prose(random.Random(9)).encode(), b"def f(x):\n    return x + 1\n" * 9])
    path = tmp_path / "labels.npz"
    write_labels(path, labels)
    back = read_labels(path)
    assert back.card == labels.card and back.judge(scan).language_N == labels.judge(scan).language_N == ["en", "code"]
    assert np.array_equal(back.judge(scan).quality_N, labels.judge(scan).quality_N)
    assert writing_of(scan, ["en", "code"]).tolist() == [Writing.ALPHABET, Writing.CODE]
    whole = path.read_bytes()
    for broken in (b"", whole[:100], whole[: len(whole) // 2], b"PK" + whole[2:200], whole[:-300] + bytes(300)):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="delete it"):
            read_labels(path)


def test_a_classifier_learns_and_repeats_itself() -> None:
    generator = random.Random(0)
    texts = [
        " ".join(generator.choices(WORDS[:20] if number % 2 else WORDS[20:], k=40)).encode() for number in range(80)
    ]
    first, second = (train_classifier("words", ("a", "b"), texts, [0, 1] * 40, seed=3) for _ in range(2))
    assert np.array_equal(first.weight_BC, second.weight_BC)
    scores = first.scores(scan_texts(texts))
    assert np.allclose(scores.sum(1), 1, atol=1e-5) and (scores.argmax(1) == [0, 1] * 40).all()
    with pytest.raises(ValueError, match="no text for"):
        train_classifier("words", ("a", "b", "c"), texts, [0, 1] * 40)


def test_features_are_bounded_and_taken_from_everywhere() -> None:
    long = scan_texts([b"front " * 500 + b"middle " * 500 + b"ending " * 500, b"abc", b""])
    for kind in ("bytes", "words"):
        places, borders = features(long, kind)
        assert np.diff(borders)[0] <= 3 * 600 and borders[-1] == len(places) and places.max() < BUCKETS[kind]
        parts = [
            set(features(scan_texts([word * 90]), kind)[0].tolist()) for word in (b"front ", b"middle ", b"ending ")
        ]
        assert all(part <= set(places.tolist()) for part in parts)
    assert np.diff(features(long, "bytes")[1]).tolist()[1:] == [0, 0]


def test_probabilities_are_softmax_of_the_mean() -> None:
    texts = [b"one two three", b"four five six seven", b"eight nine"] * 10
    model = train_classifier("bytes", ("a", "b", "c"), texts, [0, 1, 2] * 10)
    scan = scan_texts([b"one five nine ten", b""])
    places, borders = features(scan, "bytes")
    logits = np.stack(
        [
            model.weight_BC[places[: borders[1]]].astype(np.float64).mean(0) + model.bias_C,
            model.bias_C.astype(np.float64),
        ]
    )
    truth = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(model.scores(scan), truth, atol=1e-5)


def test_unlike_anything_is_unsure(labels: Labels) -> None:
    judged = labels.judge(scan_texts([b""]))
    assert judged.topic_N[0] in (UNSURE, "tales", "programs") and len(judged.quality_N) == 1


def test_markup_is_told_from_text_about_markup() -> None:
    assert markup_of("<!DOCTYPE html><html><body><p>One.</p><p>Two.</p></body></html>") == "html"
    assert markup_of("Use <p> for a paragraph and </p> to end it. " * 3 + "and so on, " * 200) == ""
    assert markup_of("a = [[1, 2], [3, 4]]\nb = {{x}}\nc[[0]] = d[[1]]") == ""
    assert markup_of("if a < b:\n    print('</x>')\n" * 30) == ""
    wiki = (
        "'''Ada''' was a [[writer]] of [[London|the capital]] and [[engine]]s.\n"
        "{| class=x\n| cell\n|}\n[[File:a.png|thumb|An [[image]]]]"
    )
    assert markup_of(wiki) == "wiki"
    assert extracted(wiki) == "Ada was a writer of the capital and engines."
    assert extracted("plain") is None
    assert extracted("<div><p></p><p></p><span></span></div>") == ""


def test_every_way_of_spoiling_changes_a_text() -> None:
    text = prose(random.Random(2), 20)
    for way in WAYS:
        assert spoilt(text, way, random.Random(0)) == spoilt(text, way, random.Random(0)) != text
    assert "\ufffd" in spoilt(text, "encoding", random.Random(0))
    assert spoilt("今天天气很好。" * 9, "encoding", random.Random(0)).count("今") == 0
    with pytest.raises(ValueError, match="no way"):
        spoilt(text, "kindly", random.Random(0))


def test_semantic_copies_go_within_and_across_calls(corpus: Path, tmp_path: Path) -> None:
    def embed(texts: list[str]) -> np.ndarray:
        return np.array([[text.lower().count(word) for word in WORDS] for text in texts], np.float32)

    copies = SemanticCopies(embed)
    assert copies.first_seen(["karn lost", "LOST KARN", "mind"]).tolist() == [-1, 0, -1]
    assert copies.first_seen(["mind mind", "sost", "sost sost"]).tolist() == [1, -1, 2]
    with pytest.raises(ValueError, match="shape"):
        SemanticCopies(lambda texts: np.zeros(3)).first_seen(["a"])
    counts = curate([str(corpus)], tmp_path / "out", CurationConfig(skip=("near", "blocks")), Aids(embed=embed))
    semantic = counts.stages[-1]
    assert semantic.name == "semantic" and semantic.dropped >= 38
    assert "like kept document" in semantic.samples[0].detail


def test_a_checkpoint_embeds_without_what_is_common(tmp_path: Path) -> None:
    generator = random.Random(4)
    texts = [prose(generator, 3) for _ in range(12)]
    embed = checkpoint_embedding(str(save_tiny(tmp_path / "model")), texts)
    vectors = embed(texts)
    assert vectors.shape == (12, 32) and np.allclose(vectors.mean(0), 0, atol=1e-5)
    assert np.array_equal(embed(texts[3:5]), vectors[3:5])
    copies = SemanticCopies(embed)
    found = copies.first_seen([texts[0], texts[1], texts[0] + " "])
    assert found.tolist() == [-1, -1, 0]


def test_the_report_shows_all_and_runs_nothing(tmp_path: Path) -> None:
    generator = random.Random(0)
    bad = "<script>alert('x')</script> & more " + "\x00\x01\x02\x03" * 9 + prose(generator)
    texts = [bad] + [prose(generator) for _ in range(10)] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    counts = curate([str(tmp_path / "a.jsonl")], tmp_path / "out", CurationConfig(), Aids())
    page = render_page(counts, ["<b>a</b>"], ["rules & more"])
    assert (
        "<script" not in page
        and "&lt;script&gt;alert" in page
        and "<b>a</b>" not in page
        and "rules &amp; more" in page
    )
    assert not re.search(r"(?:src|href)\s*=", page), "the page needs nothing else"
    for stage in counts.stages:
        assert stage.title in page and (not stage.skipped or stage.skipped in page)
    assert "21" in page and "10 dropped" in page


@pytest.fixture
def _few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two held-out problems of a kind instead of 256, which take seconds to make."""
    make = contamination.held_out_questions
    monkeypatch.setattr(contamination, "held_out_questions", lambda: make(2))


def run_curate(*words: object) -> int:
    return main(["data", "curate", *map(str, words)])


@pytest.mark.usefixtures("_few_questions")
def test_the_command_writes_texts_report_and_figures(
    corpus: Path, labels: Labels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_labels(tmp_path / "labels.npz", labels)
    exam = tmp_path / "exam.txt"
    first = json.loads(corpus.read_text(encoding="utf-8").splitlines()[0])["text"]
    exam.write_text(first, encoding="utf-8")
    out = tmp_path / "clean"
    assert run_curate(corpus, "--out", out, "--labels", tmp_path / "labels.npz", "--eval", exam, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert {path.name for path in out.iterdir()} == {"part-00000.jsonl", "curation.json", "report.html", "funnel.png"}
    assert told["counts"]["stages"][7]["reasons"] == {"holds an evaluation text": 1}
    assert first not in set(documents(str(out)))
    assert (out / "funnel.png").read_bytes()[:4] == b"\x89PNG"
    assert run_curate(corpus, "--out", out, "--labels", tmp_path / "labels.npz", "--eval", exam) == 0
    shown = capsys.readouterr().out
    assert "Near copies" in shown and "MB/s a core over all stages" in shown and str(out / "report.html") in shown


@pytest.mark.usefixtures("_few_questions")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.txt"], "no text source"),
        (["--eval", "nowhere.txt"], "no text source"),
        (["--skip", "everything"], "no stage 'everything'"),
        (["--languages", "xx"], "the classifier knows en, code"),
        (["--labels", "nowhere.npz"], "no file of classifiers"),
        (["--curated", "a.txt", "--labels", "none"], "says nothing"),
        (["--min-quality", "7"], "probability"),
        (["--embed", "nowhere"], "nowhere"),
    ],
)
def test_the_command_names_mistakes(
    corpus: Path, labels: Labels, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    write_labels(tmp_path / "labels.npz", labels)
    given = ["--labels", str(tmp_path / "labels.npz")] if "--labels" not in words else []
    assert run_curate(*([] if words[0] == "nowhere.txt" else [corpus]), *words, "--out", tmp_path / "out", *given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("turbos: error:") and said in error
    assert not (tmp_path / "out").exists()
