"""Documents into a bank: what is new is cut, embedded, encoded and committed, batch by batch.

A commit holds whole documents only, and takes the old references of a changed document out as it
puts the new ones in. What was committed is skipped by the next run over the same documents, so a
killed run is finished by running it again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa

from strata.explicit.bank import records
from strata.explicit.bank.given import Cut, DocumentLike
from strata.explicit.bank.intake import AddReport, Intake, Means
from strata.explicit.bank.store import Store
from strata.explicit.memories import Reference

_PENDING_BYTES = 64 * 2**20  # of rows held in memory before they go to a file
_PENDING_DOCUMENTS = 4096


class Adder:
    """One run of `add`; the writer's lock is held.

    Args:
        store: at its newest version.
        means: what documents become rows with.
        batch_references: a commit is made at the first document's end after as many.
        batch_size: references embedded and encoded at a time.
    """

    def __init__(
        self,
        store: Store,
        means: Means,
        *,
        batch_references: int,
        batch_size: int,
        on_progress: Callable[[AddReport], None] | None,
    ) -> None:
        self._store, self._means = store, means
        self._batch_references, self._batch_size = batch_references, batch_size
        self._on_progress = on_progress
        self._intake = Intake(store)
        self._start_batch()

    def run(self, documents: Iterable[DocumentLike]) -> AddReport:
        """Add all documents."""
        for document in documents:
            self._take(document)
            if (
                self._batch.references >= self._batch_references
                or len(self._sources) >= _PENDING_DOCUMENTS
            ):
                self._commit()
        self._commit()
        return self._intake.report

    def _start_batch(self) -> None:
        self._batch = AddReport()
        self._sources: set[str] = set()  # source ids of the documents in this batch
        self._gone: list[str] = []  # those of them that were in the bank before
        self._waiting: list[tuple[Reference, str]] = []  # cut, not yet encoded
        self._tables: list[pa.Table] = []  # encoded, not yet in a file
        self._table_bytes = 0
        self._fragments: list[Any] = []  # in files, not yet committed

    def _take(self, document: DocumentLike) -> None:
        change = self._intake.look(document)
        if change is None:
            return
        references: Sequence[Reference] = self._means.cut(document) if change.is_stored else ()
        if change.source_id in self._sources:
            self._commit()  # twice in one run: two commits, the later one stays
        if change.is_known:
            self._gone.append(change.source_id)
        if not references:
            self._batch = replace(self._batch, empty=self._batch.empty + change.is_stored)
            self._intake.drop(change)
            if change.is_known:
                self._sources.add(change.source_id)
            return
        self._sources.add(change.source_id)
        self._intake.keep(change)
        batch = self._batch
        self._batch = replace(
            batch,
            documents=batch.documents + 1,
            references=batch.references + len(references),
            replaced=batch.replaced + change.is_known,
        )
        for reference in references:
            self._waiting.append((reference, change.text_id))
            if len(self._waiting) >= self._batch_size:
                self._encode()

    def _encode(self) -> None:
        """Rows of what waits; to a file once there are many."""
        if not self._waiting:
            return
        references, text_ids = zip(*self._waiting, strict=True)
        table = self._means.rows(references, text_ids, self._store.columns)
        self._waiting = []
        self._tables.append(table)
        self._table_bytes += table.nbytes
        if self._table_bytes >= _PENDING_BYTES:
            self._write()

    def _write(self) -> None:
        if self._tables:
            self._fragments += self._store.write(pa.concat_tables(self._tables))
            self._tables, self._table_bytes = [], 0

    def _commit(self) -> None:
        self._encode()
        self._write()
        removed = 0
        if self._fragments or self._gone:
            gone = records.one_of("source_id", self._gone) if self._gone else None
            what = f"add {self._batch.documents} documents"
            removed = self._store.commit(self._fragments, gone, what)
        commits = int(bool(self._fragments or self._gone))
        self._intake.committed(replace(self._batch, references_removed=removed, commits=commits))
        self._start_batch()
        if self._on_progress is not None:
            self._on_progress(self._intake.report)


def sample_references(documents: Iterable[DocumentLike], cut: Cut, count: int) -> list[Reference]:
    """The references whose ids are smallest: a sample that does not depend on their order.

    Ids are hashes, so every reference is as likely as any other.
    """
    kept: list[tuple[int, int, Reference]] = []  # largest id first
    seen: set[int] = set()
    serial = 0
    for document in documents:
        records.metadata_json(document.metadata)
        for reference in cut(document):
            number = int(records.record_id(reference), 16)
            if number in seen:
                continue
            serial += 1
            if len(kept) < count:
                heapq.heappush(kept, (-number, serial, reference))
                seen.add(number)
            elif -number > kept[0][0]:
                dropped = heapq.heapreplace(kept, (-number, serial, reference))
                seen.discard(-dropped[0])
                seen.add(number)
    return [reference for _, _, reference in sorted(kept, key=lambda entry: -entry[0])]
