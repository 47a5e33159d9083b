"""Workers of Ray give a bank what one process gives it, whoever is killed meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray_bank

import tiny_bank
from strata.errors import BankError
from strata.explicit.bank import Bank
from tiny_bank import Doc, create, documents, fingerprint, reopen

pytestmark = pytest.mark.ray

COUNT = 120
Run = Callable[..., tuple[int, str, str]]


def ids(bank: Bank) -> list[str]:
    """Of all rows, in their order."""
    return [row for batch in bank._store.scan(["id"]) for row in batch["id"].to_pylist()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """What one process makes of the documents."""
    bank = create(tmp_path_factory.mktemp("whole") / "bank")
    tiny_bank.add(bank, documents(COUNT))
    return bank


def until(happened: Callable[[], bool], *, for_s: float = 60.0) -> None:
    """Wait for something that another process does."""
    end = time.monotonic() + for_s
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_articles_become_the_bank_that_one_process_makes(
    ray: str, run: Run, tmp_path: Path, tiny_model: Path
) -> None:
    """Country articles through the command line: ids, texts, memory bytes and order are equal."""
    from strata.data.facts.factbook import load_articles

    prose = tmp_path / "articles"
    prose.mkdir()
    for number, text in enumerate(list(load_articles().values())[:12]):
        (prose / f"{number:02}.txt").write_text(text[:3_000])
    banks = []
    for engine in (("--engine", "local"), ("--engine", "ray", "--num-workers", 2)):
        folder = tmp_path / engine[1]
        made = ("--model", tiny_model, "--reference-tokens", 24, "--tokens", 4)
        assert run("bank", "create", folder, *made, "--embedder", "none")[0] == 0
        code, out, err = run("bank", "add", folder, prose, "--model", tiny_model, *engine)
        assert code == 0, err
        assert "12 documents as" in out
        banks.append(Bank.open(folder))
    one, two = banks
    assert ids(one) == ids(two) and len(ids(one)) > 400
    assert one.digest() == two.digest()
    assert one.blobs(ids(one)) == two.blobs(ids(one))
    assert two.verify().faults == ()
    code, out, _ = run("bank", "add", two.path, prose, "--model", tiny_model, *engine)
    assert code == 0 and "0 documents as 0 references" in out and "12 there already" in out


def test_changes_duplicates_and_empty_documents(ray: str, tmp_path: Path) -> None:
    """One report and one content, however documents come and are cut into partitions."""
    first = [*documents(30), Doc("No end", "empty.txt")]
    moved = Doc("Stone 3 lies nowhere.", "stones/3.txt")
    second = [
        moved,
        Doc(next(documents(1, start=3)).text, "stones/moved.txt"),  # free again: 3 has changed
        Doc("", "stones/4.txt"),  # empty now
        Doc(next(documents(1, start=5)).text, "copy.txt"),  # a duplicate
        Doc("Once. Only.", "twice.txt"),
        Doc("Twice. Only.", "twice.txt"),
        *documents(10),
        Doc(next(documents(1, start=6)).text, "stones/8.txt"),  # what it held is no longer true
    ]
    one, two = create(tmp_path / "one"), create(tmp_path / "two")
    for given in (first, second, second):
        reports = [
            tiny_bank.add(one, given, batch_references=1),
            ray_bank.add(two, given, batch_references=1, partition_characters=1),
        ]
        assert reports[0] == reports[1]
        assert ids(one) == ids(two) and one.digest() == two.digest()
        assert {i.source for i in two.ls()} == {i.source for i in one.ls()}


def test_a_killed_worker_changes_nothing(ray: str, tmp_path: Path, whole: Bank) -> None:
    bank = create(tmp_path / "bank")
    pids, killed = tmp_path / "pids", []

    def kill() -> None:
        until(lambda: len(Bank.open(bank.path)) > 0)
        pid = int(sorted(pids.iterdir())[0].name)
        os.kill(pid, signal.SIGKILL)
        killed.append((pid, len(Bank.open(bank.path))))

    thread = threading.Thread(target=kill)
    thread.start()
    report = ray_bank.add(bank, documents(COUNT), pids=pids, pause_s=0.3)
    thread.join()
    assert killed and 0 < killed[0][1] < len(whole), killed
    assert len(list(pids.iterdir())) >= 3, "no worker came in the place of the killed one"
    assert report.documents == COUNT and report.references == len(whole)
    assert ids(bank) == ids(whole) and bank.digest() == whole.digest()
    assert bank.verify().faults == ()
    bank.compact(keep_s=0)  # files of the killed worker go
    data = {f"data/{path.name}" for path in (bank.path / "references.lance/data").iterdir()}
    assert data == {name for name in bank._store.seal.files if name.startswith("data/")}
    assert bank.digest() == whole.digest()


def test_a_killed_driver_is_gone_on_with(ray: str, tmp_path: Path, whole: Bank) -> None:
    bank = create(tmp_path / "bank")
    script = [sys.executable, str(Path(ray_bank.__file__)), str(bank.path), str(COUNT), "0.2"]
    process = subprocess.Popen(script)
    until(lambda: process.poll() is not None or len(Bank.open(bank.path)) > 0)
    process.kill()
    process.wait()
    seen = len(Bank.open(bank.path))
    assert 0 < seen < len(whole)
    report = ray_bank.add(reopen(bank.path), documents(COUNT))
    again = Bank.open(bank.path)
    assert report.unchanged > 0 and report.unchanged + report.documents == COUNT
    assert len(set(ids(again))) == len(again) and again.digest() == whole.digest()
    assert again.verify().faults == ()


def test_workers_write_to_an_object_store(ray: str, whole: Bank) -> None:
    bank = create(f"{ray}/written/by/workers")
    assert ray_bank.add(bank, documents(COUNT)).references == len(whole)
    again = Bank.open(bank.path)
    assert ids(again) == ids(whole) and again.digest() == whole.digest()
    assert again.verify().faults == ()


def test_what_a_worker_refuses_is_one_line(ray: str, tmp_path: Path) -> None:
    bank = create(tmp_path / "bank")
    with pytest.raises(BankError, match=r"^text of 2,000,001 bytes from 'long.txt': at most"):
        ray_bank.add(bank, [*documents(3), Doc("a" * 2_000_000 + ".", "long.txt")])

    def other(given: object) -> object:
        made = ray_bank.means(None, 0.0, given)
        return type(made)(made.cut, made.encoder, made.embedder, fingerprint(weights="another"))

    with pytest.raises(BankError, match="weights"):
        ray_bank.add(bank, documents(3), open_means=other)
    assert ray_bank.add(bank, documents(3)).unchanged in (0, 3)
