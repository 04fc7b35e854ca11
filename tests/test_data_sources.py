"""Sources, the cache of packages, and shards: what is broken is named in one line, what is there is kept."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import pytest

from turbos.common.errors import UserError
from turbos.data.corpus import build_shards, training_texts, unique
from turbos.data.shards import HEADER_BYTES, ShardReader, write_shard
from turbos.data.sources import documents, local, pieces
from turbos.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["some words to learn from 123"] * 5, vocab_size=304)
TEXTS = [f"document number {number}" for number in range(30)]


def test_named_sources_without_a_package_give_text() -> None:
    assert "def " in "".join(text for text, _ in zip(documents("python"), range(20), strict=False))
    question, steps, answer = next(documents("problems")).splitlines()
    assert steps.endswith(answer) and "?" in question


def test_pieces_lose_nothing_but_blank_edges() -> None:
    lines = [f"line {number}\n" if number % 5 else "\n" for number in range(1, 200)]
    found = list(pieces(lines, characters=50))
    assert "".join(found).replace("\n", "") == "".join(lines).replace("\n", "")
    assert max(map(len, found)) <= 201 and len(found) > 10
    assert max(map(len, pieces(["x" * 10_000], characters=50))) <= 201


def test_local_files(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.txt").write_text("hello\n\nworld\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"content": "two"}\n{"text": " "}\n', encoding="utf-8")
    parquet.write_table(pyarrow.table({"text": ["three", None]}), tmp_path / "c.parquet")
    assert list(documents(str(tmp_path))) == ["hello\n\nworld\n", "one", "two", "three"]
    assert list(documents(str(tmp_path / "b.jsonl"))) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"{", "line 1 is not JSON"),
        ("a.jsonl", b'{"body": "x"}', "line 1 has no text field"),
        ("a.jsonl", b"[1]", "no text field"),
        ("a.txt", b"\xc3(", "not UTF-8"),
        ("a.txt", "text".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("a.txt", "\u6587\u5b57".encode("gb18030"), "not UTF-8"),
        ("a.txt", b"\x1f\x8b\x08", "is gzip"),
        ("a.txt", b"\x7fELF\x01\0\0", "is binary"),
        ("a.jsonl", b"PK\x03\x04", "is zip"),
        ("a.jsonl", b'{"text": "\0"}', "is binary"),
        ("a.parquet", b"PAR1", "not a parquet file"),
        ("a.csv", b"x", "cannot read"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        list(documents(str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello\n")
    assert list(documents(str(tmp_path / "a.txt"))) == ["hello\n"]


def test_a_giant_line_fills_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 8_000_000, encoding="ascii")
    tracemalloc.start()
    found = sum(map(len, documents(str(path))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6, "a line of 40 MB is read in parts"
    assert abs(found - 40_000_000) < 10_000


def test_a_giant_json_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "JSON_LINE_LIMIT", 1000)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x" * 5000}), encoding="ascii")
    with pytest.raises(UserError, match="line 1 has more than 1,000 characters"):
        list(documents(str(tmp_path / "a.jsonl")))


def test_unknown_names_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'english'"):
        documents("englisch")
    with pytest.raises(UserError, match=r"no .txt, .jsonl, .parquet files"):
        documents(str(tmp_path))


def test_missing_optional_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        list(documents("datasets:owner/name"))


def test_shards_give_back_their_documents(tmp_path: Path) -> None:
    info = write_shard(tmp_path / "a.shard", TEXTS, TOKENIZER)
    reader = ShardReader(tmp_path / "a.shard", TOKENIZER)
    reader.verify()
    end = TOKENIZER.special("<|endoftext|>")
    assert [document.tolist() for document in reader.documents()] == [[*TOKENIZER.encode(t), end] for t in TEXTS]
    assert (len(reader), info.text_bytes) == (30, sum(map(len, TEXTS)))
    assert reader.info == info and info.token_bytes == 2


def test_broken_shards_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.shard"
    write_shard(path, TEXTS, TOKENIZER)
    whole = path.read_bytes()
    other = Tokenizer.train(["quite other words"] * 5, vocab_size=304)
    with pytest.raises(UserError, match="another tokenizer"):
        ShardReader(path, other)
    for broken, said in (
        (whole[:-1], "cut off"),
        (whole[:50], "not a shard"),
        (b"", "not a shard"),
        (b"X" * len(whole), "not a shard"),
        (whole + b"\0", "instead of"),
        (whole[:20] + b"\xff" + whole[21:], "damaged header"),
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=said) as error:
            ShardReader(path, TOKENIZER)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[:HEADER_BYTES] + bytes([whole[HEADER_BYTES] ^ 1]) + whole[HEADER_BYTES + 1 :])
    with pytest.raises(UserError, match="checksum"):
        ShardReader(path, TOKENIZER).verify()
    with pytest.raises(UserError, match="no shard at"):
        ShardReader(tmp_path / "b.shard")


def test_an_empty_corpus_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="empty"):
        write_shard(tmp_path / "a.shard", [], TOKENIZER)
    assert not list(tmp_path.iterdir())


def test_corpus_is_split_by_text_and_written_once(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"text": f"text {number % 300}"}) for number in range(400)]
    corpus.write_text("\n".join(rows), encoding="utf-8")
    (shards,) = build_shards([str(corpus)], TOKENIZER, tmp_path / "shards")
    train, held = ShardReader(shards.train, TOKENIZER), ShardReader(shards.held_out, TOKENIZER)
    assert len(train) + len(held) == 300 and len(held) >= 1
    assert not {d.tobytes() for d in train.documents()} & {d.tobytes() for d in held.documents()}
    before = shards.train.stat().st_mtime_ns
    assert build_shards([str(corpus)], TOKENIZER, tmp_path / "shards") == [shards]
    assert shards.train.stat().st_mtime_ns == before
    (small,) = build_shards([str(corpus)], TOKENIZER, tmp_path / "shards", megabytes=0.0005)
    assert small != shards and len(ShardReader(small.train)) < 80


def test_training_texts_are_taken_evenly_and_never_held_out(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": f"text number {n:04d}"}) for n in range(1000)), encoding="utf-8")
    texts = list(training_texts([str(corpus)], characters=1600))
    held_out = {text for text, is_held_out in unique(documents(str(corpus))) if is_held_out}
    assert 90 <= len(texts) <= 110 and not held_out & set(texts)
    assert texts[0] < "text number 0050" and texts[-1] > "text number 0950"


@pytest.mark.parametrize(("content", "said"), [("", "holds no text"), ("only this", "too few")])
def test_tiny_corpora_are_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        build_shards([str(tmp_path / "a.txt")], TOKENIZER, tmp_path)
