"""Folders that mirror a data set of the hub, as a clone or a download leaves them."""

from __future__ import annotations

import re
from pathlib import Path

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_README_CHARACTERS = 2**20


def is_mirror(folder: Path) -> bool:
    """Whether a folder's README.md lists configurations, as that of a data set does."""
    return bool(re.search(r"^configs:", _readme_head(folder), flags=re.MULTILINE))


def _readme_head(folder: Path) -> str:
    """The YAML at the head of a folder's README.md; empty where there is none."""
    readme = folder / "README.md"
    if not readme.is_file():
        return ""
    with open(readme, encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_README_CHARACTERS)
    match = re.match(r"---\r?\n(.*?)\r?\n---\s*(\r?\n|$)", text, flags=re.DOTALL)
    return match[1] if match else ""


def mirror_name(folder: Path) -> str:
    """What a mirror is called: `owner/name` where its place in the hub's cache says so."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        kind, _, rest = folder.parent.parent.name.partition("--")
        if kind == "datasets" and rest:
            return rest.replace("--", "/", 1)
    return folder.name


def mirror_revision(folder: Path) -> str | None:
    """The commit that a mirror holds, as git or the hub's library noted it; None if they did not.

    Known are a clone (`.git`), a snapshot in the hub's cache and a folder of
    `snapshot_download(local_dir=...)`, if all its files are of one commit.
    """
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return folder.name
    head = _first_line(folder / ".git" / "HEAD")
    if head.startswith("ref: "):
        reference = head.removeprefix("ref: ")
        head = _first_line(folder / ".git" / reference) or _packed(folder, reference)
    if _COMMIT.fullmatch(head):
        return head
    noted = (folder / ".cache" / "huggingface" / "download").rglob("*.metadata")
    commits = {_first_line(path) for path in noted}
    if len(commits) == 1 and _COMMIT.fullmatch(commit := commits.pop()):
        return commit
    return None


def _packed(folder: Path, reference: str) -> str:
    packed = folder / ".git" / "packed-refs"
    if packed.is_file():
        for line in packed.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.endswith(f" {reference}"):
                return line.split(" ", 1)[0]
    return ""


def _first_line(path: Path) -> str:
    if not path.is_file():
        return ""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.readline(4096).strip()
