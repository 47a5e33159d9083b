"""Which files a configuration and a split of a data set are, by the rules of `datasets`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from strata.data.hub.errors import explain
from strata.data.hub.mirror import mirror_name, mirror_revision
from strata.data.hub.names import DatasetName, pinned
from strata.data.hub.remote import RemoteSource
from strata.data.sources import DatasetEntry, Source, SourceEntry, describe
from strata.errors import DataError, HubError, StrataError

# What a name ends with in data sets, and what it is read as.
_SUFFIXES = {
    f"{kind}{packed}": f"{read_as}{packed}"
    for kind, read_as in ((".jsonl", ".jsonl"), (".json", ".jsonl"), (".txt", ".txt"))
    for packed in ("", ".gz", ".zst")
} | {".parquet": ".parquet"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_PATHS_AT_ONCE = 500
_MAX_POINTER_BYTES = 1024


def find_dataset(
    name: DatasetName, *, first: int, streaming: bool
) -> tuple[DatasetEntry, list[Source]]:
    """Look up a data set: its commit, and the files of its configuration and split.

    Args:
        name: the data set.
        first: number of its first file among all sources.
        streaming: read files where they are, instead of fetching them whole.

    Raises:
        DataError: it has no such configuration or split, or files of other kinds.
        HubError: the hub cannot be reached, or does not have it.
    """
    asked = str(name)
    revision = mirror_revision(name.folder) if name.folder else _commit(name)
    if name.folder is None and revision is not None:
        name = pinned(name, revision)
    config, urls = _data_files(name)
    root = str(name.folder.resolve()) if name.folder else f"hf://datasets/{name.repo}@{revision}"
    paths = [url.removeprefix(root).lstrip("/") for url in urls]
    suffixes = [_suffix(path, name) for path in paths]
    if name.folder is not None:
        sources = [
            _mirrored(name.folder / path, path, suffix)
            for path, suffix in zip(paths, suffixes, strict=True)
        ]
        label = mirror_name(name.folder)
        asked = label + asked.removeprefix(name.repo)
    else:
        assert revision is not None
        entries = _describe_remote(name.repo, revision, paths)
        sources = remote_sources(name.repo, revision, entries, streaming=streaming)
        label = name.repo
    entry = DatasetEntry(
        name=label,
        asked=asked,
        revision=revision,
        config=config,
        split=name.split,
        first=first,
        num_files=len(sources),
        is_mirror=name.folder is not None,
    )
    return entry, sources


def remote_sources(
    repo: str, revision: str, entries: list[SourceEntry], *, streaming: bool
) -> list[Source]:
    """Files of the hub as sources, from what a manifest says about them."""
    return [
        RemoteSource(
            path=Path(f"{repo}@{revision[:8]}", entry.name),
            suffix=_SUFFIXES[_ending(entry.name) or ""],
            entry=entry,
            repo=repo,
            revision=revision,
            streaming=streaming,
        )
        for entry in entries
    ]


def _commit(name: DatasetName) -> str | None:
    """What a branch or tag stands for now; a commit stands for itself."""
    if name.revision is not None and _COMMIT.fullmatch(name.revision):
        return name.revision
    from huggingface_hub import HfApi

    with _explained(name):
        return HfApi().dataset_info(name.repo, revision=name.revision).sha


def _data_files(name: DatasetName) -> tuple[str, list[str]]:
    """The configuration that was meant, and the paths or URLs of the split's files, in order."""
    try:
        from datasets import load_dataset_builder
    except ImportError:
        raise DataError(
            f'{name} is a data set: install what reads them with pip install "strata-lm[hub]"'
        ) from None
    # A prefix keeps a folder that is called like a data set, or the reverse, from being the other.
    path = str(name.folder.resolve()) if name.folder else f"hf://datasets/{name.repo}"
    with tempfile.TemporaryDirectory() as cache, _explained(name):
        builder = load_dataset_builder(path, name.config, revision=name.revision, cache_dir=cache)
    files = builder.config.data_files or {}
    if name.split not in files:
        there = ", ".join(sorted(map(str, files))) or "none"
        raise DataError(f"{name} has no split {name.split!r}, only {there}: name one with --split")
    if not files[name.split]:
        raise DataError(f"{name}: its split {name.split!r} has no files: see its README.md")
    return builder.config.name, [str(url) for url in files[name.split]]


@contextmanager
def _explained(name: DatasetName) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, StrataError):
            raise
        if name.folder is None:
            known = explain(error, name.repo, kind="dataset", revision=name.revision)
            if known is not None:
                raise known from None
        if not isinstance(error, OSError | ValueError | TypeError | RuntimeError | yaml.YAMLError):
            raise
        # What is left is about the data set itself: a configuration that it does not have, a
        # README.md that is none, files that are missing.
        raise DataError(f"{name}: {' '.join(str(error).split())[:300]}") from None


def _describe_remote(repo: str, revision: str, paths: list[str]) -> list[SourceEntry]:
    """Sizes and hashes of files of the hub, without fetching them."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    found: dict[str, SourceEntry] = {}
    with _explained(DatasetName(repo, None, "", revision)):
        for begin in range(0, len(paths), _PATHS_AT_ONCE):
            for info in HfApi().get_paths_info(
                repo,
                paths[begin : begin + _PATHS_AT_ONCE],
                revision=revision,
                repo_type="dataset",
            ):
                if isinstance(info, RepoFile):
                    digest = info.lfs.sha256 if info.lfs else info.blob_id
                    found[info.path] = SourceEntry(
                        name=info.path, num_bytes=info.size, fingerprint=digest[:32]
                    )
    missing = [path for path in paths if path not in found]
    if missing:
        raise HubError(f"the hub does not describe {missing[0]} of {repo}: try again later")
    return [found[path] for path in paths]


def _ending(path: str) -> str | None:
    lowered = path.lower()
    return next((suffix for suffix in _SUFFIXES if lowered.endswith(suffix)), None)


def _suffix(path: str, name: DatasetName) -> str:
    ending = _ending(path)
    if ending is None:
        raise DataError(
            f"{name} holds {path}: strata reads parquet, JSON lines (plain, gz, zst) and txt; "
            "name another configuration with --config, or convert it"
        )
    return _SUFFIXES[ending]


def _mirrored(path: Path, name: str, suffix: str) -> Source:
    source = describe(path, name, suffix=suffix)
    if source.entry.num_bytes < _MAX_POINTER_BYTES:
        with source.open() as file:
            if file.read(_MAX_POINTER_BYTES).startswith(b"version https://git-lfs"):
                raise DataError(
                    f"{path} is a pointer of git-lfs, not the file: run `git lfs pull` there"
                )
    return source
