"""The rows of a bank: what they hold, what they are called, and how each is checked.

A row's checksum is three digests of 16 bytes: of what a search returns (id, document, source, span,
text, metadata), of its vector, and of its codes, the last two together with the id and zero where
there is none. So a search checks what it returns without reading codes, and codes without text.

No text of a user's stands in an expression that Lance evaluates: sources and metadata conditions
are hashed, and expressions hold hexadecimal digits only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa

from strata.errors import BankError
from strata.explicit.hits import Hit
from strata.explicit.memories import Reference

MAX_TEXT_BYTES = 2**20
MAX_SOURCE_BYTES = 4096
MAX_METADATA_BYTES = 64 * 2**10
DIGEST_BYTES = 16

NOTHING = bytes(DIGEST_BYTES)
HIT_COLUMNS = ["id", "document", "source", "start", "end", "text", "metadata", "checksum"]


@dataclass(frozen=True)
class Record:
    """One row, whole.

    Attributes:
        id: hash of source, span and text.
        document: hash of the document's text.
        vector: fp32 (width,), or None.
        codes: one memory as the bank's codec wrote it, or None while it is cold.
    """

    id: str
    document: str
    text: str
    source: str
    start: int
    end: int
    metadata: Mapping[str, Any]
    vector: np.ndarray | None
    codes: bytes | None


def schema(vector_width: int | None) -> pa.Schema:
    """Columns of the dataset; without a width there are no vectors."""
    fields = [
        pa.field("id", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("source_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("end", pa.int64(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("metadata", pa.string(), nullable=False),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("codes", pa.binary()),
        pa.field("checksum", pa.binary(3 * DIGEST_BYTES), nullable=False),
    ]
    if vector_width is not None:
        fields.append(pa.field("vector", pa.list_(pa.float32(), vector_width)))
    return pa.schema(fields)


def text_digest(text: str) -> str:
    """Hash of a document's text, 32 hexadecimal digits."""
    return _digest(b"document", encoded(text, "text"))


def source_digest(source: str) -> str:
    """Hash of a source's name."""
    return _digest(b"source", encoded(source, "source"))


def metadata_json(metadata: Mapping[str, Any]) -> str:
    """Metadata as JSON text, equal for equal metadata.

    Raises:
        BankError: it holds something that JSON has not, or is too long.
    """
    try:
        text = json.dumps(
            dict(metadata), sort_keys=True, ensure_ascii=True, allow_nan=False,
            separators=(",", ":"),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise BankError(f"metadata {_short(metadata)} is no JSON object: {error}") from None
    if len(text) > MAX_METADATA_BYTES:
        raise BankError(f"metadata of {len(text):,} bytes: at most {MAX_METADATA_BYTES:,}")
    return text


def tag(key: str, value: Any) -> str:
    """What stands for the condition "metadata[key] == value"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 3 == 3.0, as in Python
    pair = json.dumps([key, value], sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return _digest(b"tag", pair.encode())


def tags(metadata: Mapping[str, Any]) -> list[str]:
    """Tags of all keys."""
    return sorted(tag(key, value) for key, value in metadata.items())


def condition(where: Mapping[str, Any] | None) -> str | None:
    """An expression for "metadata has all these values"; None for no condition.

    Raises:
        BankError: a key is no string, or a value is not JSON.
    """
    if not where:
        return None
    for key in where:
        if not isinstance(key, str):
            raise BankError(f"metadata keys are strings, given {key!r}")
    given = json.loads(metadata_json(where))
    return " AND ".join(f"array_has(tags, '{tag(key, value)}')" for key, value in given.items())


def one_of(column: str, digests: Iterable[str]) -> str:
    """An expression for "column is one of these", which must be hexadecimal."""
    listed = list(digests)
    for digest in listed:
        check_id(digest)
    return f"{column} IN ({', '.join(repr(digest) for digest in listed)})"


def check_id(identifier: str) -> None:
    """Refuse what cannot be a record's id.

    Raises:
        BankError: it is not 32 hexadecimal digits.
    """
    if len(identifier) != 2 * DIGEST_BYTES or not set(identifier) <= set("0123456789abcdef"):
        raise BankError(f"{_short(identifier)} is no record id: ids are 32 hexadecimal digits")


def record_id(reference: Reference) -> str:
    """Hash of source, span and text."""
    return _digest(
        b"record",
        encoded(reference.source, "source"),
        b"%d" % reference.start,
        b"%d" % reference.end,
        encoded(reference.text, "text"),
    )


def to_table(
    references: Sequence[Reference],
    documents: Sequence[str],
    vectors: np.ndarray | None,
    blobs: Sequence[bytes] | None,
    columns: pa.Schema,
) -> pa.Table:
    """Rows for the dataset.

    Args:
        references: n.
        documents: n hashes of the documents' texts.
        vectors: (n, width) fp32, finite, or None.
        blobs: n memories' codes, or None for cold rows.
        columns: of the dataset.

    Raises:
        BankError: a text, source or metadata is too long or cannot be stored.
    """
    rows = []
    for at, (reference, document) in enumerate(zip(references, documents, strict=True)):
        for name, value, most in (
            ("text", reference.text, MAX_TEXT_BYTES),
            ("source", reference.source, MAX_SOURCE_BYTES),
        ):
            size = len(encoded(value, name))
            if size > most:
                raise BankError(
                    f"{name} of {size:,} bytes from {_short(reference.source)}: at most {most:,}"
                )
        row = {
            "id": record_id(reference),
            "document": document,
            "source_id": source_digest(reference.source),
            "source": reference.source,
            "start": reference.start,
            "end": reference.end,
            "text": reference.text,
            "metadata": metadata_json(reference.metadata),
            "tags": tags(json.loads(metadata_json(reference.metadata))),
            "codes": None if blobs is None else blobs[at],
        }
        if vectors is not None:
            row["vector"] = vectors[at]
        row["checksum"] = checksum(row)
        rows.append(row)
    return table_of(rows, columns)


def table_of(rows: Sequence[Mapping[str, Any]], columns: pa.Schema) -> pa.Table:
    """Rows as a table of the dataset; a missing column is null."""
    arrays = []
    for field in columns:
        values = [row.get(field.name) for row in rows]
        if field.name == "vector":
            missing = np.array([value is None for value in values], bool)
            zero = np.zeros(field.type.list_size, np.float32)
            flat = np.concatenate([zero if v is None else v for v in values] or [zero[:0]])
            array = pa.FixedSizeListArray.from_arrays(
                pa.array(flat.astype(np.float32, copy=False)),
                type=field.type,
                mask=pa.array(missing),
            )
        else:
            array = pa.array(values, field.type)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, schema=columns)


def checksum(row: Mapping[str, Any]) -> bytes:
    """The three digests of a row, 48 bytes."""
    return (
        text_check(row)
        + vector_check(row["id"], row.get("vector"))
        + codes_check(row["id"], row["codes"])
    )


def text_check(row: Mapping[str, Any]) -> bytes:
    """Digest of what a search returns."""
    numbers = b"%d" % row["start"], b"%d" % row["end"]
    names = ("id", "document", "source", "text", "metadata")
    return bytes.fromhex(_digest(b"text", *(row[name].encode() for name in names), *numbers))


def vector_check(identifier: str, vector: Any) -> bytes:
    """Digest of a vector; zeros for none."""
    if vector is None:
        return NOTHING
    content = np.asarray(vector, "<f4").tobytes()
    return bytes.fromhex(_digest(b"vector", identifier.encode(), content))


def codes_check(identifier: str, codes: bytes | None) -> bytes:
    """Digest of codes; zeros for none."""
    if codes is None:
        return NOTHING
    return bytes.fromhex(_digest(b"codes", identifier.encode(), codes))


def checked_hit(row: Mapping[str, Any], score: float) -> Hit:
    """A row with the columns HIT_COLUMNS as a hit.

    Raises:
        BankError: it is not what was written.
    """
    if text_check(row) != row["checksum"][:DIGEST_BYTES]:
        raise damaged(row)
    return Hit(
        id=row["id"],
        score=score,
        text=row["text"],
        source=row["source"],
        start=row["start"],
        end=row["end"],
        metadata=json.loads(row["metadata"]),
    )


def checked_codes(row: Mapping[str, Any]) -> bytes | None:
    """The codes of a row with columns id, codes and checksum; None for a cold one.

    Raises:
        BankError: they are not what was written.
    """
    if codes_check(row["id"], row["codes"]) != row["checksum"][2 * DIGEST_BYTES :]:
        raise damaged(row)
    codes = row["codes"]
    return None if codes is None else bytes(codes)


def checked_record(row: Mapping[str, Any]) -> Record:
    """A whole row.

    Raises:
        BankError: it is not what was written.
    """
    if checksum(row) != row["checksum"]:
        raise damaged(row)
    vector = row.get("vector")
    return Record(
        id=row["id"],
        document=row["document"],
        text=row["text"],
        source=row["source"],
        start=row["start"],
        end=row["end"],
        metadata=json.loads(row["metadata"]),
        vector=None if vector is None else np.asarray(vector, np.float32),
        codes=row["codes"],
    )


def content_digest(checks: Iterable[bytes]) -> str:
    """A hash of rows by their checksums, whatever their order; 48 bytes a row are held."""
    digest = blake2b(digest_size=32, person=b"strata content")
    for check in sorted(checks):
        digest.update(check)
    return digest.hexdigest()


def is_cold(check: bytes) -> bool:
    """Whether a row with this checksum has no codes; reading the codes would take far longer."""
    return check[2 * DIGEST_BYTES :] == NOTHING


def without_codes(check: bytes) -> bytes:
    """The part of a checksum that is about text, metadata and vector."""
    return check[: 2 * DIGEST_BYTES]


def damaged(row: Mapping[str, Any]) -> BankError:
    """What to raise for a row that is not what was written."""
    return BankError(
        f"record {_short(row['id'])} of the bank is damaged: verify the bank, then remove and add "
        "its source again"
    )


def encoded(text: str, name: str) -> bytes:
    """UTF-8 of a string of a user's.

    Raises:
        BankError: it holds half a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise BankError(
            f"{name} {_short(text)} is no text: half a surrogate pair at {error.start}"
        ) from None


def _digest(kind: bytes, *parts: bytes) -> str:
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"strata " + kind)
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)
    return digest.hexdigest()


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."
