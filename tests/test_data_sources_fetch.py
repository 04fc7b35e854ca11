"""Fetching with the real pip, npm and apt-get from an index on this machine: whole, once, or refused."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from package_index import PackageIndex
from turbos.cli.main import main
from turbos.common.errors import UserError
from turbos.data.clients import Unavailable, bytes_below, first_error
from turbos.data.fetch import Package, cache_directory, fetch_package, file_sha256
from turbos.data.sources import GROUPS, SOURCES, Source, catalogue, documents, expand, fetch, outcomes

CHANNELS = ("pip", "npm", "apt")
PROGRAMS = {"pip": sys.executable, "npm": "npm", "apt": "apt-get"}
TEXT = os.urandom(200_000).hex().encode()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PackageIndex]:
    with PackageIndex() as one:
        for key, value in one.environment(tmp_path / "clients").items():
            monkeypatch.setenv(key, value)
        yield one


def add(index: PackageIndex, channel: str, project: str = "demo", version: str = "1.0.0") -> Package:
    """A package with text for the channel; skips where this machine lacks the channel's client."""
    if shutil.which(PROGRAMS[channel]) is None:
        pytest.skip(f"{PROGRAMS[channel]} is not on this machine")
    package = getattr(index, {"pip": "add_wheel", "npm": "add_npm", "apt": "add_deb"}[channel])(
        project, version, {"a.txt": TEXT}
    )
    if channel == "apt":
        update_apt()
    return package


def update_apt() -> None:
    done = subprocess.run(["apt-get", "update", "-qq"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def fails(package: Package, cache: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        fetch_package(package, cache)
    assert "\n" not in str(error.value)
    assert not list(cache.iterdir()), "nothing half done is left"


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_package_is_fetched_whole_and_once(index: PackageIndex, tmp_path: Path, channel: str) -> None:
    package = add(index, channel)
    sizes: list[int] = []
    index.seconds = 0.7
    path = fetch_package(package, tmp_path / "cache", watch=sizes.append)
    assert path.name == package.filename and file_sha256(path) == package.sha256
    assert sizes and max(sizes) > 0, "the watcher sees it come"
    assert [one.name for one in (tmp_path / "cache").iterdir()] == [package.filename]
    count = len(index.served)
    assert fetch_package(package, tmp_path / "cache") == path and len(index.served) == count
    path.write_bytes(path.read_bytes()[:-1])
    assert file_sha256(fetch_package(package, tmp_path / "cache")) == package.sha256, "a cut file is fetched again"


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_source_that_vanishes_in_mid_download_is_one_line(index: PackageIndex, tmp_path: Path, channel: str) -> None:
    package = add(index, channel)
    index.vanishes = True
    fails(package, tmp_path / "cache", "cannot fetch demo 1.0.0")
    index.vanishes = False
    assert fetch_package(package, tmp_path / "cache").is_file(), "the same call goes on"


@pytest.mark.parametrize("channel", CHANNELS)
def test_other_bytes_than_the_pinned_ones_are_refused(index: PackageIndex, tmp_path: Path, channel: str) -> None:
    fails(replace(add(index, channel), sha256="0" * 64), tmp_path / "cache", "pinned is 000000000000")


@pytest.mark.parametrize("channel", ("pip", "npm"))
def test_an_unknown_project_is_one_line(index: PackageIndex, tmp_path: Path, channel: str) -> None:
    package = replace(add(index, channel), project="elsewhere", filename="elsewhere-1.0.0.tgz")
    fails(package, tmp_path / "cache", "cannot fetch elsewhere 1.0.0")


def test_apt_without_the_package_is_skipped(index: PackageIndex, tmp_path: Path) -> None:
    package = replace(add(index, "apt"), project="elsewhere")
    with pytest.raises(Unavailable, match="apt here has no package elsewhere"):
        fetch_package(package, tmp_path / "cache")


def test_a_changed_debian_version_is_taken_and_said(index: PackageIndex, tmp_path: Path) -> None:
    pinned = add(index, "apt")
    other = add(index, "apt", version="1.1.0")
    told: list[str] = []
    path = fetch_package(pinned, tmp_path / "cache", told.append)
    assert path.name == other.filename and file_sha256(path) == other.sha256
    assert len(told) == 1 and "no longer has version 1.0.0" in told[0]
    count = len(index.served)
    assert fetch_package(pinned, tmp_path / "cache", told.append) == path and len(index.served) == count
    path.write_bytes(b"!<arch>\n")
    assert file_sha256(fetch_package(pinned, tmp_path / "cache", told.append)) == other.sha256, "damage is seen"


@pytest.mark.parametrize("channel", ("npm", "apt"))
def test_a_missing_client_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channel: str) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    package = Package("demo", "1.0", "demo", "0" * 64, 1.0, channel)  # type: ignore[arg-type]
    with pytest.raises(Unavailable, match=f"{PROGRAMS[channel]} is not on this machine"):
        fetch_package(package, tmp_path / "cache")


def named(monkeypatch: pytest.MonkeyPatch, sources: list[Source]) -> None:
    """Let these be all named sources."""
    for module in (catalogue, outcomes):
        monkeypatch.setattr(module, "SOURCES", {source.name: source for source in sources})
    monkeypatch.setitem(SOURCES, "english", sources[0])
    for source in sources:
        monkeypatch.setitem(SOURCES, source.name, source)


def source_of(name: str, package: Package) -> Source:
    return Source(name, "a test", "en", "none", package, lambda path: iter([path.name if path else ""]))


def test_one_broken_source_does_not_stop_the_others(
    index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = add(index, "pip"), replace(add(index, "pip", "other"), sha256="0" * 64)
    absent = Package("demo", "1.0", "demo.deb", "0" * 64, 1.0, "apt")
    named(monkeypatch, [source_of("one", broken), source_of("two", absent), source_of("three", whole)])
    monkeypatch.setenv("PATH", str(tmp_path))
    words = ["data", "fetch", "one", "two", "three", "--cache", str(tmp_path / "cache")]
    assert main([*words, "--dry-run"]) == 0 and not index.served
    assert "3 packages to fetch" in capsys.readouterr().out
    assert main(words) == 2
    shown = capsys.readouterr()
    assert "one: failed: other-1.0.0-py3-none-any.whl has sha256" in shown.out
    assert "two: skipped: apt-get is not on this machine" in shown.out
    assert "three: fetched" in shown.out and "1 of 3 sources failed" in shown.err
    assert len(shown.err.splitlines()) == 1, "no bar outside of a terminal"
    assert main([*words[:2], "two", "three", *words[-2:]]) == 0
    assert "1 skipped; 1 in the cache" in capsys.readouterr().out
    assert main(["data", "show", "three", "--samples", "1", *words[-2:]]) == 0
    assert "measured          1 documents, 1 distinct, 0.00 MB" in (out := capsys.readouterr().out)
    assert out.rstrip().endswith(whole.filename)


FETCH = """
import sys
from pathlib import Path
from turbos.common.errors import UserError
from turbos.data.fetch import Package, fetch_package
try:
    print(fetch_package(Package(*sys.argv[2:6], float(sys.argv[6]), sys.argv[7]), Path(sys.argv[1])))
except UserError as error:
    sys.exit(str(error))
"""


def fetching(package: Package, cache: Path, limit: int | None = None) -> subprocess.Popen[str]:
    """Another process that fetches the package; it may write no file of more than `limit` bytes."""
    fields = (package.project, package.version, package.filename, package.sha256)
    command = [sys.executable, "-c", FETCH, str(cache), *fields, str(package.megabytes), package.channel]

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
        start_new_session=True,
    )


@pytest.mark.parametrize("channel", CHANNELS)
def test_a_disk_that_is_full_is_one_line(index: PackageIndex, tmp_path: Path, channel: str) -> None:
    package = add(index, channel)
    process = fetching(package, tmp_path / "cache", limit=100_000)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.count("\n") == 1, errors
    assert "cannot fetch demo 1.0.0" in errors
    assert not list((tmp_path / "cache").iterdir())


def test_a_disk_without_room_is_seen_beforehand(
    index: PackageIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = replace(add(index, "pip"), megabytes=shutil.disk_usage(tmp_path).free / 1e6)
    fails(package, tmp_path / "cache", "free some, or set TURBOS_CACHE")
    assert not index.served


def test_two_runs_fetch_once(index: PackageIndex, tmp_path: Path) -> None:
    package = add(index, "pip")
    index.seconds = 2.0
    processes = [fetching(package, tmp_path / "cache") for _ in range(2)]
    ends = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    assert len(index.served) == 1 and ends[0][0] == ends[1][0]
    assert "another run is fetching" in "".join(errors for _, errors in ends)


def test_a_killed_run_leaves_nothing_in_the_way(index: PackageIndex, tmp_path: Path) -> None:
    package = add(index, "pip")
    cache = tmp_path / "cache"
    index.seconds = 30.0
    process = fetching(package, cache)
    deadline = time.monotonic() + 30
    while not index.served and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=30)
    assert [path.name[:10] for path in cache.iterdir()] == [".fetching-"]
    index.seconds = 0.0
    assert fetch_package(package, cache).is_file()
    assert [path.name for path in cache.iterdir()] == [package.filename]


def test_messages_of_clients_are_cut_to_one_line() -> None:
    npm = "npm error code E404\nnpm error 404 Not Found - GET x\nnpm error A complete log of this run\n"
    assert first_error("npm", npm) == "npm error 404 Not Found - GET x"
    assert first_error("pip", "noise\nERROR: first\nERROR: last\n") == "ERROR: last"
    assert first_error("apt", "") == "no message"
    assert bytes_below(Path("nowhere at all")) == 0


def test_cards_are_whole_and_defaults_are_free() -> None:
    for source in SOURCES.values():
        assert source.licence and source.what and set(source.language.split(", ")) <= {"en", "zh", "code"}
        if source.package is not None:
            assert len(source.package.sha256) == 64 and source.package.version in source.package.filename.replace(
                "%3a", ":"
            )
            assert source.documents and source.megabytes and source.download_megabytes > 0
    unclear = {name for name, source in SOURCES.items() if not source.rights_are_clear}
    assert unclear == {"nlp-corpus", "chinese-news", "chinese-reviews"}
    for group in GROUPS.values():
        assert not unclear & set(group.sources) and set(group.sources) <= set(SOURCES)
    assert set(GROUPS["default"].sources) == set(SOURCES) - unclear
    assert expand(["code", "default", "python"])[:2] == ["python", "packages"]


def test_caps_hold() -> None:
    for name, low, high in (("gcide", 10, 15), ("wordnet", 10, 15), ("classical-chinese", 12, 20)):
        assert low <= (SOURCES[name].megabytes or 0) <= high


def test_show_lists_all_and_names_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["data", "show", "--cache", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    packages = {source.package for source in SOURCES.values()} - {None}
    assert all(name in shown for name in (*SOURCES, *GROUPS)) and f"{len(packages)} packages to fetch" in shown
    assert main(["data", "fetch", "wordnett"]) == 2
    assert "did you mean 'wordnet'" in capsys.readouterr().err
    assert main(["data", "show", str(tmp_path / "none.txt")]) == 2
    assert main(["data", "show", "problems", "--samples", "-1"]) == 2
    assert "--samples must be" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("\x1b[2Jhello\n", encoding="utf-8")
    assert main(["data", "show", str(tmp_path / "a.txt")]) == 0
    assert "·[2Jhello" in capsys.readouterr().out, "a text can be seen, it cannot command the terminal"


def test_groups_are_read_and_fetched_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made.whl"
    made.write_bytes(b"x")
    package = Package("demo", "1.0", made.name, hashlib.sha256(b"x").hexdigest(), 0.1)
    for name in GROUPS["bilingual"].sources:
        monkeypatch.setitem(SOURCES, name, source_of(name, package))
    assert list(documents("bilingual", tmp_path)) == [made.name] * 2
    assert fetch(["bilingual", "chat", str(tmp_path)], tmp_path) == [made]


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURBOS_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path and cache_directory(tmp_path / "x") == tmp_path / "x"
    monkeypatch.delenv("TURBOS_CACHE")
    assert cache_directory().parts[-2:] == (".cache", "turbos")
