"""A bank's folder, made."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from strata.errors import BankError, StorageError
from strata.explicit.bank import records, search
from strata.explicit.bank.lock import writing
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
    path: Path, given: BankSettings, fill: Callable[[Store], None] | None = None
) -> Store:
    """Make the files of a bank, where there is nothing or what a killed maker left.

    Args:
        path: a folder that does not exist or is empty.
        given: what the bank says about itself.
        fill: puts in what it holds from the beginning.

    Raises:
        BankError: there is something already.
        StorageError: the folder cannot be written.
    """
    if path.is_file():
        raise BankError(f"{path} is a file: give the name of a new folder")
    if (path / SETTINGS).exists():
        raise BankError(f"there is a bank at {path}: open it, or give another folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
        strangers = [entry.name for entry in path.iterdir() if entry.name not in _OURS]
        if strangers:
            raise BankError(f"{path} is not empty (it holds {strangers[0]!r}): give a new one")
        with writing(path):
            _clear(path)
            width = None if given.embedder is None else given.embedder.width
            store = Store.create(path, records.schema(width), search.set_up)
            if fill is not None:
                fill(store)
            write_settings(path, given)  # last: without it there is no bank
    except OSError as error:
        raise StorageError(f"bank {path} cannot be made: {error.strerror}") from None
    return store


def _clear(folder: Path) -> None:
    """Delete what a killed `create` or `import_` left of a bank that never was."""
    for name in (DATASET, SEALS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (CODEC, f"{SETTINGS}.tmp"):
        (folder / name).unlink(missing_ok=True)
