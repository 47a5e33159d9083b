"""A data set as a folder, and a hub that serves such folders from this machine."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_documents import write_jsonl

README = """---
license: cc0-1.0
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*
  - split: validation
    path: data/validation-*
- config_name: sample
  data_files:
  - split: train
    path: sample/*.json
---
# Tiny
"""


def make_mirror(folder: Path, texts: list[str], *, column: str = "text") -> Path:
    """A data set of two configurations: parquet (most texts, and some for validation) and lines.

    What is where, `splits_of` says.
    """
    train, validation, sample = splits_of(texts)
    (folder / "data").mkdir(parents=True)
    (folder / "sample").mkdir()
    (folder / "README.md").write_text(README)
    (folder / "notes.txt").write_text("not part of any configuration")
    half = len(train) // 2
    for name, part in (
        ("train-00000-of-00002", train[:half]),
        ("train-00001-of-00002", train[half:]),
        ("validation-00000-of-00001", validation),
    ):
        rows = pa.table({column: part, "id": list(range(len(part)))})
        pq.write_table(rows, folder / "data" / f"{name}.parquet", row_group_size=16)
    write_jsonl(folder / "sample" / "a.json", sample)
    return folder


def splits_of(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The texts of `make_mirror` by where they went: train, validation, sample."""
    num_sample, num_validation = len(texts) // 6, len(texts) // 5
    default = texts[:-num_sample]
    return default[:-num_validation], default[-num_validation:], texts[-num_sample:]


@dataclass
class Hub:
    """What is served.

    Attributes:
        url: where.
        commits: `datasets/owner/name` or `owner/name` -> branch or commit -> folder.
        heads: repository -> branch -> commit.
        gated: repositories that want a token.
        locked: repositories that no token opens.
        asked: the paths of all requests so far.
        broken: refuse every further request of a file with this status; 0 does not.
    """

    url: str = ""
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    heads: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    locked: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    broken: int = 0

    def add(self, repo: str, folder: Path, *, commit: str, branch: str = "main") -> None:
        """Serve a folder as a commit of a repository, and let a branch point to it."""
        self.commits.setdefault(repo, {})[commit] = folder
        self.heads.setdefault(repo, {})[branch] = commit


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub, and the libraries of this process pointed at it."""
    import datasets.config
    from huggingface_hub import HfFileSystem, constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    for module, name, value in (
        (constants, "ENDPOINT", hub.url),
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "HF_HUB_CACHE", str(cache)),
        (constants, "HF_TOKEN_PATH", str(cache / "no-token")),
        (datasets.config, "HF_ENDPOINT", hub.url),
        (datasets.config, "HF_HUB_OFFLINE", False),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.delenv("HF_TOKEN", raising=False)
    HfFileSystem.clear_instance_cache()
    try:
        yield hub
    finally:
        HfFileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """The part of the hub's interface that downloads and listings use."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(path)
        api = re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?",
            path,
        )
        file = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            kind, name, verb, revision, rest = api.groups()
            repo = f"datasets/{name}" if kind == "datasets" else name
        elif file:
            (repo, revision, rest), verb = file.groups(), "resolve"
        else:
            self._refuse(404, "EntryNotFound")
            return
        if repo not in self.hub.commits:
            self._refuse(404, "RepoNotFound")
            return
        if repo in self.hub.gated and "authorization" not in self.headers:
            self._refuse(401, "GatedRepo")
            return
        if repo in self.hub.locked:
            self._refuse(403, "GatedRepo")
            return
        heads = self.hub.heads[repo]
        commit = heads.get(revision or "main", revision or "")
        folder = self.hub.commits[repo].get(commit)
        if folder is None:
            self._refuse(404, "RevisionNotFound")
        elif verb in (None, "revision"):
            self._json({"id": repo.removeprefix("datasets/"), "sha": commit, "siblings": []})
        elif verb == "tree":
            recursive = "rue" in "".join(parse_qs(urlsplit(self.path).query).get("recursive", []))
            self._json(_tree(folder, folder / rest, recursive=recursive))
        elif verb == "paths-info":
            given = parse_qs(body.decode())["paths"]
            self._json([_describe(folder, folder / name) for name in given])
        else:
            self._file(folder, rest, commit)

    def _file(self, folder: Path, name: str, commit: str) -> None:
        path = folder / name
        if not path.is_file():
            self._refuse(404, "EntryNotFound", commit)
            return
        if self.hub.broken and path.suffix in (".parquet", ".json"):
            self._refuse(self.hub.broken, "")
            return
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), int(span[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content = content[first : last + 1]
        self._send(206 if span else 200, content, headers)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code}
        if commit:
            headers["X-Repo-Commit"] = commit
        self._send(status, b"{}", headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree(folder: Path, below: Path, *, recursive: bool) -> list[dict[str, object]]:
    paths = below.rglob("*") if recursive else below.glob("*")
    return [_describe(folder, path) for path in sorted(paths)]


def _describe(folder: Path, path: Path) -> dict[str, object]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
    content = path.read_bytes()
    described = {"type": "file", "path": name, "size": len(content)}
    described["oid"] = hashlib.sha1(content).hexdigest()
    if path.suffix == ".parquet":
        sha256 = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return described
