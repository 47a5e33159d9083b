"""What is in a bank, changed: sources taken out, cold rows given their memories."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from strata.errors import BankError
from strata.explicit.bank import records, rows
from strata.explicit.bank.store import Store
from strata.explicit.codec import Codec
from strata.explicit.memories import Memories


def remove(store: Store, sources: Iterable[str]) -> int:
    """Take sources out, all in one commit; the writer's lock is held.

    Returns:
        Rows removed.

    Raises:
        BankError: a source is not there.
    """
    wanted = {records.source_digest(source): source for source in sources}
    if not wanted:
        return 0
    gone = records.one_of("source_id", wanted)
    there = {
        found
        for batch in store.scan(["source_id"], where=gone)
        for found in batch["source_id"].to_pylist()
    }
    for digest, source in wanted.items():
        if digest not in there:
            raise BankError(f"no source {source!r} in bank {store.files}: list its sources")
    return store.commit([], gone, f"remove {len(wanted)} sources")


def fill(store: Store, codec: Codec, ids: Sequence[str], memories: Memories) -> None:
    """Give cold rows their memories, in one commit; the writer's lock is held.

    Raises:
        BankError: an id is not there.
    """
    blobs = dict(zip(ids, codec.encode(memories), strict=True))
    found = rows.by_id(store, ids, store.columns.names)
    cold = []
    for identifier in ids:
        row = found[identifier]
        records.checked_record(row)
        if row["codes"] is None:
            row["codes"] = blobs[identifier]
            row["checksum"] = records.checksum(row)
            cold.append(row)
    if cold:
        fragments = store.write(records.table_of(cold, store.columns))
        gone = records.one_of("id", [row["id"] for row in cold])
        store.commit(fragments, gone, f"fill {len(cold)} memories")
