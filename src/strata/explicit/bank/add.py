"""Documents into a bank: what is new is cut, embedded, encoded and committed, batch by batch.

A commit holds whole documents only, and takes the old references of a changed document out as it
puts the new ones in. What was committed is skipped by the next run over the same documents, so a
killed run is finished by running it again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from strata.errors import BankError
from strata.explicit.bank import records
from strata.explicit.bank.given import Cut, DocumentLike, EmbedderLike, EncoderLike
from strata.explicit.bank.store import Store
from strata.explicit.codec import Codec
from strata.explicit.memories import Reference

MAX_LISTED = 1000
_PENDING_BYTES = 64 * 2**20  # of rows held in memory before they go to a file
_PENDING_DOCUMENTS = 4096


@dataclass(frozen=True)
class AddReport:
    """What one `add` did so far.

    Attributes:
        documents: written, the replaced ones among them.
        references: written.
        replaced: documents that had changed under their source.
        unchanged: documents that were there already.
        empty: documents without a single reference.
        num_duplicates: documents whose text the bank has under another source; not stored.
        duplicates: the first thousand of them, with the source that has their text.
        references_removed: of replaced documents.
        commits: made.
    """

    documents: int = 0
    references: int = 0
    replaced: int = 0
    unchanged: int = 0
    empty: int = 0
    num_duplicates: int = 0
    duplicates: tuple[tuple[str, str], ...] = ()
    references_removed: int = 0
    commits: int = 0


class Directory:
    """Which document each source of a bank holds; some 300 bytes a document in memory."""

    def __init__(self, store: Store) -> None:
        self._of_source: dict[bytes, tuple[bytes, int]] = {}
        self._source_of: dict[bytes, str] = {}
        columns = ["source_id", "document", "source", "metadata"]
        for batch in store.scan(columns, rows_at_once=8192):
            lists = (batch[name].to_pylist() for name in columns)
            for source_id, document, source, metadata in zip(*lists, strict=True):
                key = bytes.fromhex(source_id)
                if key not in self._of_source:
                    self._of_source[key] = bytes.fromhex(document), hash(metadata)
                    self._source_of.setdefault(bytes.fromhex(document), source)

    def known(self, source_id: str) -> bool:
        """Whether a source has a document."""
        return bytes.fromhex(source_id) in self._of_source

    def same(self, source_id: str, document: str, metadata: str) -> bool:
        """Whether a source holds exactly this."""
        wanted = bytes.fromhex(document), hash(metadata)
        return self._of_source.get(bytes.fromhex(source_id)) == wanted

    def holder(self, document: str) -> str | None:
        """The source that holds a text."""
        return self._source_of.get(bytes.fromhex(document))

    def put(self, source_id: str, source: str, document: str, metadata: str) -> None:
        """A source now holds this instead of what it held."""
        self.drop(source_id, source)
        self._of_source[bytes.fromhex(source_id)] = bytes.fromhex(document), hash(metadata)
        self._source_of.setdefault(bytes.fromhex(document), source)

    def drop(self, source_id: str, source: str) -> None:
        """A source holds nothing now."""
        old = self._of_source.pop(bytes.fromhex(source_id), None)
        if old is not None and self._source_of.get(old[0]) == source:
            del self._source_of[old[0]]


class Adder:
    """One run of `add`; the writer's lock is held.

    Args:
        store: at its newest version.
        codec: of the bank; None for cold rows.
        batch_references: a commit is made at the first document's end after as many.
        batch_size: references embedded and encoded at a time.
    """

    def __init__(
        self,
        store: Store,
        *,
        cut: Cut,
        codec: Codec | None,
        encoder: EncoderLike | None,
        embedder: EmbedderLike | None,
        batch_references: int,
        batch_size: int,
        on_progress: Callable[[AddReport], None] | None,
    ) -> None:
        self._store, self._cut, self._codec = store, cut, codec
        self._encoder, self._embedder = encoder, embedder
        self._batch_references, self._batch_size = batch_references, batch_size
        self._on_progress = on_progress
        self._directory = Directory(store)
        self.report = AddReport()
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
        return self.report

    def _start_batch(self) -> None:
        self._batch = AddReport()
        self._sources: set[str] = set()  # source ids of the documents in this batch
        self._gone: list[str] = []  # those of them that were in the bank before
        self._waiting: list[tuple[Reference, str]] = []  # cut, not yet encoded
        self._tables: list[Any] = []  # encoded, not yet in a file
        self._table_bytes = 0
        self._fragments: list[Any] = []  # in files, not yet committed

    def _take(self, document: DocumentLike) -> None:
        if not isinstance(document.source, str) or not document.source:
            raise BankError(f"a document needs a source, given {document.source!r}")
        source_id = records.source_digest(document.source)
        text_id = records.text_digest(document.text)
        metadata = records.metadata_json(document.metadata)
        if self._directory.same(source_id, text_id, metadata):
            self.report = replace(self.report, unchanged=self.report.unchanged + 1)
            return
        holder = self._directory.holder(text_id)
        if holder is not None and holder != document.source:
            self._duplicate(document.source, holder)
            if not self._directory.known(source_id):
                return
            references: Sequence[Reference] = ()  # its old text is no longer true
        else:
            references = self._cut(document)
        if source_id in self._sources:
            self._commit()  # twice in one run: two commits, the later one stays
        old = self._directory.known(source_id)
        if old:
            self._gone.append(source_id)
        if not references:
            if holder is None or holder == document.source:
                self._batch = replace(self._batch, empty=self._batch.empty + 1)
            self._directory.drop(source_id, document.source)
            if old:
                self._sources.add(source_id)
            return
        self._sources.add(source_id)
        self._directory.put(source_id, document.source, text_id, metadata)
        batch = self._batch
        self._batch = replace(
            batch,
            documents=batch.documents + 1,
            references=batch.references + len(references),
            replaced=batch.replaced + old,
        )
        for reference in references:
            self._waiting.append((reference, text_id))
            if len(self._waiting) >= self._batch_size:
                self._encode()

    def _duplicate(self, source: str, holder: str) -> None:
        report = self.report
        listed = report.duplicates
        if len(listed) < MAX_LISTED:
            listed = (*listed, (source, holder))
        self.report = replace(report, num_duplicates=report.num_duplicates + 1, duplicates=listed)

    def _encode(self) -> None:
        """Rows of what waits; to a file once there are many."""
        if not self._waiting:
            return
        references = [reference for reference, _ in self._waiting]
        texts = [reference.text for reference in references]
        vectors = None if self._embedder is None else embedded(self._embedder, texts)
        blobs = None
        if self._encoder is not None:
            assert self._codec is not None
            blobs = self._codec.encode(self._encoder.encode(texts))
        documents = [document for _, document in self._waiting]
        table = records.to_table(references, documents, vectors, blobs, self._store.columns)
        self._waiting = []
        self._tables.append(table)
        self._table_bytes += table.nbytes
        if self._table_bytes >= _PENDING_BYTES:
            self._write()

    def _write(self) -> None:
        if self._tables:
            import pyarrow as pa

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
        report, batch = self.report, self._batch
        self.report = replace(
            report,
            documents=report.documents + batch.documents,
            references=report.references + batch.references,
            replaced=report.replaced + batch.replaced,
            empty=report.empty + batch.empty,
            references_removed=report.references_removed + removed,
            commits=report.commits + bool(self._fragments or self._gone),
        )
        self._start_batch()
        if self._on_progress is not None:
            self._on_progress(self.report)


def embedded(embedder: EmbedderLike, texts: Sequence[str]) -> np.ndarray:
    """Vectors of texts, checked.

    Raises:
        BankError: another shape, or a number that is not finite.
    """
    vectors = np.asarray(embedder.embed_documents(texts), dtype=np.float32)
    if vectors.shape != (len(texts), embedder.width):
        raise BankError(
            f"embedder {embedder.name!r} gave vectors of shape {vectors.shape}, "
            f"{(len(texts), embedder.width)} were asked for"
        )
    if not np.isfinite(vectors).all():
        raise BankError(f"embedder {embedder.name!r} gave NaN or infinity")
    return vectors


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
