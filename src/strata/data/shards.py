"""Shards of tokens: writing them so that a kill leaves whole ones, reading them with suspicion."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from strata.data.manifest import FileEntry, ShardEntry
from strata.errors import DataError
from strata.files import sha256_of, sync

_HEADER_BYTES = 128
_CHECK_STEP = 1 << 20
_MAX_HEADER_CHARACTERS = 4096


class NpyWriter:
    """Appends to a one-dimensional .npy file whose length is known only at the end.

    The file stands under a temporary name until `finish`. Its header is made here and not by
    numpy, so that equal arrays are equal bytes under every numpy.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._file = open(self._temporary, "wb")  # noqa: SIM115
        self._file.write(self._header(0))
        self.length = 0

    def append(self, values: np.ndarray) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self._file.write(values.view(np.uint8).data)
        self.length += len(values)

    def finish(self) -> FileEntry:
        """Close the file, give it its name and return its size and hash."""
        self._file.seek(0)
        self._file.write(self._header(self.length))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        return FileEntry(num_bytes=self._path.stat().st_size, sha256=sha256_of(self._path))

    def close(self) -> None:
        """Let go of an unfinished file; the next writer of the same name overwrites it."""
        self._file.close()

    def _header(self, length: int) -> bytes:
        fields = f"{{'descr': '{self._dtype.str}', 'fortran_order': False, 'shape': ({length},), }}"
        text = fields.ljust(_HEADER_BYTES - 11) + "\n"
        return b"\x93NUMPY\x01\x00" + (_HEADER_BYTES - 10).to_bytes(2, "little") + text.encode()


class SplitWriter:
    """Writes documents in order, cutting shards at document borders.

    A shard takes documents while it stays within `shard_tokens`; one longer document makes a
    shard of its own.
    """

    def __init__(self, folder: Path, *, dtype: np.dtype, shard_tokens: int, num_done: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._num_done = num_done
        self._writers: tuple[NpyWriter, NpyWriter, NpyWriter] | None = None

    def room(self) -> int:
        """How many tokens the shard in work still takes."""
        if self._writers is None:
            return self._shard_tokens
        return max(0, self._shard_tokens - self._writers[0].length)

    @property
    def is_empty(self) -> bool:
        """Whether the next document opens a shard."""
        return self._writers is None

    def append(self, tokens: np.ndarray, lengths: np.ndarray, loss_from: np.ndarray) -> None:
        """Add whole documents to the shard in work; they must fit its room, or open it."""
        if self._writers is None:
            base = self._folder / f"{self._num_done:05d}"
            self._writers = (
                NpyWriter(base.with_name(base.name + ".tokens.npy"), self._dtype),
                NpyWriter(base.with_name(base.name + ".documents.npy"), np.dtype("<i8")),
                NpyWriter(base.with_name(base.name + ".loss_from.npy"), np.dtype("<i4")),
            )
        starts = np.cumsum(lengths) - lengths + self._writers[0].length
        for writer, values in zip(self._writers, (tokens, starts, loss_from), strict=True):
            writer.append(values)

    def finish_shard(self) -> ShardEntry:
        """Close the shard in work and describe it."""
        assert self._writers is not None
        tokens, documents, loss_from = self._writers
        entry = ShardEntry(
            name=f"{self._num_done:05d}",
            num_tokens=tokens.length,
            num_documents=documents.length,
            tokens=tokens.finish(),
            documents=documents.finish(),
            loss_from=loss_from.finish(),
        )
        sync(self._folder)
        self._writers = None
        self._num_done += 1
        return entry

    def close(self) -> None:
        """Let go of a shard left unfinished."""
        for writer in self._writers or ():
            writer.close()


@dataclass(frozen=True)
class Shard:
    """The memory-mapped arrays of one shard.

    Attributes:
        path: the tokens file, for messages.
        tokens: (num_tokens,) uint16 or uint32.
        documents: (num_documents,) int64, where each document starts.
        loss_from: (num_documents,) int32, leading tokens of each document without loss.
        first_document: number of its first document in the split.
    """

    path: Path
    tokens: np.ndarray
    documents: np.ndarray
    loss_from: np.ndarray
    first_document: int = 0


def open_shard(folder: Path, entry: ShardEntry, *, dtype: str) -> Shard:
    """Map the three files of a shard after checking sizes and headers.

    Raises:
        DataError: a file is missing, of another size than the manifest says, or not the array
            that it should be.
    """
    wanted: tuple[tuple[str, FileEntry, np.dtype, int], ...] = (
        ("tokens", entry.tokens, np.dtype(dtype), entry.num_tokens),
        ("documents", entry.documents, np.dtype(np.int64), entry.num_documents),
        ("loss_from", entry.loss_from, np.dtype(np.int32), entry.num_documents),
    )
    paths = [folder / f"{entry.name}.{kind}.npy" for kind, *_ in wanted]
    tokens, documents, loss_from = (
        map_array(path, file, dtype=kind_dtype, length=length)
        for path, (_, file, kind_dtype, length) in zip(paths, wanted, strict=True)
    )
    return Shard(paths[0], tokens, documents, loss_from)


def check_documents(shard: Shard) -> None:
    """Check that the documents of a shard tile it, and that no loss starts behind its document.

    Raises:
        DataError: an offset is out of order or out of range.
    """
    starts, count = shard.documents, len(shard.documents)
    if (count == 0) != (len(shard.tokens) == 0) or (count and starts[0] != 0):
        raise _damaged(shard.path, "its documents do not start at its first token")
    for begin in range(0, count, _CHECK_STEP):
        stop = min(begin + _CHECK_STEP, count)
        following = np.append(starts[begin + 1 : stop + 1], len(shard.tokens))[: stop - begin]
        lengths = following - starts[begin:stop]
        loss_from = shard.loss_from[begin:stop]
        in_range = starts[begin:stop].min() >= 0 and following.max() <= len(shard.tokens)
        if not in_range or lengths.min() <= 0:
            raise _damaged(shard.path, "document offsets are out of order or out of range")
        if loss_from.min() < 0 or (loss_from > lengths).any():
            raise _damaged(shard.path, "a loss starts outside of its document")


def check_hashes(folder: Path, entry: ShardEntry) -> None:
    """Compare the sha256 of a shard's files with the manifest.

    Raises:
        DataError: one differs.
    """
    for kind, file in (
        ("tokens", entry.tokens),
        ("documents", entry.documents),
        ("loss_from", entry.loss_from),
    ):
        path = folder / f"{entry.name}.{kind}.npy"
        if sha256_of(path) != file.sha256:
            raise _damaged(path, "its sha256 is not the manifest's")


def map_array(path: Path, entry: FileEntry, *, dtype: np.dtype, length: int) -> np.ndarray:
    """Map a one-dimensional .npy file after checking its size and header.

    Raises:
        DataError: it is missing, of another size than `entry` says, or not the array it should be.
    """
    try:
        num_bytes = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}: prepare it again") from None
    if num_bytes != entry.num_bytes:
        raise _damaged(path, f"it has {num_bytes} bytes, the manifest says {entry.num_bytes}")
    try:
        # What np.load does with a mmap_mode, without its detours to zip files and pickles.
        array = np.lib.format.open_memmap(path, mode="r", max_header_size=_MAX_HEADER_CHARACTERS)
    except (ValueError, EOFError, SyntaxError) as error:
        reason = " ".join(str(error).split())[:160]
        raise _damaged(path, f"not an npy array: {reason}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if array.shape != (length,) or array.dtype != dtype:
        raise _damaged(path, f"it does not hold {length} values of {dtype}")
    return np.asarray(array)


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is damaged: {reason}: prepare the data again or copy it anew")
