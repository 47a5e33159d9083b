"""Which reference each chunk of a prepared folder reads while a model is trained on it.

Every document is cut into chunks of `chunk_tokens` tokens from its first one on, so that a chunk is
the same under any order and packing. For each, a search gives candidates, and the best one that
does not give the document away is kept.

OUT/manifest.json                 written last; a folder without it is unfinished
OUT/progress.json                 which parts are done, while the folder is unfinished
OUT/train/00000.chunks.npy        int32: reference of each chunk, by its line in the part; -1: none
OUT/train/00000.lines.npy         int64: where each line begins, and the end
OUT/train/00000.references.jsonl  {"id", "source", "text"}, each reference once a part
OUT/val/...                       the same for the val split, where there is one
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from strata.config import FrozenConfig
from strata.data.manifest import MANIFEST_NAME, Count, FileEntry, TokenManifest, read_manifest
from strata.data.shards import map_array
from strata.errors import DataError

Model = TypeVar("Model", bound=FrozenConfig)

FORMAT: Final = "strata-references"
PROGRESS_NAME = "progress.json"
LOCK_NAME = ".lock"
NONE = -1

_MAX_MANIFEST_BYTES = 256 * 2**20


class ReferencesConfig(FrozenConfig):
    """How references are chosen.

    Attributes:
        chunk_tokens: tokens of a chunk; the last of a document may be short.
        candidates: hits looked at for a chunk, best first, until one is no leak.
        leak_threshold: drop a reference of which more than this share stands in the chunk's
            document, in order and within twice its length; 1 drops none.
        part_chunks: chunks between two commits, but for a single longer document; what a kill
            loses.
    """

    chunk_tokens: Annotated[int, Field(ge=8, le=4096)] = 64
    candidates: Annotated[int, Field(ge=1, le=1000)] = 8
    leak_threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    part_chunks: Annotated[int, Field(ge=1)] = 2**14


class Origin(FrozenConfig):
    """Everything that decides the bytes of a folder of references."""

    data: dict[str, str]  # sha256 of each split's description
    searched: dict[str, str]  # what was searched, and how, in the caller's words
    config: ReferencesConfig


class PartEntry(FrozenConfig):
    """Consecutive documents and their chunks."""

    num_documents: Count
    num_chunks: Count
    num_found: Count
    num_leaks: Count
    num_references: Count
    chunks: FileEntry
    lines: FileEntry
    references: FileEntry


class Progress(FrozenConfig):
    """The parts that are done, by split."""

    origin: Origin
    splits: dict[str, tuple[PartEntry, ...]]


class ReferencesManifest(Progress):
    """The whole of `manifest.json`."""

    format: Literal["strata-references"] = FORMAT
    format_version: Literal[1] = 1

    def count(self, name: str) -> int:
        """A count of parts, summed over all of them."""
        return sum(getattr(part, name) for parts in self.splits.values() for part in parts)


@dataclass(frozen=True)
class Chosen:
    """A reference as it was found."""

    id: str
    source: str
    text: str


class ChunkReferences:
    """The references of one split's chunks, mapped from disk.

    Chunks are counted through the split: document by document, each from its first token on.

    Attributes:
        chunk_tokens: tokens of a chunk.
        num_chunks, num_references: of the split.
        manifest: what the folder says about itself.
    """

    def __init__(self, folder: Path, split: str, manifest: ReferencesManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self.chunk_tokens = manifest.origin.config.chunk_tokens
        self._parts = [
            _Part.open(folder / split / f"{number:05d}", entry)
            for number, entry in enumerate(manifest.splits[split])
        ]
        counts = [len(part.chunks) for part in self._parts]
        self._chunk_starts = np.cumsum([0, *counts])
        self._reference_starts = np.cumsum([0, *(len(part.lines) - 1 for part in self._parts)])
        self.num_chunks = int(self._chunk_starts[-1])
        self.num_references = int(self._reference_starts[-1])

    @classmethod
    def open(cls, folder: str | Path, *, tokens: Path, split: str = "train") -> ChunkReferences:
        """Open the references of a split after checking that they belong to it.

        Args:
            folder: what `strata data references` made.
            tokens: the prepared folder that will be read beside it.
            split: "train" or "val".

        Raises:
            DataError: the folder is missing, unfinished, damaged, or of other tokens.
        """
        folder = Path(folder)
        manifest = read_references(folder)
        there = manifest.origin.data.get(split)
        if there is None or there != data_identity(read_manifest(tokens)).get(split):
            raise DataError(
                f"{folder} has references for other data than {split} of {tokens}: find them again "
                f"with strata data references {tokens}"
            )
        return cls(folder, split, manifest)

    def numbers(self, chunks: np.ndarray) -> np.ndarray:
        """Reference of each chunk, int64, counted through the split; -1 for none.

        Args:
            chunks: any shape, int64; -1 stands for no chunk.
        """
        numbers = np.full(chunks.shape, NONE, np.int64)
        place = np.searchsorted(self._chunk_starts, chunks, side="right") - 1
        for part in np.unique(place[chunks >= 0]).tolist():
            here = (place == part) & (chunks >= 0)
            local = self._parts[part].chunks[chunks[here] - self._chunk_starts[part]]
            numbers[here] = np.where(local < 0, NONE, local + self._reference_starts[part])
        return numbers

    def __getitem__(self, number: int) -> Chosen:
        """A reference by its number.

        Raises:
            DataError: its line is damaged.
        """
        part = int(np.searchsorted(self._reference_starts, number, side="right")) - 1
        return self._parts[part].read(number - int(self._reference_starts[part]))


@dataclass(frozen=True)
class _Part:
    path: Path
    chunks: np.ndarray
    lines: np.ndarray

    @classmethod
    def open(cls, base: Path, entry: PartEntry) -> _Part:
        chunks = map_array(
            named(base, "chunks.npy"), entry.chunks, dtype=np.dtype("<i4"),
            length=entry.num_chunks,
        )  # fmt: skip
        lines = map_array(
            named(base, "lines.npy"), entry.lines, dtype=np.dtype("<i8"),
            length=entry.num_references + 1,
        )  # fmt: skip
        path = named(base, "references.jsonl")
        if not path.is_file() or path.stat().st_size != entry.references.num_bytes:
            raise _damaged(path, f"it has not the {entry.references.num_bytes} bytes it should")
        if len(chunks) and not NONE <= int(chunks.min()) <= int(chunks.max()) < len(lines) - 1:
            raise _damaged(named(base, "chunks.npy"), "it names references that are not there")
        return cls(path, chunks, lines)

    def read(self, line: int) -> Chosen:
        begin, end = int(self.lines[line]), int(self.lines[line + 1])
        if not 0 <= begin < end <= self.path.stat().st_size:
            raise _damaged(self.path, f"line {line} begins at {begin} and ends at {end}")
        with open(self.path, "rb") as file:
            file.seek(begin)
            row = file.read(end - begin)
        try:
            tree = json.loads(row)
            return Chosen(str(tree["id"]), str(tree["source"]), str(tree["text"]))
        except (ValueError, TypeError, KeyError):
            raise _damaged(self.path, f"line {line} is no reference") from None


def data_identity(manifest: TokenManifest) -> dict[str, str]:
    """A hash of each split: its entry holds the sha256 of every shard."""
    return {
        str(name): hashlib.sha256(entry.model_dump_json().encode()).hexdigest()
        for name, entry in manifest.splits.items()
        if entry.shards
    }


def read_references(folder: Path) -> ReferencesManifest:
    """Read and check the manifest of a folder of references.

    Raises:
        DataError: there is none, or it is not one that this version reads.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        unfinished = (folder / PROGRESS_NAME).is_file()
        what = "is unfinished" if unfinished else f"has no {MANIFEST_NAME}"
        raise DataError(f"{folder} {what}: run strata data references with --out {folder}")
    return read_model(path, ReferencesManifest)


def read_model(path: Path, kind: type[Model]) -> Model:
    """Read one of the JSON files of such a folder.

    Raises:
        DataError: it is not one.
    """
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise DataError(f"{path} is larger than {_MAX_MANIFEST_BYTES // 2**20} MiB: not a manifest")
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise DataError(
            f"{path} is damaged or of another kind: {where}: {first['msg']}: delete the folder and "
            "find the references again"
        ) from None


def refuse_other_origin(out: Path, there: Origin, given: Origin) -> None:
    """Refuse to touch a folder that was made from other tokens or by another search.

    Raises:
        DataError: they differ; the line says in what.
    """
    differing = []
    if there.data != given.data:
        differing.append("the tokens are others")
    before = {**there.searched, **there.config.model_dump()}
    now = {**given.searched, **given.config.model_dump()}
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            differing.append(f"{name} was {before.get(name)!r}, now {now.get(name)!r}")
    if differing:
        raise DataError(
            f"{out} was made with other arguments ({'; '.join(differing)}): give another --out or "
            "delete it"
        )


def named(base: Path, kind: str) -> Path:
    """One of the files of a part."""
    return base.with_name(f"{base.name}.{kind}")


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}: find the references again or copy it anew")
