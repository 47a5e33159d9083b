"""Rows by their ids, or all of them, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from strata.errors import BankError
from strata.explicit.bank import records
from strata.explicit.bank.store import Store
from strata.explicit.codec import Codec
from strata.explicit.memories import Memories


def by_id(store: Store, ids: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """Rows of these ids, by id.

    Raises:
        BankError: an id is not in the bank.
    """
    wanted = list(dict.fromkeys(ids))
    for identifier in wanted:
        records.check_id(identifier)
    found: dict[str, Any] = {}
    for first in range(0, len(wanted), 256):
        found |= {row["id"]: row for row in store.seen(wanted[first : first + 256], columns)}
    late = [identifier for identifier in wanted if identifier not in found]
    for first in range(0, len(late), 256):
        where = records.one_of("id", late[first : first + 256])
        for batch in store.scan(columns, where=where, rows_at_once=64):
            found |= {row["id"]: row for row in batch.to_pylist()}
    missing = next((identifier for identifier in wanted if identifier not in found), None)
    if missing is not None:
        raise BankError(f"record {missing} is not in version {store.version} of bank {store.files}")
    return found


def id_of(store: Store, beginning: str) -> str:
    """The only id that begins so.

    Raises:
        BankError: none or several do.
    """
    if not 4 <= len(beginning) <= 32 or not set(beginning) <= set("0123456789abcdef"):
        raise BankError(f"{beginning!r} is no record id: give 4 to 32 hexadecimal digits")
    where = f"id LIKE '{beginning}%'"
    ids: list[str] = [i for b in store.scan(["id"], where=where) for i in b["id"].to_pylist()]
    if len(ids) != 1:
        how_many = f"{len(ids)} records begin" if ids else "no record begins"
        raise BankError(f"{how_many} with {beginning} in bank {store.files}")
    return ids[0]


def cold(store: Store, limit: int | None) -> list[str]:
    """Ids of rows without memories, at most `limit` of them."""
    found: list[str] = []
    for batch in store.scan(["id", "checksum"], rows_at_once=8192):
        pairs = zip(batch["id"].to_pylist(), batch["checksum"].to_pylist(), strict=True)
        found += [identifier for identifier, check in pairs if records.is_cold(check)]
        if limit is not None and len(found) >= limit:
            return found[:limit]
    return found


def sample_texts(store: Store, count: int) -> list[str]:
    """Texts of at most `count` rows, evenly spaced."""
    step = max(1, -(-store.seal.rows // count))
    texts, at = [], 0
    for batch in store.scan(["text"], rows_at_once=8192):
        column = batch["text"]
        texts += [column[place].as_py() for place in range(-at % step, len(column), step)]
        at += len(column)
    return texts


def memories(
    store: Store, codec: Codec, where: Mapping[str, Any] | None, rows_at_once: int
) -> Iterator[tuple[list[str], Memories]]:
    """Ids and decoded memories of all rows that have one, batch by batch."""
    columns, condition = ["id", "codes", "checksum"], records.condition(where)
    for batch in store.scan(columns, where=condition, rows_at_once=rows_at_once):
        found = {row["id"]: records.checked_codes(row) for row in batch.to_pylist()}
        warm = {identifier: codes for identifier, codes in found.items() if codes is not None}
        if warm:
            yield list(warm), codec.decode(list(warm.values()))
