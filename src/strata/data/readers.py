"""Documents out of parquet, jsonl and txt files, as a stream: no file is ever held whole.

A document is a text, or a prompt with its completion. Which one a row is depends on its fields:
the text field if it is there, else `prompt` and `completion`. Every record has a number in its
file (row of a parquet file, line of a jsonl file, block of a txt file), counted from 1, so that
reading can go on behind any record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from strata.data.sources import Source
from strata.data.streams import BOM, opened, refusing_damage
from strata.errors import DataError
from strata.files import parse_row

MAX_DOCUMENT_BYTES = 64 * 2**20

_PARQUET_BATCH_BYTES = 4 * 2**20
_PARQUET_BATCH_ROWS = 512


class Document(NamedTuple):
    """One document and where it stood.

    Attributes:
        text: what is learned; for a prompt and completion pair, the completion.
        prompt: what comes before it and carries no loss; empty for a plain text.
        record: its number in the file, from 1.
        bytes_read: how much of the file was read to get here, for progress only.
    """

    text: str
    prompt: str
    record: int
    bytes_read: int


class ReadOptions(NamedTuple):
    """How records become documents.

    Attributes:
        text_field: the field or column that holds a text.
        txt_documents: whether a txt file is one document, or each block between blank lines is.
        max_document_bytes: a longer document is refused.
    """

    text_field: str = "text"
    txt_documents: Literal["file", "paragraph"] = "file"
    max_document_bytes: int = MAX_DOCUMENT_BYTES


def read_documents(source: Source, *, options: ReadOptions, skip: int = 0) -> Iterator[Document]:
    """Stream the documents of one file, empty ones included.

    Args:
        source: the file.
        options: how records become documents.
        skip: leave out the records up to this number.

    Raises:
        DataError: the file is damaged, not UTF-8, without the needed fields, or a record in it is
            too long; the line says where.
    """
    with refusing_damage(source):
        if source.suffix == ".parquet":
            yield from _read_parquet(source, options, skip)
        elif source.suffix.startswith(".jsonl"):
            yield from _read_jsonl(source, options, skip)
        elif options.txt_documents == "paragraph":
            yield from _read_paragraphs(source, options, skip)
        elif skip == 0:
            yield _read_txt(source, options)


def read_rows(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream the rows of one jsonl or parquet file as they are, nested fields included.

    Args:
        source: the file.

    Yields:
        Where a row stands, for messages, and its fields. Blank lines are left out.

    Raises:
        DataError: the file is damaged, not UTF-8, a txt file, or a line is no JSON object or too
            long; the line says where.
    """
    path = source.path
    with refusing_damage(source):
        if source.suffix == ".parquet":
            with _parquet(source) as file:
                number = 0
                for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, use_threads=False):
                    for row in _pylist(batch, f"{path}, row {number + 1}"):
                        number += 1
                        yield f"{path}, row {number}", row
        elif source.suffix.startswith(".jsonl"):
            with opened(source) as (stream, _):
                for number, _, line in _lines(path, stream, ReadOptions()):
                    if line.strip():
                        where = f"{path}, line {number}"
                        yield where, parse_row(line, where)
        else:
            raise DataError(f"{path} has no fields: rows with fields come from jsonl or parquet")


def _pylist(batch: pa.RecordBatch, where: str) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UnicodeDecodeError:
        raise DataError(f"{where} or one of the {batch.num_rows} from it on is not UTF-8") from None
    return rows


# Rows of parquet files


@contextmanager
def _parquet(source: Source) -> Iterator[pq.ParquetFile]:
    # A buffer size makes arrow stream the column chunks; without it a row group is read whole.
    local = source.fetch()
    with (
        nullcontext(local) if local is not None else source.open() as given,
        pq.ParquetFile(given, buffer_size=1 << 20, pre_buffer=False) as file,
    ):
        yield file


def _read_parquet(source: Source, options: ReadOptions, skip: int) -> Iterator[Document]:
    path = source.path
    with _parquet(source) as file:
        columns = _parquet_columns(path, file.schema_arrow, options)
        size_bytes = source.entry.num_bytes
        num_rows = max(1, file.metadata.num_rows)
        row = 0
        for group in range(file.num_row_groups):
            group_rows = file.metadata.row_group(group).num_rows
            if row + group_rows <= skip:
                row += group_rows
                continue
            batches = file.iter_batches(
                batch_size=_parquet_batch_rows(file, group, columns),
                row_groups=[group],
                columns=columns,
                use_threads=False,
            )
            for batch in batches:
                for text, prompt in _rows(path, batch, columns, row, options):
                    row += 1
                    if row > skip:
                        yield Document(text, prompt, row, size_bytes * row // num_rows)


def _parquet_columns(path: Path, schema: pa.Schema, options: ReadOptions) -> list[str]:
    if options.text_field in schema.names:
        columns = [options.text_field]
    elif {"prompt", "completion"} <= set(schema.names):
        columns = ["completion", "prompt"]
    else:
        raise _missing_field(f"{path}", options.text_field, schema.names)
    for name in columns:
        kind = schema.field(name).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: column {name!r} holds {kind}, not strings")
    return columns


def _parquet_batch_rows(file: pq.ParquetFile, group: int, columns: list[str]) -> int:
    """How many rows of a row group to decode at once, for a few megabytes of text."""
    metadata = file.metadata.row_group(group)
    num_bytes = 1
    for index in range(metadata.num_columns):
        column = metadata.column(index)
        if column.path_in_schema in columns:
            num_bytes += column.total_uncompressed_size
    rows = _PARQUET_BATCH_BYTES * metadata.num_rows // num_bytes
    return max(1, min(rows, _PARQUET_BATCH_ROWS))


def _rows(
    path: Path, batch: pa.RecordBatch, columns: list[str], row: int, options: ReadOptions
) -> Iterator[tuple[str, str]]:
    """(text, prompt) of every row of a batch whose first row comes after `row` others."""
    arrays = [batch.column(name) for name in columns]
    for offset in range(batch.num_rows):
        try:
            values = [array[offset].as_py() or "" for array in arrays]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, row {row + offset + 1}: not UTF-8 (byte {error.start + 1} of the text)"
            ) from None
        if any(len(value) > options.max_document_bytes // 4 for value in values):
            _check_length(values, f"{path}, row {row + offset + 1}", options)
        yield values[0], values[1] if len(values) == 2 else ""


# Lines of jsonl files


def _read_jsonl(source: Source, options: ReadOptions, skip: int) -> Iterator[Document]:
    path = source.path
    with opened(source) as (stream, raw):
        for number, _, line in _lines(path, stream, options):
            if number <= skip or not line.strip():
                continue
            text, prompt = _parse_row(line, f"{path}, line {number}", options)
            yield Document(text, prompt, number, raw.tell())


def _parse_row(line: bytes, where: str, options: ReadOptions) -> tuple[str, str]:
    row = parse_row(line, where)
    if options.text_field in row:
        return _string(row, options.text_field, where), ""
    if "prompt" in row and "completion" in row:
        return _string(row, "completion", where), _string(row, "prompt", where)
    raise _missing_field(where, options.text_field, list(row))


def _string(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} holds {type(value).__name__}, not a string")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where}: field {field!r} holds half a surrogate pair") from None
    return value


def _missing_field(where: str, field: str, available: list[str]) -> DataError:
    names = ", ".join(repr(name[:40]) for name in available[:20]) or "none"
    return DataError(
        f"{where}: no field {field!r}, nor 'prompt' and 'completion'; available: {names}: "
        "name one with --text-field (text_field)"
    )


# Text files


def _read_txt(source: Source, options: ReadOptions) -> Document:
    path = source.path
    with opened(source) as (stream, raw):
        content = stream.read(options.max_document_bytes + 1)
        if len(content) > options.max_document_bytes:
            hint = "; read its paragraphs as documents (--paragraphs)"
            raise _too_long(f"{path}", "a txt file is one document and this one", options, hint)
        offset = len(BOM) if content.startswith(BOM) else 0
        return Document(_decode(content[offset:], path, offset, 1), "", 1, raw.tell())


def _read_paragraphs(source: Source, options: ReadOptions, skip: int) -> Iterator[Document]:
    path, record = source.path, 0
    with opened(source) as (stream, raw):
        for first_line, offset, block in _blocks(path, stream, options):
            record += 1
            if record > skip:
                text = _decode(block, path, offset, first_line).removesuffix("\n")
                yield Document(text.removesuffix("\r"), "", record, raw.tell())


def _blocks(path: Path, stream: BinaryIO, options: ReadOptions) -> Iterator[tuple[int, int, bytes]]:
    """(number of the first line, its byte offset, content) of each run of lines not blank."""
    block: list[bytes] = []
    block_bytes = start = first_line = 0
    for number, offset, line in _lines(path, stream, options):
        if line.strip():
            if not block:
                first_line, start = number, offset
            block.append(line)
            block_bytes += len(line)
            if block_bytes > options.max_document_bytes:
                raise _too_long(f"{path}, line {first_line}", "the block", options)
        elif block:
            yield first_line, start, b"".join(block)
            block, block_bytes = [], 0
    if block:
        yield first_line, start, b"".join(block)


def _decode(content: bytes, path: Path, offset: int, first_line: int) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}, line {line}: not UTF-8 (byte {offset + error.start} of the file is "
            f"0x{content[error.start]:02x}): convert it to UTF-8"
        ) from None


# Bounded reading


def _lines(path: Path, stream: BinaryIO, options: ReadOptions) -> Iterator[tuple[int, int, bytes]]:
    """(number, byte offset, line with its end) of each line; only a newline ends a line."""
    limit = options.max_document_bytes
    number = offset = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise _too_long(f"{path}, line {number}", "the line", options)
        if number == 1 and line.startswith(BOM):
            yield number, len(BOM), line[len(BOM) :]
        else:
            yield number, offset, line
        offset += len(line)


def _check_length(values: list[str], where: str, options: ReadOptions) -> None:
    if sum(len(value.encode("utf-8")) for value in values) > options.max_document_bytes:
        raise _too_long(where, "the document", options)


def _too_long(where: str, what: str, options: ReadOptions, hint: str = "") -> DataError:
    limit = options.max_document_bytes
    bound = f"{limit / 2**20:.0f} MiB" if limit >= 2**20 else f"{limit} bytes"
    if limit < MAX_DOCUMENT_BYTES:
        hint += ", or raise memory_gb (with more memory the bound is up to 64 MiB)"
    return DataError(f"{where}: {what} is longer than {bound}: split it{hint}")
