"""Reading everything in a bank once, and saying what is broken."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from strata.errors import BankError
from strata.explicit.bank import records, seals
from strata.explicit.bank.store import Store
from strata.explicit.codec import Codec
from strata.explicit.memories import Reference

MAX_FAULTS = 1000
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class VerifyReport:
    """What a look at everything found.

    Attributes:
        records, files: looked at.
        faults: one line for each thing that is broken, the first thousand; empty: all is well.
    """

    records: int
    files: int
    faults: tuple[str, ...]


def verify(store: Store, codec: Codec | None) -> VerifyReport:
    """Hash every file of this version, and check every record against its checksum and codec."""
    faults: list[str] = []
    for name, entry in store.seal.files.items():
        try:
            seals.check_dataset_file(store.files, name, entry)
        except BankError as error:
            faults.append(str(error))
    count = 0
    seen: set[bytes] = set()
    for row in _rows(store, faults):
        count += 1
        said = record_fault(row, codec)
        key = bytes.fromhex(row["id"]) if said is None else b""
        if said is None and key in seen:
            said = "stands in the bank twice"
        seen.add(key)
        if said is not None and len(faults) < MAX_FAULTS:
            faults.append(f"record {ascii(row['id'])[:80]} of {ascii(row['source'])[:80]} {said}")
    return VerifyReport(count, len(store.seal.files), tuple(faults))


def record_fault(row: Mapping[str, Any], codec: Codec | None) -> str | None:
    """What is wrong with a whole row; None for nothing."""
    try:
        records.checked_record(row)
        metadata = json.loads(row["metadata"])
        reference = Reference(row["text"], row["source"], row["start"], row["end"], metadata)
        derived = {
            "id": records.record_id(reference),
            "source_id": records.source_digest(row["source"]),
            "tags": records.tags(metadata),
        }
    except (BankError, ValueError, AttributeError, TypeError):
        return "is not what was written: remove and add its source again"
    for name, value in derived.items():
        if row[name] != value:
            return f"has a damaged {name}: remove and add its source again"
    vector = row.get("vector")
    if vector is not None and not np.isfinite(np.asarray(vector, np.float32)).all():
        return "has a vector with NaN or infinity"
    if row["codes"] is not None:
        if codec is None:
            return "has codes, but the bank belongs to no model"
        try:
            codec.decode([row["codes"]])
        except BankError as error:
            return f"has codes that cannot be decoded: {error}"
    return None


def _rows(store: Store, faults: list[str]) -> Iterator[dict[str, Any]]:
    """All rows; a fragment that cannot be read is one fault, and the others go on."""
    columns = store.columns.names
    for fragment in store.dataset.get_fragments():
        try:
            with store.guarded(f"cannot be read in fragment {fragment.fragment_id}"):
                for batch in fragment.to_batches(columns=columns, batch_size=_ROWS_AT_ONCE):
                    yield from batch.to_pylist()
        except BankError as error:
            faults.append(str(error))
