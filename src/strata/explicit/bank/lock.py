"""One writer at a time, over processes and threads."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from strata.errors import BankError
from strata.explicit.bank.settings import LOCK


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Be the only writer of a bank meanwhile.

    The lock is the kernel's (flock) and goes with the process, however it ends; the number in the
    file only names the holder.

    Raises:
        BankError: somebody else writes, or the folder cannot be written.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise BankError(f"bank {folder} cannot be written: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BankError(
                f"bank {folder} is being written by process {_holder(descriptor)}: wait until it "
                "is done"
            ) from None
        os.pwrite(descriptor, f"{os.getpid():<20}\n".encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # and so unlocked


def _holder(descriptor: int) -> str:
    """The number in the file, which the holder writes just after it has the lock."""
    for _ in range(20):
        found = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        if found:
            return found
        time.sleep(0.01)
    return "unknown"
