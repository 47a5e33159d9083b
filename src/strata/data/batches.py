"""The documents of all sources, grouped into batches that are encoded in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from strata.data.readers import Document, ReadOptions, read_documents
from strata.data.sources import Source

_MAX_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Position:
    """How far reading has come: `record` records of file number `source`, all files before it."""

    source: int
    record: int


@dataclass(frozen=True)
class TextBatch:
    """Documents that are encoded in one go.

    Attributes:
        documents: none of them empty.
        end: the position behind the last record looked at.
        num_empty: records without text that were left out.
        bytes_read: of all sources so far, for progress.
        size_bytes: about how much text the documents hold.
        is_val: all of them belong to the validation split.
    """

    documents: list[Document]
    end: Position
    num_empty: int
    bytes_read: int
    size_bytes: int
    is_val: bool = False


def read_batches(
    sources: Sequence[Source],
    *,
    options: ReadOptions,
    start: Position,
    batch_bytes: int,
    num_train: int,
) -> Iterator[TextBatch]:
    """Group the documents of all sources, from `start` on, into batches of about `batch_bytes`.

    The sources behind the first `num_train` are validation; no batch holds both kinds.
    """
    documents: list[Document] = []
    end = start
    size_bytes = num_empty = 0
    done_bytes = sum(source.entry.num_bytes for source in sources[: start.source])
    for number in range(start.source, len(sources)):
        is_val = number >= num_train
        if number == num_train and documents:
            yield TextBatch(documents, end, num_empty, done_bytes, size_bytes)
            documents, size_bytes, num_empty = [], 0, 0
        if number + 1 < len(sources):
            sources[number + 1].fetch_ahead()
        skip = start.record if number == start.source else 0
        for document in read_documents(sources[number], options=options, skip=skip):
            end = Position(number, document.record)
            if not document.text and not document.prompt:
                num_empty += 1
                continue
            documents.append(document)
            size_bytes += _size_bytes(document)
            if size_bytes >= batch_bytes or len(documents) >= _MAX_BATCH_DOCUMENTS:
                bytes_read = done_bytes + document.bytes_read
                yield TextBatch(documents, end, num_empty, bytes_read, size_bytes, is_val)
                documents, size_bytes, num_empty = [], 0, 0
        done_bytes += sources[number].entry.num_bytes
    is_val = len(sources) > num_train
    yield TextBatch(documents, end, num_empty, done_bytes, size_bytes, is_val)


def _size_bytes(document: Document) -> int:
    """About how many bytes of UTF-8 a document is, without encoding it."""
    return sum(len(text) if text.isascii() else 3 * len(text) for text in document[:2])
