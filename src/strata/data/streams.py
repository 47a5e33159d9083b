"""The plain bytes of a file, compressed or not, in bounded memory."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import zstandard

from strata.data.sources import Source
from strata.errors import DataError

BOM = b"\xef\xbb\xbf"

_ZSTD_STEP_BYTES = 8 * 1024  # a hostile frame expands 32,000-fold: feed it in small bites
_ZSTD_WINDOW_BYTES = 2**27  # what the zstd command accepts without --long


@contextmanager
def refusing_damage(source: Source) -> Iterator[None]:
    """Turn what decoders and remote files raise while a file is read into one line."""
    try:
        yield
    except Exception as error:
        explained = source.explain(error)
        if explained is not None:
            raise explained from None
        if isinstance(error, EOFError | zlib.error | zstandard.ZstdError | pa.ArrowException):
            raise _damaged(source.path, error) from None
        if isinstance(error, OSError):
            if error.errno is None or isinstance(error, gzip.BadGzipFile):
                raise _damaged(source.path, error) from None
            raise DataError(f"{source.path} cannot be read: {error.strerror}") from None
        raise


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{path} is damaged or not {path.suffix[1:]}: {reason}; fetch it again")


@contextmanager
def opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A stream of the plain bytes of a file, and the file below it, whose `tell` is progress."""
    with source.open() as raw:
        if source.suffix.endswith(".gz"):
            with gzip.open(raw, "rb") as stream:
                yield stream, raw  # type: ignore[misc]
        elif source.suffix.endswith(".zst"):
            yield io.BufferedReader(_ZstdStream(raw), 1 << 18), raw
        else:
            yield raw, raw


class _ZstdStream(io.RawIOBase):
    """The plain bytes of a zstd file; unlike zstandard's own, it refuses a truncated frame."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._context = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._plain:
            if not self._compressed:
                self._compressed = self._file.read(_ZSTD_STEP_BYTES)
                if not self._compressed:
                    if self._frame is not None:
                        raise EOFError("it ends in the middle of a frame")
                    return 0
            self._decompress()
        count = min(len(buffer), len(self._plain))
        buffer[:count] = self._plain[:count]
        self._plain = self._plain[count:]
        return count

    def _decompress(self) -> None:
        if self._frame is None:
            self._frame = self._context.decompressobj()
        self._plain = memoryview(self._frame.decompress(self._compressed))
        self._compressed = b""
        if self._frame.eof:
            self._compressed = self._frame.unused_data
            self._frame = None
