"""Files that hold one document a row: JSON lines and parquet, streamed.

Rows are counted from 1, blank lines of a jsonl file included, so that a number is also the line.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from strata.errors import DataError
from strata.files import parse_row

if TYPE_CHECKING:
    import pyarrow as pa

MAX_ROW_BYTES = 64 * 2**20
MAX_LABEL_CHARS = 1_000

_BATCH_BYTES = 4 * 2**20
_BATCH_ROWS = 512
_BOM = b"\xef\xbb\xbf"
_FIELD_HINT = "name the right one with --text-field (text_field)"


class RowFields(NamedTuple):
    """Which fields of a row are what.

    Attributes:
        text: holds the document.
        id: names it; None for "file#row".
        metadata: kept as metadata; None for every scalar but strings longer than
            `MAX_LABEL_CHARS`, which are texts and no labels.
    """

    text: str
    id: str | None
    metadata: frozenset[str] | None

    def wants(self, field: str) -> bool:
        """Whether a field is metadata, as far as its name tells."""
        if field in (self.text, self.id):
            return False
        return self.metadata is None or field in self.metadata


class Row(NamedTuple):
    """One row: its number in the file, from 1; its id, empty without an id field."""

    number: int
    id: str
    text: str
    metadata: dict[str, Any]


def read_rows(path: Path, fields: RowFields) -> Iterator[Row]:
    """Stream the rows of a .parquet, .jsonl or .jsonl.gz file.

    Raises:
        DataError: damaged, not UTF-8, without the text or id field, or a row is too long; the line
            says which row. The rows before it have been given.
    """
    import pyarrow as pa

    try:
        if path.suffix.lower() == ".parquet":
            yield from _read_parquet(path, fields)
        else:
            yield from _read_jsonl(path, fields)
    except (EOFError, zlib.error, gzip.BadGzipFile, pa.ArrowException) as error:
        raise _damaged(path, error) from None
    except OSError as error:
        if error.errno is None:  # arrow's own, about the content
            raise _damaged(path, error) from None
        raise


def _too_long(where: str) -> DataError:
    return DataError(f"{where}: longer than {MAX_ROW_BYTES / 2**20:.0f} MiB: split it")


def _damaged(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200]
    return DataError(f"{path} is damaged or not {path.suffix[1:].lower()}: {reason}")


# JSON lines


def _read_jsonl(path: Path, fields: RowFields) -> Iterator[Row]:
    with _open(path) as stream:
        number = 0
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_ROW_BYTES:
                raise _too_long(where)
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield _row(parse_row(line, where), number, where, fields)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as raw:
        if path.suffix.lower() == ".gz":
            with gzip.open(raw, "rb") as stream:
                yield stream  # type: ignore[misc]
        else:
            yield raw


# Rows of parquet files


def _read_parquet(path: Path, fields: RowFields) -> Iterator[Row]:
    import pyarrow.parquet as pq

    # A buffer size makes arrow stream the column chunks; without it a row group is read whole.
    with pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        columns = _columns(path, file.schema_arrow, fields)
        number = 0
        for group in range(file.num_row_groups):
            batches = file.iter_batches(
                batch_size=_batch_rows(file.metadata.row_group(group), columns),
                row_groups=[group],
                columns=columns,
                use_threads=False,
            )
            for batch in batches:
                arrays = [_readable(array) for array in batch.columns]
                for offset in range(batch.num_rows):
                    number += 1
                    where = f"{path}, row {number}"
                    try:
                        values = [array[offset].as_py() for array in arrays]
                    except UnicodeDecodeError:
                        raise DataError(f"{where}: not UTF-8") from None
                    found = dict(zip(batch.schema.names, values, strict=True))
                    yield _row(found, number, where, fields)


def _columns(path: Path, schema: pa.Schema, fields: RowFields) -> list[str]:
    import pyarrow as pa

    for needed in filter(None, (fields.text, fields.id)):
        if needed not in schema.names:
            raise _missing_field(str(path), needed, schema.names)
    kind = _plain(schema.field(fields.text).type)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{path}: column {fields.text!r} holds {kind}, not strings: {_FIELD_HINT}")
    if fields.id is not None and not _is_scalar(schema.field(fields.id).type):
        kind = schema.field(fields.id).type
        raise DataError(f"{path}: column {fields.id!r} holds {kind}, which names no document")
    labels = [f.name for f in schema if fields.wants(f.name) and _is_scalar(f.type)]
    return list(dict.fromkeys([fields.text, *filter(None, [fields.id]), *labels]))


def _plain(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_scalar(kind: pa.DataType) -> bool:
    from pyarrow import types

    kind = _plain(kind)
    return any(
        test(kind)
        for test in (
            types.is_boolean,
            types.is_integer,
            types.is_floating,
            types.is_string,
            types.is_large_string,
            types.is_temporal,
            types.is_decimal,
        )
    )


def _readable(array: pa.Array) -> pa.Array:
    """Times and decimals as their text: JSON has neither."""
    from pyarrow import types

    if types.is_temporal(array.type) or types.is_decimal(array.type):
        return array.cast("string")
    return array


def _batch_rows(group: Any, columns: Sequence[str]) -> int:
    """How many rows of a row group to decode at once, for a few megabytes of columns."""
    num_bytes = 1
    for index in range(group.num_columns):
        column = group.column(index)
        if column.path_in_schema in columns:
            num_bytes += column.total_uncompressed_size
    return max(1, min(_BATCH_BYTES * group.num_rows // num_bytes, _BATCH_ROWS))


# Rows of either


def _row(row: Mapping[str, Any], number: int, where: str, fields: RowFields) -> Row:
    text = _field(row, fields.text, where)
    if text is None:
        text = ""
    if not isinstance(text, str):
        kind = type(text).__name__
        raise DataError(f"{where}: field {fields.text!r} holds {kind}, not a string: {_FIELD_HINT}")
    _check_string(text, fields.text, where)
    if len(text) > MAX_ROW_BYTES // 4 and len(text.encode("utf-8")) > MAX_ROW_BYTES:
        raise _too_long(where)
    return Row(number, _name(row, where, fields), text, _metadata(row, where, fields))


def _name(row: Mapping[str, Any], where: str, fields: RowFields) -> str:
    if fields.id is None:
        return ""
    name = _field(row, fields.id, where)
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise DataError(
            f"{where}: id field {fields.id!r} holds {str(name)[:40]!r}: a document needs a text or "
            "a whole number as its id"
        )
    name = str(name)
    _check_string(name, fields.id, where)
    return name


def _metadata(row: Mapping[str, Any], where: str, fields: RowFields) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for field, value in row.items():
        if not fields.wants(field) or not isinstance(value, str | int | float):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            continue  # no JSON value
        if isinstance(value, str):
            if fields.metadata is None and len(value) > MAX_LABEL_CHARS:
                continue
            _check_string(value, field, where)
        _check_string(field, field, where)
        kept[field] = value
    return kept


def _field(row: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in row:
        raise _missing_field(where, field, list(row))
    return row[field]


def _check_string(value: str, field: str, where: str) -> None:
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where}: field {field!r} holds half a surrogate pair") from None


def _missing_field(where: str, field: str, available: Sequence[str]) -> DataError:
    names = ", ".join(repr(name[:40]) for name in available[:20]) or "none"
    return DataError(f"{where}: no field {field!r}; available: {names}: name one of these")
