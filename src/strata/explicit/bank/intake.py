"""What an `add` makes of each document, whoever encodes it.

New, changed, there already, a duplicate. Documents are looked at one after another, as if those
before them were in the bank already; so what is decided does not depend on when and where they are
encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from strata.errors import BankError
from strata.explicit.bank import records
from strata.explicit.bank.given import Cut, DocumentLike, EmbedderLike, EncoderLike
from strata.explicit.bank.store import Store
from strata.explicit.codec import Codec
from strata.explicit.memories import Reference

MAX_LISTED = 1000


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


@dataclass(frozen=True)
class Change:
    """A document that changes the bank.

    Attributes:
        document: as given.
        source_id, text_id: hashes of its source and its text.
        metadata: of it, as JSON.
        is_known: whether its source holds another document, whose references go.
        is_stored: whether its references come; not where another source has its text.
    """

    document: DocumentLike
    source_id: str
    text_id: str
    metadata: str
    is_known: bool
    is_stored: bool


class Intake:
    """Looks at documents in their order; the writer's lock is held.

    Attributes:
        report: of what was committed, and of what needed no commit.
    """

    def __init__(self, store: Store) -> None:
        self._directory = Directory(store)
        self.report = AddReport()

    def look(self, document: DocumentLike) -> Change | None:
        """What a document changes; None if nothing.

        Raises:
            BankError: it cannot be stored.
        """
        if not isinstance(document.source, str) or not document.source:
            raise BankError(f"a document needs a source, given {document.source!r}")
        source_id = records.source_digest(document.source)
        text_id = records.text_digest(document.text)
        metadata = records.metadata_json(document.metadata)
        if self._directory.same(source_id, text_id, metadata):
            self.report = replace(self.report, unchanged=self.report.unchanged + 1)
            return None
        is_known = self._directory.known(source_id)
        holder = self._directory.holder(text_id)
        is_stored = holder is None or holder == document.source
        if not is_stored:
            assert holder is not None
            self._duplicate(document.source, holder)
            if not is_known:
                return None  # else its old text is no longer true
        return Change(document, source_id, text_id, metadata, is_known, is_stored)

    def keep(self, change: Change) -> None:
        """The source now holds this document."""
        self._directory.put(
            change.source_id, change.document.source, change.text_id, change.metadata
        )

    def drop(self, change: Change) -> None:
        """The source now holds nothing."""
        self._directory.drop(change.source_id, change.document.source)

    def holds(self, change: Change) -> bool:
        """Whether the source holds exactly this document."""
        return self._directory.same(change.source_id, change.text_id, change.metadata)

    def committed(self, batch: AddReport) -> None:
        """Add what a commit did to the report."""
        report = self.report
        self.report = replace(
            report,
            documents=report.documents + batch.documents,
            references=report.references + batch.references,
            replaced=report.replaced + batch.replaced,
            empty=report.empty + batch.empty,
            references_removed=report.references_removed + batch.references_removed,
            commits=report.commits + batch.commits,
        )

    def _duplicate(self, source: str, holder: str) -> None:
        report = self.report
        listed = report.duplicates
        if len(listed) < MAX_LISTED:
            listed = (*listed, (source, holder))
        self.report = replace(report, num_duplicates=report.num_duplicates + 1, duplicates=listed)


@dataclass(frozen=True)
class Means:
    """What documents become rows with.

    Attributes:
        cut: a document to its references.
        codec: of the bank; None for cold rows.
        encoder: of the bank's model; None for cold rows.
        embedder: of the bank; None where it holds no vectors.
    """

    cut: Cut
    codec: Codec | None
    encoder: EncoderLike | None
    embedder: EmbedderLike | None

    def rows(
        self, references: Sequence[Reference], text_ids: Sequence[str], columns: pa.Schema
    ) -> pa.Table:
        """References embedded and encoded, all at once.

        Args:
            references: n.
            text_ids: n hashes of the documents' texts.
            columns: of the dataset.
        """
        texts = [reference.text for reference in references]
        vectors = None if self.embedder is None else embedded(self.embedder, texts)
        blobs = None
        if self.encoder is not None:
            assert self.codec is not None
            blobs = self.codec.encode(self.encoder.encode(texts))
        return records.to_table(references, text_ids, vectors, blobs, columns)


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
