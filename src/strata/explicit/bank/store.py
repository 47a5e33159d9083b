"""The Lance dataset of a bank: opened at a sealed version, changed in single commits.

Everything that Lance raises, its panics included, leaves here as one line.
"""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from strata.errors import BankError, StorageError, StrataError
from strata.explicit.bank import seals
from strata.explicit.bank.files import Files
from strata.explicit.bank.settings import DATASET
from strata.explicit.extras import require
from strata.explicit.hits import Ranking

# A panic of Rust code arrives as a class of its own below BaseException.
_PANIC = "PanicException"
_MAX_SEEN = 2**16
_NONE: Mapping[str, seals.SealedFile] = MappingProxyType({})
_MAX_WARM_ROWS = 200_000  # of which an index of words takes about half a second to read


class Store:
    """One version of the dataset; commits move it on.

    Args:
        files: of the bank.
        version: which; None for the newest.

    Raises:
        BankError: the version does not exist, or a file of it is damaged.
    """

    dataset: Any
    seal: seals.Seal
    _indexes_checked: bool
    _seen: _Addresses
    _searched: Any = None  # the dataset that `warm` saw last
    _warm: bool = False

    def __init__(self, files: Files, *, version: int | None = None) -> None:
        self.files, self._seen = files, _Addresses()
        self._open(version)

    @classmethod
    def create(cls, files: Files, columns: pa.Schema, setup: Callable[[Any], None]) -> Store:
        """Make an empty dataset, set it up (indexes) and seal it."""
        lance = require("lance", extra="bank", purpose="a bank")
        store = cls.__new__(cls)
        store.files, store._seen = files, _Addresses()
        with store.guarded("cannot be created"):
            empty = columns.empty_table()
            dataset = lance.write_dataset(
                empty,
                files.where(DATASET),
                schema=columns,
                data_storage_version="2.2",
                storage_options=files.storage_options,
            )
            setup(dataset)
            store.dataset = dataset
            store.seal = store._seal(dataset, "created", _NONE)
        store._indexes_checked = True
        return store

    @property
    def version(self) -> int:
        """Of the dataset as this object sees it."""
        return self.seal.version

    @property
    def columns(self) -> pa.Schema:
        """Of the dataset."""
        columns: pa.Schema = self.dataset.schema
        return columns

    def refresh(self) -> None:
        """Move on to the newest version."""
        if seals.versions(self.files)[-1:] != [self.version]:
            self._open(None)

    def scan(
        self,
        columns: Sequence[str],
        *,
        where: str | None = None,
        rows_at_once: int = 1024,
        with_row_id: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """All rows, or those where an expression holds, in their order, in bounded batches."""
        with self.guarded("cannot be read"):
            yield from self.dataset.scanner(
                columns=list(columns),
                filter=where,
                batch_size=rows_at_once,
                batch_readahead=2,
                with_row_id=with_row_id,
            ).to_batches()

    def take(
        self, dataset: Any, addresses: Sequence[int], columns: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Rows by their addresses in a dataset (Lance's `_rowid`), in the order given."""
        if not addresses:
            return []
        with self.guarded("cannot be read"):
            table = dataset._take_rows(list(addresses), columns=list(columns))
            rows: list[dict[str, Any]] = table.to_pylist()
            if "id" in columns:
                ids = [row["id"] for row in rows]
                self._seen.add(dataset, zip(ids, addresses, strict=True))
        return rows

    def find(self, score: str, **query: Any) -> Ranking:
        """Addresses of the rows of one search, as Lance's scanner takes it, and their scores.

        They are not asked of the scanner with their columns: fetching these for a handful of rows
        takes it several milliseconds, and `take` one.
        """
        if not self._indexes_checked:
            seals.check_indexes(self.files, self.seal)
            self._indexes_checked = True
        dataset = self.dataset  # this one throughout, whatever is committed meanwhile
        with self.guarded("cannot be searched"):
            table = dataset.scanner(columns=[score], with_row_id=True, **query).to_table()
            return Ranking(dataset, table["_rowid"].to_pylist(), table[score].to_pylist())

    def warm(self, index: str) -> None:
        """Read an index into memory whose version is searched a second time.

        Words that nobody asked for yet are read from files, which takes a search of forty words 5
        ms instead of 2; one search alone would wait longer for all of them.
        """
        dataset = self.dataset
        if self._searched is not dataset:
            self._searched, self._warm = dataset, False
        elif not self._warm and self.seal.rows <= _MAX_WARM_ROWS:
            self._warm = True
            with self.guarded("cannot be searched"):
                dataset.prewarm_index(index)

    def seen(self, identifiers: Sequence[str], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Those rows that were read before, in any order; `columns` holds "id".

        What was found is loaded next, and looking five ids up in their index takes 2 to 6 ms.
        """
        dataset = self.dataset
        addresses = self._seen.of(dataset)
        known = [addresses[name] for name in identifiers if name in addresses]
        return self.take(dataset, known, columns)

    # Writing: the caller holds the lock.

    def roll_forward(self) -> None:
        """Be at the newest version; seal what a killed writer had committed and not yet sealed."""
        self.refresh()
        with self.guarded("cannot be opened"):
            dataset = self._at(None)
            if dataset.version > self.version:
                self.seal = self._seal(dataset, "finished an interrupted write", self.seal.files)
                self.dataset = dataset

    def write(self, table: pa.Table) -> list[Any]:
        """Rows to files, which belong to no version before `commit`."""
        from lance.fragment import write_fragments

        with self.guarded("cannot be written"):
            fragments: list[Any] = write_fragments(
                table, self.dataset, table.schema, max_rows_per_file=2**20
            )
            return fragments

    def commit(
        self,
        fragments: Sequence[Any],
        gone: str | None,
        what: str,
        *,
        sealed: Mapping[str, seals.SealedFile] = _NONE,
    ) -> int:
        """Add files of rows and remove the rows where an expression holds, in one commit.

        Args:
            fragments: from `write`.
            gone: expression, or None; it sees the rows before the commit only.
            what: for people.
            sealed: files of the fragments that were hashed already.

        Returns:
            Rows removed.
        """
        lance = require("lance", extra="bank", purpose="a bank")
        with self.guarded("cannot be written"):
            changed, emptied, count = [], [], 0
            if gone is not None:
                for number, offsets in self._addresses(gone).items():
                    count += len(offsets)
                    left = self.dataset.get_fragment(number).delete_rows(offsets)
                    if left is None:
                        emptied.append(number)
                    else:
                        changed.append(left)
            if not fragments and not count:
                return 0
            operation = lance.LanceOperation.Append(list(fragments))
            if count:
                operation = lance.LanceOperation.Update(emptied, changed, list(fragments))
            self.files.check_writing()
            dataset = lance.LanceDataset.commit(
                self.dataset, operation, read_version=self.dataset.version, commit_message=what
            )
            if dataset.version != self.version + 1:
                raise BankError(
                    f"bank {self.files} was written by two processes at once: verify it"
                )
            self.seal = self._seal(dataset, what, {**self.seal.files, **sealed})
            self.dataset = dataset
        return count

    def change(self, act: Callable[[Any], Any], what: str) -> Any:
        """Let Lance change the dataset in place (indexes, compaction), then seal it."""
        with self.guarded("cannot be changed"):
            self.files.check_writing()
            result = act(self._at(self.version))
            dataset = self._at(None)
            if dataset.version != self.version:
                self.seal = self._seal(dataset, what, self.seal.files)
                self.dataset = dataset
        return result

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turn what Lance and pyarrow raise into one line."""
        try:
            yield
        except (StrataError, MemoryError, GeneratorExit):
            raise
        except Exception as error:
            raise self._say(error, what) from None
        except BaseException as error:
            if type(error).__name__ != _PANIC:
                raise
            raise self._say(error, what) from None

    def _say(self, error: BaseException, what: str) -> StrataError:
        text = " ".join(str(error).split()) or type(error).__name__
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        if full or "No space left on device" in text:
            return StorageError(f"the disk is full: bank {self.files} is as it was before")
        seal = getattr(self, "seal", None)
        if seal is not None and seal.version not in seals.versions(self.files):
            return BankError(
                f"version {seal.version} of bank {self.files} was removed by a compaction "
                "meanwhile: open the bank again"
            )
        short = text if len(text) <= 200 else text[:197] + "..."
        return BankError(f"bank {self.files} {what}, it may be damaged: verify it ({short})")

    def _open(self, version: int | None) -> None:
        last: BankError | None = None
        for _ in range(5):  # a compaction may remove the newest version just before it is opened
            known = seals.versions(self.files)
            if not known:
                raise BankError(f"bank {self.files} is damaged: it has no sealed version")
            wanted = known[-1] if version is None else version
            try:
                seal = seals.read(self.files, wanted)
                seals.check_for_opening(self.files, seal)
                with self.guarded("cannot be opened"):
                    dataset = self._at(wanted)
                    rows = dataset.count_rows()
            except BankError as error:
                last = error
                if version is not None or seals.versions(self.files)[-1:] == [wanted]:
                    raise
                continue
            if rows != seal.rows:
                raise BankError(
                    f"bank {self.files} is damaged: version {wanted} has {rows:,} rows, "
                    f"{seal.rows:,} were written"
                )
            self.seal, self.dataset, self._indexes_checked = seal, dataset, False
            return
        assert last is not None
        raise last

    def _at(self, version: int | None) -> Any:
        """The dataset at a version; None for the newest."""
        lance = require("lance", extra="bank", purpose="a bank")
        options = self.files.storage_options
        return lance.dataset(self.files.where(DATASET), version=version, storage_options=options)

    def _seal(self, dataset: Any, what: str, known: Mapping[str, seals.SealedFile]) -> seals.Seal:
        tracked = [
            path
            for batch in dataset.tracked_files(min_version=dataset.version)
            for path in batch["path"].to_pylist()
        ]
        return seals.write(
            self.files,
            version=dataset.version,
            rows=dataset.count_rows(),
            what=what,
            tracked=tracked,
            known=known,
        )

    def _addresses(self, where: str) -> dict[int, list[int]]:
        """Fragment -> offsets in it of the rows where an expression holds."""
        scanner = self.dataset.scanner(columns=[], filter=where, with_row_address=True)
        found: dict[int, list[int]] = defaultdict(list)
        for batch in scanner.to_batches():
            for address in batch["_rowaddr"].to_pylist():
                found[address >> 32].append(address & 0xFFFFFFFF)
        return found


class _Addresses:
    """Where rows of one dataset are, by id: the last ones that were read."""

    def __init__(self) -> None:
        self._held: tuple[Any, dict[str, int]] = (None, {})  # replaced whole: threads share it

    def of(self, dataset: Any) -> dict[str, int]:
        """Those of this dataset."""
        held, addresses = self._held
        return addresses if held is dataset else {}

    def add(self, dataset: Any, pairs: Iterable[tuple[str, int]]) -> None:
        """Rows that were read."""
        addresses = self.of(dataset)
        if not addresses or len(addresses) > _MAX_SEEN:
            addresses = {}
            self._held = dataset, addresses
        addresses.update(pairs)
