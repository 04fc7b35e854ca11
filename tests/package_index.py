"""A package index on this machine, and packages for it: pip, npm and apt-get fetch from it for real, without a network.

with PackageIndex() as index:
    index.add_wheel("demo", "1.0", {"demo/a.txt": b"text"})
    ...with environment variables index.environment(tmp_path)...
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import lzma
import tarfile
import threading
import time
import zipfile
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from turbos.data.fetch import Package

Files = Mapping[str, bytes]


def tarball(files: Files, mode: str = "w:gz") -> bytes:
    """A (compressed) tarball of these files."""
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            tar.addfile(member, io.BytesIO(content))
    return held.getvalue()


def wheel(files: Files) -> bytes:
    """A zip of these files."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return held.getvalue()


def deb(files: Files, project: str = "demo", version: str = "1.0") -> bytes:
    """A Debian package of these files (deb(5)): an ar archive of `debian-binary`, control and data."""
    control = f"Package: {project}\nVersion: {version}\nArchitecture: all\nMaintainer: T <t@t>\nDescription: text\n"
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tarball({"./control": control.encode()}, "w:xz"),
        "data.tar.xz": lzma.compress(tarball({f"./{name}": content for name, content in files.items()}, "w")),
    }
    packed = b"!<arch>\n"
    for name, content in members.items():
        packed += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        packed += content + b"\n" * (len(content) % 2)
    return packed


class PackageIndex:
    """Serves what was added; `vanishes` cuts file bodies in half, `seconds` makes them slow; `served` counts files."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.pages: dict[str, bytes] = {}
        self.debs: list[str] = []
        self.served: list[str] = []
        self.vanishes = False
        self.seconds = 0.0
        index = self

        class Handler(BaseHTTPRequestHandler):
            """Answers GET from the index."""

            def do_GET(self) -> None:
                """A page, or a file's bytes as slow and as many as the index says."""
                name = self.path.removeprefix("/").replace("%2b", "+")
                is_page = name in index.pages
                content = index.pages.get(name) if is_page else index.files.get(name.split("/")[-1])
                if content is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("Content-Type", "application/json" if content[:1] == b"{" else "text/html")
                self.end_headers()
                if is_page:
                    self.wfile.write(content)
                    return
                index.served.append(name)
                half = len(content) // 2
                self.wfile.write(content[:half])
                self.wfile.flush()
                time.sleep(index.seconds)
                if index.vanishes:
                    self.close_connection = True
                    return
                self.wfile.write(content[half:])

            def log_message(self, format: str, *args: object) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> PackageIndex:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _package(self, name: str, content: bytes, project: str, version: str, channel: str) -> Package:
        self.files[name] = content
        sha256 = hashlib.sha256(content).hexdigest()
        return Package(project, version, name, sha256, len(content) / 1e6, channel)  # type: ignore[arg-type]

    def add_wheel(self, project: str, version: str, files: Files) -> Package:
        """A wheel that pip can fetch."""
        name = f"{project}-{version}-py3-none-any.whl"
        info = f"{project}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n".encode()
        parts = {"METADATA": metadata, "WHEEL": b"Wheel-Version: 1.0\nTag: py3-none-any\n", "RECORD": b""}
        content = wheel({**files, **{f"{info}/{part}": text for part, text in parts.items()}})
        self.pages[f"simple/{project}/"] = f'<a href="/files/{name}">{name}</a>'.encode()
        return self._package(name, content, project, version, "pip")

    def add_npm(self, project: str, version: str, files: Files) -> Package:
        """A tarball that npm can fetch."""
        name = f"{project}-{version}.tgz"
        manifest = {"name": project, "version": version}
        content = tarball(
            {"package/package.json": json.dumps(manifest).encode(), **{f"package/{n}": c for n, c in files.items()}}
        )
        sha512 = base64.b64encode(hashlib.sha512(content).digest()).decode()
        dist = {"tarball": f"{self.url}/{project}/-/{name}", "integrity": f"sha512-{sha512}"}
        page = {"name": project, "dist-tags": {"latest": version}, "versions": {version: {**manifest, "dist": dist}}}
        self.pages[project] = json.dumps(page).encode()
        return self._package(name, content, project, version, "npm")

    def add_deb(self, project: str, version: str, files: Files) -> Package:
        """A Debian package that apt-get can fetch; it takes the place of the project's other version."""
        name = f"{project}_{version}_all.deb"
        content = deb(files, project, version)
        package = self._package(name, content, project, version, "apt")
        self.debs = [one for one in self.debs if not one.startswith(f"Package: {project}\n")]
        self.debs.append(
            f"Package: {project}\nVersion: {version}\nArchitecture: all\nFilename: ./{name}\nSize: {len(content)}\n"
            f"SHA256: {package.sha256}\nDescription: text\n"
        )
        self.pages["debian/./Packages"] = self.pages["debian/Packages"] = "\n".join(self.debs).encode()
        return package

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables that make the clients ask this index alone; apt keeps its lists below the folder."""
        for part in ("lists/partial", "archives/partial", "etc"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "status").write_text("", encoding="ascii")
        (folder / "sources.list").write_text(f"deb [trusted=yes] {self.url}/debian ./\n", encoding="ascii")
        settings = {
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": folder / "etc",
            "APT::Sandbox::User": "root",
            "Acquire::Retries": 0,
            "Acquire::http::Proxy": "false",
        }
        config = folder / "apt.conf"
        config.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()), encoding="ascii")
        return {
            "APT_CONFIG": str(config),
            "PIP_INDEX_URL": f"{self.url}/simple",
            "PIP_CONFIG_FILE": "/dev/null",
            "PIP_NO_CACHE_DIR": "1",
            "npm_config_registry": self.url,
            "npm_config_fetch_retries": "0",
            "npm_config_audit": "false",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }
