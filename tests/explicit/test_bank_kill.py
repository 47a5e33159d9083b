"""A bank under kill -9, two writers, and readers beside a writer."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny_bank
from strata.errors import BankError
from strata.explicit.bank import Bank
from strata.explicit.bank.lock import writing
from tiny_bank import TinyEmbedder, add, create, documents, reopen

SCRIPT = str(Path(tiny_bank.__file__))
COUNT = 120


def start(*arguments: str) -> subprocess.Popen[str]:
    """The script, once it has opened the bank."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The content of an uninterrupted run."""
    bank = create(tmp_path_factory.mktemp("whole") / "bank")
    add(bank, documents(COUNT))
    return bank.digest()


def kill_somewhere(path: Path, rng: random.Random) -> None:
    """Start `add` and kill it a few milliseconds after one of its commits, drawn by `rng`.

    By commits and not by the clock: on a busy machine any fixed time is before the first of them
    or after the last.
    """
    seals = path / "seals"
    wanted = len(list(seals.iterdir())) + rng.randrange(4)
    process = start("add", str(path), str(COUNT), "0.01")
    while process.poll() is None and len(list(seals.iterdir())) < wanted:
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.06))
    process.kill()
    process.wait()


def kill_and_finish(folder: Path, whole: str, rng: random.Random, *, kills: int = 1) -> list[int]:
    """Kill `add` at random moments, then finish it. Returns the rows seen after each kill."""
    path = folder / "bank"
    create(path)
    last, seen = 0, []
    for _ in range(kills):
        kill_somewhere(path, rng)
        between = Bank.open(path)
        ids = [row for b in between._store.scan(["id"]) for row in b["id"].to_pylist()]
        assert len(ids) == len(set(ids)) == len(between) >= last
        assert between.verify().faults == ()
        by_source = {i.source: i.references for i in between.ls()}
        for document in documents(COUNT):  # whole documents only
            assert by_source.get(document.source, 0) in (0, len(tiny_bank.cut(document)))
        last = len(between)
        seen.append(last)
    bank = reopen(path)
    report = add(bank, documents(COUNT))
    # Nothing committed is lost: more may be there than was seen, for this run also takes up what
    # was committed and not yet sealed.
    assert len(bank) - report.references >= last
    assert report.unchanged + report.documents == COUNT
    assert bank.digest() == whole and Bank.open(path).digest() == whole
    bank.compact(keep_s=0)
    sealed = bank._store.seal.files.keys()
    data = {f"data/{p.name}" for p in (path / "references.lance" / "data").iterdir()}
    assert data == {name for name in sealed if name.startswith("data/")}
    assert bank.digest() == whole and bank.verify().faults == ()
    return seen


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(tmp_path: Path, whole: str, seed: int) -> None:
    kill_and_finish(tmp_path, whole, random.Random(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 105))
def test_killed_at_fifty_moments(tmp_path: Path, whole: str, seed: int) -> None:
    """Ten a seed: five banks, two kills each."""
    rng, seen = random.Random(seed), []
    for number in range(5):
        folder = tmp_path / str(number)
        folder.mkdir()
        seen += kill_and_finish(folder, whole, rng, kills=2)
    print("rows after each kill:", seen)
    assert len(seen) == 10 and len(set(seen)) >= 3, f"the kills came at the same places: {seen}"


def test_killed_between_commit_and_seal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers stay at the version before; the next writer takes the commit up."""
    bank = create(tmp_path / "bank")
    add(bank, documents(10))
    before = bank.digest()

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("strata.explicit.bank.seals.write", killed)
        with pytest.raises(KeyboardInterrupt):
            add(bank, documents(20))
    assert Bank.open(bank.path).digest() == before
    again = reopen(bank.path)
    assert add(again, documents(20)).unchanged == 20
    assert again.versions()[-1].what == "finished an interrupted write"
    whole = create(tmp_path / "whole")
    add(whole, documents(20))
    assert again.digest() == whole.digest()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """Another process and another object in this one are told who writes; readers go on."""
    bank = create(tmp_path / "bank")
    add(bank, documents(3))
    seals = bank.path / "seals"
    before = len(list(seals.iterdir()))
    process = start("add", str(bank.path), "400", "0.3")
    # Trying to write before the other holds the lock would take it, and refuse the other.
    while process.poll() is None and len(list(seals.iterdir())) == before:
        time.sleep(0.01)
    with pytest.raises(BankError, match=f"is being written by process {process.pid}: wait"):
        bank.remove(["stones/1.txt"])
    with pytest.raises(BankError, match=f"is being written by process {process.pid}: wait"):
        add(bank, documents(3))
    assert Bank.open(bank.path).digest()
    process.kill()
    process.wait()
    with writing(bank.path), pytest.raises(BankError, match=f"written by process {os.getpid()}"):
        bank.compact()
    bank.compact()


def test_readers_beside_a_writer_see_whole_versions(tmp_path: Path) -> None:
    """While another process replaces, removes and compacts, every record read is whole."""
    bank = create(tmp_path / "bank")
    add(bank, documents(40))
    process = start("churn", str(bank.path), "6")
    query, reads, removed = TinyEmbedder().embed_documents(["heron"])[0], 0, 0
    while process.poll() is None:
        try:
            reader = Bank.open(bank.path)
            hits = reader.search(query, 50)
            blobs = reader.blobs([hit.id for hit in hits])
            assert len(blobs) == len(hits) == 50
            turns: dict[str, set[str]] = {}
            for record in reader.take([hit.id for hit in reader.search("stone turn", 200)]):
                turns.setdefault(record.source, set()).add(record.document)
            # One document a source: never half the old one and half the new.
            assert all(len(documents) == 1 for documents in turns.values())
            assert len(reader.ls()) in (39, 40)
            reads += 1
        except BankError as error:
            assert "was removed by a compaction meanwhile" in str(error), error
            removed += 1
    assert process.returncode == 0 and reads >= 5
    assert removed <= reads
    assert Bank.open(bank.path).verify().faults == ()
