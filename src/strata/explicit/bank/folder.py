"""A bank's folder, made."""

from __future__ import annotations

from collections.abc import Callable

from strata.errors import BankError, StorageError
from strata.explicit.bank import records, search
from strata.explicit.bank.files import Files
from strata.explicit.bank.settings import (
    CODEC,
    DATASET,
    LOCK,
    SEALS,
    SETTINGS,
    BankSettings,
    write_settings,
)
from strata.explicit.bank.store import Store

_OURS = {DATASET, SEALS, CODEC, LOCK, "bank.json.tmp"}


def make_folder(
    files: Files, given: BankSettings, fill: Callable[[Store], None] | None = None
) -> Store:
    """Make the files of a bank, where there is nothing or what a killed maker left.

    Args:
        files: of a folder that does not exist or is empty.
        given: what the bank says about itself.
        fill: puts in what it holds from the beginning.

    Raises:
        BankError: there is something already.
        StorageError: the folder cannot be written.
    """
    try:
        there = files.prepare()
        if SETTINGS in there:
            raise BankError(f"there is a bank at {files}: open it, or give another folder")
        strangers = [name for name in there if name not in _OURS]
        if strangers:
            raise BankError(f"{files} is not empty (it holds {strangers[0]!r}): give a new one")
        with files.writing():
            for name in (*files.names(DATASET), *files.names(SEALS), CODEC, f"{SETTINGS}.tmp"):
                files.delete(name)  # what a killed maker left of a bank that never was
            width = None if given.embedder is None else given.embedder.width
            store = Store.create(files, records.schema(width), search.set_up)
            if fill is not None:
                fill(store)
            write_settings(files, given)  # last: without it there is no bank
    except OSError as error:
        raise StorageError(f"bank {files} cannot be made: {error.strerror}") from None
    return store
