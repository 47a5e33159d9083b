"""Checkpoints on disk: complete or absent, checked when opened, never pickled.

Layout of one checkpoint (format version 1)::

    checkpoints/step_00000100/
        <group>.safetensors   one file a tensor group: model, dense_optimizer, value_optimizer, rng
        state.json            everything that is not a tensor: step, recipe, place in the data, ...
        manifest.json         size and sha256 of each file above

A checkpoint is written into a hidden sibling, flushed to disk and renamed, so that a folder named
`step_...` is always whole; a kill or a full disk leaves at most a hidden folder, which the next
`save` or start removes. This file knows about files only; what goes into them is `state.py`'s.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from strata.errors import CheckpointError, StorageError
from strata.files import sha256_of, sync

FORMAT = "strata-checkpoint"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
SHARDED_NAME = ".metadata"  # of torch's DCP

# Bounds on what is parsed before its checksum is known to hold.
MAX_MANIFEST_BYTES = 1 << 20
MAX_STATE_BYTES = 64 << 20

_STEP_FOLDER = re.compile(r"step_(\d{8,})")
_UNFINISHED_PREFIX = ".unfinished_"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)

TensorGroups = Mapping[str, Mapping[str, torch.Tensor]]
Entry = Mapping[str, int | str]  # bytes and sha256 of a file


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they lie; created by the first `save`.
        keep: newest checkpoints to keep after each save; None keeps all.
    """

    def __init__(self, folder: Path, *, keep: int | None = None) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP_FOLDER.fullmatch(entry.name) for entry in self.folder.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def path(self, step: int) -> Path:
        """Folder of one step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def clean(self) -> None:
        """Remove what an interrupted save or deletion left behind."""
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name.startswith(_UNFINISHED_PREFIX):
                    shutil.rmtree(entry)

    def save(self, step: int, *, groups: TensorGroups, state: Mapping[str, Any]) -> Path:
        """Write one checkpoint, then delete the oldest beyond `keep`.

        Args:
            step: updates made so far.
            groups: tensors by group name and tensor name; an empty group is allowed.
            state: a JSON-able mapping.

        Returns:
            The folder of the new checkpoint.

        Raises:
            StorageError: the disk is full or the folder cannot be written; nothing of the new
                checkpoint is left and the earlier ones are untouched.
        """
        with self.writing(step):
            self.begin(step)
            names = write_groups(self.unfinished(step), groups)
            files = describe(self.unfinished(step), names)
            self.finish(step, state=state, files=files)
        return self.path(step)

    def unfinished(self, step: int) -> Path:
        """The hidden folder that a step's checkpoint is written into."""
        return self.folder / f"{_UNFINISHED_PREFIX}{self.path(step).name}"

    @contextmanager
    def writing(self, step: int) -> Iterator[None]:
        """Within, a step's checkpoint is written; leaves nothing of it if that fails.

        Raises:
            StorageError: as `save`.
        """
        with storage_errors(f"saving {self.path(step)}", consequence=self._kept_line()):
            try:
                yield
            except BaseException:
                shutil.rmtree(self.unfinished(step), ignore_errors=True)
                raise

    def begin(self, step: int) -> None:
        """Make the hidden folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.clean()
        self.unfinished(step).mkdir()

    def finish(self, step: int, *, state: Mapping[str, Any], files: Mapping[str, Entry]) -> None:
        """Write down what is not a tensor, and let the checkpoint be; then delete the oldest.

        Args:
            step: updates made so far.
            state: a JSON-able mapping.
            files: of tensors that lie in the hidden folder, from `describe`.
        """
        unfinished = self.unfinished(step)
        (unfinished / STATE_NAME).write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        _write_manifest(unfinished, step, {**files, **describe(unfinished, [STATE_NAME])})
        unfinished.rename(self.path(step))
        sync(self.folder)
        self._delete_oldest()

    def open(self, step: int, *, part: int = 0, parts: int = 1) -> Checkpoint:
        """Check one checkpoint from end to end and open it.

        Args:
            step: updates made when it was written.
            part: with `parts`, check this part of its files: others check the rest.
            parts: how many share the work.

        Raises:
            CheckpointError: a file is missing, damaged, or of another format version.
        """
        path = self.path(step)
        earlier = [other for other in self.steps() if other < step]
        remedy = f"delete {path} to " + (
            f"go on from step {earlier[-1]}" if earlier else "start this run from its beginning"
        )
        manifest = _read_manifest(path, remedy=remedy)
        for name, entry in list(manifest["files"].items())[part::parts]:
            _verify_file(path / name, entry, remedy=remedy)
        return Checkpoint(path, remedy=remedy)

    def _delete_oldest(self) -> None:
        steps = self.steps()
        for step in steps[: -self.keep] if self.keep is not None else []:
            # Renamed first: a kill half way through must not leave half a checkpoint.
            doomed = self.folder / f"{_UNFINISHED_PREFIX}deleted_{step:08d}"
            self.path(step).rename(doomed)
            shutil.rmtree(doomed)

    def _kept_line(self) -> str:
        steps = self.steps()
        if not steps:
            return "this run has no earlier checkpoint"
        return f"the checkpoint of step {steps[-1]} is intact"


class Checkpoint:
    """One checkpoint whose files are known to be whole."""

    def __init__(self, path: Path, *, remedy: str) -> None:
        self.path = path
        self._remedy = remedy
        self.state: dict[str, Any] = _read_json(
            path / STATE_NAME, max_bytes=MAX_STATE_BYTES, remedy=remedy
        )

    @property
    def is_sharded(self) -> bool:
        """Whether several processes wrote it, see `sharded_checkpoint.py`."""
        return (self.path / SHARDED_NAME).is_file()

    def tensors(self, group: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and CPU tensor of each member of a group, one at a time."""
        path = self.path / f"{group}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise damaged(path, str(error), remedy=self._remedy) from None

    def mismatch(self, group: str, what: str) -> CheckpointError:
        """The error for a whole file whose content does not fit this model."""
        return damaged(self.path / f"{group}.safetensors", what, remedy=self._remedy)


def damaged(path: Path, what: str, *, remedy: str) -> CheckpointError:
    """The one line for a checkpoint file that cannot be used."""
    return CheckpointError(f"{path} cannot be used ({' '.join(what.split())}): {remedy}")


@contextmanager
def storage_errors(doing: str, *, consequence: str) -> Iterator[None]:
    """Turn a full or read-only disk into one `StorageError` line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _errno(error)
        if code in _FULL_DISK:
            raise StorageError(
                f"disk full while {doing} ({os.strerror(code)}): {consequence}; "
                "free some space and start the same command again"
            ) from None
        if code in _READ_ONLY:
            raise StorageError(
                f"no permission while {doing} ({os.strerror(code)}): {consequence}"
            ) from None
        raise


def _errno(error: OSError | SafetensorError) -> int:
    """The system's error number; safetensors gives it only in its message."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"os error (\d+)", str(error))
    return int(match.group(1)) if match else 0


def write_groups(folder: Path, groups: TensorGroups) -> list[str]:
    """Write tensors, a file a group; the files' names."""
    for group, tensors in groups.items():
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / f"{group}.safetensors")
    return [f"{group}.safetensors" for group in groups]


def describe(folder: Path, names: Iterable[str]) -> dict[str, Entry]:
    """Size and sha256 of files, flushed to disk."""
    files: dict[str, Entry] = {}
    for name in sorted(names):
        path = folder / name
        sync(path)
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    return files


def _write_manifest(folder: Path, step: int, files: Mapping[str, Entry]) -> None:
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "step": step, "files": files}
    manifest_path = folder / MANIFEST_NAME
    manifest_path.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    sync(manifest_path)
    sync(folder)


def _read_manifest(path: Path, *, remedy: str) -> dict[str, Any]:
    manifest_path = path / MANIFEST_NAME
    manifest = _read_json(manifest_path, max_bytes=MAX_MANIFEST_BYTES, remedy=remedy)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("files"), dict):
        raise damaged(manifest_path, "not the manifest of a strata checkpoint", remedy=remedy)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {version}, this strata reads format {FORMAT_VERSION}: "
            "go on with the strata version that wrote it"
        )
    for name, entry in manifest["files"].items():
        plain = isinstance(name, str) and Path(name).name == name
        if not plain or not isinstance(entry, dict) or {"bytes", "sha256"} - entry.keys():
            raise damaged(manifest_path, f"bad entry {name!r}", remedy=remedy)
    if STATE_NAME not in manifest["files"]:
        raise damaged(manifest_path, f"lists no {STATE_NAME}", remedy=remedy)
    return manifest


def _read_json(path: Path, *, max_bytes: int, remedy: str) -> dict[str, Any]:
    try:
        num_bytes = path.stat().st_size
        if num_bytes > max_bytes:
            raise damaged(path, f"{num_bytes} bytes, at most {max_bytes} allowed", remedy=remedy)
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(path, "missing", remedy=remedy) from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise damaged(path, "not JSON", remedy=remedy) from None
    if not isinstance(tree, dict):
        raise damaged(path, f"holds {type(tree).__name__}, not a mapping", remedy=remedy)
    return tree


def _verify_file(path: Path, entry: Mapping[str, Any], *, remedy: str) -> None:
    if not path.is_file():
        raise damaged(path, "missing", remedy=remedy)
    num_bytes = path.stat().st_size
    if num_bytes != entry["bytes"]:
        raise damaged(path, f"{num_bytes} bytes, written as {entry['bytes']}", remedy=remedy)
    if sha256_of(path) != entry["sha256"]:
        raise damaged(path, "its bytes changed since it was written: sha256 differs", remedy=remedy)
