"""Files that are whole or not there: written beside their place, synced, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from strata.errors import DataError, StorageError

_HASH_STEP_BYTES = 1 << 22


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name at the end: what had the name is there until then.

    After an error the unfinished file is left beside it, as PATH.tmp, and the next one begins anew.

    Args:
        path: of the file; its folder exists.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Write a whole file of UTF-8, see `replacing`."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """Turn a full or unwritable disk into one line; readers turn their own errors before."""
    try:
        yield
    except OSError as error:
        where = error.filename or out
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"disk full while writing {where}: free some space and run the same command "
                "again, what was done so far is kept"
            ) from None
        raise StorageError(f"cannot write {where}: {error.strerror}") from None


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while step := file.read(_HASH_STEP_BYTES):
            digest.update(step)
    return digest.hexdigest()


def parse_row(line: bytes, where: str) -> dict[str, Any]:
    """The object in a line of a JSON-lines file that a user gave.

    Args:
        line: its bytes.
        where: file and line, for the error.

    Raises:
        DataError: it is not UTF-8, not JSON, or not an object.
    """
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not UTF-8 (byte {error.start + 1} of the line is 0x{line[error.start]:02x})"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not a row: a number too long or too deep a nesting") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: holds {type(row).__name__}, not an object with fields")
    return row
