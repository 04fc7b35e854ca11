"""Tables in README and docs say what docs/results says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from turbos.bench.rows import Row, rows_object, rows_table
from turbos.bench.tables import (
    BLOCK,
    RESULTS_DIR,
    Result,
    documents,
    main,
    read_result,
    render_table,
    stale_documents,
    write_result,
)
from turbos.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
RESULT = Result(
    name="demo",
    command="make demo",
    commit="0123456789abcdef",
    date="2026-01-31",
    machine="2 cores",
    seeds=(0, 1),
    columns=("family", "accuracy", "note"),
    rows=(("gcd", 81.25, None), ("a|b", 3, "π")),
)
TABLE = (
    "| family | accuracy | note |\n| --- | ---: | --- |\n| gcd | 81.2 |  |\n| a\\|b | 3 | π |\n\n"
    "`make demo`, seeds 0, 1; 2 cores; 2026-01-31, commit 0123456789\n"
)


def test_documents_say_what_the_results_say() -> None:
    assert [path.name for path in documents(ROOT)], "no documents found"
    assert [str(path) for path in stale_documents(ROOT)] == [], "run: python -m turbos.bench.tables --write"


def test_every_marker_opens_a_table() -> None:
    for path in documents(ROOT):
        text = path.read_text(encoding="utf-8")
        assert text.count("\n<!-- results:") == len(BLOCK.findall(text)), path


def test_every_result_is_well_formed() -> None:
    for path in (ROOT / RESULTS_DIR).glob("*.json"):
        read_result(path)


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    assert read_result(write_result(RESULT, tmp_path)) == RESULT
    assert render_table(RESULT) == TABLE


def test_a_stale_table_is_found_and_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_result(RESULT, tmp_path)
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- results:demo -->\nold\n<!-- /results -->\nb\n", encoding="utf-8")
    (tmp_path / "docs" / "more.md").write_text("no table\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert stale_documents(tmp_path) == [readme]
    assert main([]) == 1
    assert main(["--write"]) == 0
    assert readme.read_text(encoding="utf-8") == f"a\n<!-- results:demo -->\n{TABLE}<!-- /results -->\nb\n"
    assert main([]) == 0
    write_result(replace(RESULT, rows=(("gcd", 82.5, None),)), tmp_path)
    assert main([]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "other"}, "must be that of the file"),
        ({"rows": [["gcd"]]}, "1 cells for 3 columns"),
        ({"seeds": None}, "not a result"),
    ],
)
def test_bad_results_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    path = write_result(RESULT, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=words):
        read_result(path)


def test_a_marker_without_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- results:none -->\n<!-- /results -->\n")
    with pytest.raises(UserError, match="no result"):
        stale_documents(tmp_path)


def test_rows_are_tables_with_a_column_for_each_peer() -> None:
    rows = [
        Row("train 2048", 742.0, "tok/s", {"transformers": 1.4}),
        Row("prefill 8192", 1054.0, "tok/s", {"vllm": 2.0}),
    ]
    assert [column.header for column in rows_table(rows).columns][3:] == [
        "times better than transformers",
        "times better than vllm",
    ]
    assert json.loads(json.dumps(rows_object(rows)))["rows"][1]["ratios"] == {"vllm": 2.0}
