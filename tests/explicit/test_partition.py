"""Partitions that others write: late, in any order and twice, they give the bank of one process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

import tiny_bank
from strata.errors import BankError, WorkerError
from strata.explicit.bank import Bank
from strata.explicit.bank.partition import PartitionWriter, WorkerMeans, Written, unpacked
from strata.explicit.bank.ray_add import RayAdder
from tiny_bank import Doc, TinyEmbedder, TinyEncoder, create, documents, fingerprint, reopen

pytest.importorskip("lance")

Way = Callable[[list[pa.Table]], list[pa.Table]]


def means(given: Any) -> WorkerMeans:
    return WorkerMeans(tiny_bank.cut, TinyEncoder(), TinyEmbedder(), fingerprint())


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """Two workers in this process; what the list holds says which partitions they write."""
    ways: list[Way] = [list]

    def encode(adder: RayAdder, tables: list[pa.Table]) -> Iterator[tuple[int, Written]]:
        writers = [
            PartitionWriter(adder._store.files.place, adder._open_means, 16) for _ in range(2)
        ]
        for number, table in enumerate(ways[-1](tables)):
            for row in writers[number % 2](table).to_pylist():
                if row["error"]:
                    raise BankError(row["content"])
                yield row["number"], unpacked(row["content"])

    @contextmanager
    def running(num_workers: int) -> Iterator[Any]:
        yield SimpleNamespace(cluster_resources=dict)

    monkeypatch.setattr(RayAdder, "_encode", encode)
    monkeypatch.setattr("strata.explicit.bank.bank.running", running)
    return ways


def add(bank: Bank, given: Any, **settings: Any) -> Any:
    settings = {"open_means": means, "batch_references": 40, "partition_characters": 300} | settings
    return bank.add_with_ray(given, num_workers=2, **settings)


def ids(bank: Bank) -> list[str]:
    return [row for batch in bank._store.scan(["id"]) for row in batch["id"].to_pylist()]


def twice_in_any_order(tables: list[pa.Table]) -> list[pa.Table]:
    tables = tables * 2
    random.Random(0).shuffle(tables)
    return tables


@pytest.mark.parametrize("way", [list, twice_in_any_order], ids=["once", "twice"])
def test_the_bank_of_one_process(workers: list[Way], tmp_path: Path, way: Way) -> None:
    one, two = create(tmp_path / "one"), create(tmp_path / "two")
    workers.append(way)
    given = [
        *documents(60),
        Doc("Once. Only.", "2.txt"),
        Doc("Twice. Only.", "2.txt"),
        *documents(9),
    ]
    assert tiny_bank.add(one, given).references == add(two, given).references
    assert ids(one) == ids(two) and one.digest() == two.digest()
    assert two.verify().faults == ()
    two.compact(keep_s=0)  # what was written and never committed goes
    data = {f"data/{path.name}" for path in (two.path / "references.lance/data").iterdir()}
    assert data == {name for name in two._store.seal.files if name.startswith("data/")}
    assert add(reopen(two.path), documents(60)).unchanged == 60


def test_changed_documents_are_replaced(workers: list[Way], tmp_path: Path) -> None:
    one, two = create(tmp_path / "one"), create(tmp_path / "two")
    changed = [
        Doc("Stone 3 lies nowhere.", "stones/3.txt"),
        Doc(next(documents(1, start=3)).text, "moved.txt"),  # free again: 3 has changed
        Doc("", "stones/4.txt"),
        Doc(next(documents(1, start=5)).text, "copy.txt"),  # a duplicate
        *documents(3, start=3),  # 4 is there again
        Doc(next(documents(1, start=6)).text, "stones/8.txt"),  # what it held is no longer true
    ]
    for given in (documents(20), changed, changed):
        given = list(given)
        local = tiny_bank.add(one, given, batch_references=1)
        assert local == add(two, given, batch_references=1, partition_characters=1)
        assert ids(one) == ids(two) and one.digest() == two.digest()


def test_a_partition_that_never_comes_back(workers: list[Way], tmp_path: Path) -> None:
    """What was committed before it stays, and the next run goes on."""
    bank, whole = create(tmp_path / "bank"), create(tmp_path / "whole")
    tiny_bank.add(whole, documents(60))
    workers.append(lambda tables: tables[:-1])
    with pytest.raises(WorkerError, match="run again"):
        add(bank, documents(60))
    assert 0 < len(bank) < len(whole)
    workers.append(list)
    assert add(bank, documents(60)).unchanged > 0
    assert bank.digest() == whole.digest()


def test_cold_partitions(workers: list[Way], tmp_path: Path) -> None:
    def cold(given: Any) -> WorkerMeans:
        return WorkerMeans(tiny_bank.cut, None, TinyEmbedder(), None)

    bank = create(tmp_path / "bank")
    add(bank, documents(8), open_means=cold)
    assert len(bank.cold()) == len(bank) > 8


def test_what_a_worker_refuses(workers: list[Way], tmp_path: Path) -> None:
    bank = create(tmp_path / "bank")
    with pytest.raises(BankError, match=r"^text of 2,000,001 bytes from 'long.txt': at most"):
        add(bank, [*documents(3), Doc("a" * 2_000_000 + ".", "long.txt")])

    def other_model(given: Any) -> WorkerMeans:
        return WorkerMeans(tiny_bank.cut, TinyEncoder(), TinyEmbedder(), fingerprint(weights="x"))

    def no_embedder(given: Any) -> WorkerMeans:
        return WorkerMeans(tiny_bank.cut, TinyEncoder(), None, fingerprint())

    for wrong, says in ((other_model, "weights"), (no_embedder, "give that embedder")):
        with pytest.raises(BankError, match=says):
            add(bank, documents(3), open_means=wrong)
    with pytest.raises(BankError, match="at least 1"):
        bank.add_with_ray(documents(3), open_means=means, num_workers=0)
    assert len(bank) == 0
