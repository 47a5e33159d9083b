"""A bank on an S3 server is the bank in a folder, with one writer at a time."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny_bank
from s3_server import serving
from strata.errors import BankError
from strata.explicit.bank import Bank, lease
from strata.explicit.bank.files import files_at
from tiny_bank import Doc, TinyEmbedder, create, documents, fingerprint

pytest.importorskip("lance")
pytest.importorskip("obstore")
pytest.importorskip("moto")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with serving() as url:
        yield url


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    """Of a bank that is not there yet."""
    return f"{bucket}/{request.node.name}/bank"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are renewed every tenth of a second and stale after one."""
    monkeypatch.setattr(lease, "RENEW_S", 0.1)
    monkeypatch.setattr(lease, "STALE_S", 1.0)


def reopen(url: str) -> Bank:
    bank = Bank.open(url)
    bank.check(fingerprint())
    return bank


def found(bank: Bank, query: Any) -> list[tuple[str, float]]:
    return [(hit.id, round(hit.score, 4)) for hit in bank.search(query, 5)]


def test_a_bank_on_s3_is_the_bank_in_a_folder(url: str, tmp_path: Path) -> None:
    here, there = create(tmp_path / "bank"), create(url)
    given = [*documents(40), Doc("Stone 3 lies nowhere.", "stones/3.txt")]
    vector = TinyEmbedder().embed_documents(["heron moss"])[0]
    for bank in (here, there):
        tiny_bank.add(bank, given)
        bank.remove(["stones/7.txt"])
        bank.compact(keep_s=0)
    again = reopen(url)
    assert again.digest() == here.digest() and len(again) == len(here)
    assert found(again, vector) == found(here, vector)
    assert found(again, "otter granite") == found(here, "otter granite")
    ids = [hit.id for hit in again.search("heron", 3)]
    assert again.blobs(ids) == here.blobs(ids) and len(ids) == 3
    assert again.load(ids).keys_nstd.equal(here.load(ids).keys_nstd)
    assert again.verify().faults == () and again.stats().disk_bytes > 0
    assert tiny_bank.add(again, given).unchanged == 38  # 7 is back, 3 changes twice
    assert again.export(tmp_path / "plain") == len(again)
    copied = Bank.import_(tmp_path / "plain", f"{url}-again")
    assert copied.digest() == again.digest()
    with pytest.raises(BankError, match="there is a bank at s3://"):
        create(url)


def test_an_index_of_vectors_is_built_and_searched(url: str) -> None:
    bank = create(url)
    bank.index_rows = 300
    tiny_bank.add(bank, documents(130), batch_references=400)
    assert bank.stats().vector_index
    query = TinyEmbedder().embed_documents(["raven silt"])[0]
    exact = {hit.id for hit in bank.search(query, 3, exact=True)}
    assert exact & {hit.id for hit in bank.search(query, 30)}


def test_from_the_command_line(url: str, run: Run, tiny_model: Path, towns: Path) -> None:
    made = ("--model", tiny_model, "--reference-tokens", 24, "--tokens", 4, "--embedder", "none")
    assert run("bank", "create", url, *made)[0] == 0
    code, out, err = run("bank", "add", url, towns, "--model", tiny_model)
    assert code == 0 and f"{url}: 3 documents" in out, err
    best = json.loads(run("bank", "search", url, "who built the bridge?", "--json")[1])[0]
    assert "bridge" in best["text"]
    code, out, err = run(
        "ask", url, "Who built the bridge?", "--model", tiny_model, "--max-new-tokens", 3,
        "--top-k", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    assert [Path(used["source"]).name for used in json.loads(out)["used"]] == ["bryn.md"]


def test_a_trained_codec_comes_back(url: str) -> None:
    from strata.explicit.settings import ExplicitMemoryConfig

    bank = create(url, config=ExplicitMemoryConfig(codec="PQ4x4", tokens_per_head=4))
    bank.train(list(documents(40)), cut=tiny_bank.cut, encoder=tiny_bank.TinyEncoder(), memories=64)
    tiny_bank.add(bank, documents(5))
    ids = [hit.id for hit in bank.search("heron", 3)]
    assert Bank.open(url).load(ids).keys_nstd.equal(bank.load(ids).keys_nstd)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{bucket}/nothing/here", "no bank at s3://"),
        ("s3://no-such-bucket/bank", "no bank at s3://"),
        ("ftp://host/bank", "give a folder, or a URL of s3, gs, az"),
    ],
)
def test_where_no_bank_is(bucket: str, run: Run, place: str, says: str) -> None:
    code, out, err = run("bank", "ls", place.format(bucket=bucket))
    assert code == 2 and out == "" and err.count("\n") == 1 and says in err


def test_damage_is_refused(url: str) -> None:
    bank = create(url)
    tiny_bank.add(bank, documents(9))
    files = files_at(url)
    name = next(name for name in files.names("references.lance/data"))
    whole = files.read(name)
    files.put(name, whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
    with pytest.raises(BankError, match="is damaged, not what was written"):
        Bank.open(url)
    files.put(name, whole[:-1])
    with pytest.raises(BankError, match=r"bytes, .* were written"):
        Bank.open(url)
    files.delete(name)
    with pytest.raises(BankError, match="is missing"):
        Bank.open(url)


def test_a_second_writer_is_told_who_writes(url: str, impatient: None) -> None:
    bank, other = create(url), reopen(url)
    with files_at(url).writing():
        with pytest.raises(BankError, match="is being written by process"):
            tiny_bank.add(other, documents(3))
        with pytest.raises(BankError, match="is being written by process"):
            bank.compact()
        assert len(Bank.open(url)) == 0  # readers are not kept out
    tiny_bank.add(other, documents(3))
    assert "writer.lock" not in files_at(url).names("")


def test_a_dead_writers_lock_is_taken_over(
    url: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = create(url)
    with monkeypatch.context() as patch:
        patch.setattr(lease.Lease, "give_back", lambda held: held._over.set())  # killed
        with files_at(url).writing():
            pass
    assert "writer.lock" in files_at(url).names("")
    before = time.monotonic()
    assert tiny_bank.add(reopen(url), documents(3)).documents == 3
    assert time.monotonic() - before >= 1.0
    assert bank.verify().faults == ()


def test_a_writer_that_slept_cannot_commit(
    url: str, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock was taken over meanwhile; what it had not committed it does not commit."""
    sleeper, keep = create(url), lease.Lease._keep

    def asleep() -> Iterator[Doc]:
        yield from documents(3)
        monkeypatch.setattr(lease.Lease, "_keep", keep)
        tiny_bank.add(reopen(url), documents(6))  # after a second without a sign of life

    monkeypatch.setattr(lease.Lease, "_keep", lambda held: None)
    with pytest.raises(BankError, match=r"was taken over by .* run again"):
        tiny_bank.add(sleeper, asleep())
    again = reopen(url)
    assert tiny_bank.add(again, documents(6)).unchanged == 6
    assert again.verify().faults == ()


def test_two_writers_at_once(url: str, impatient: None) -> None:
    """Each is refused or goes first; nothing is there twice."""
    create(url)
    refused: list[str] = []

    def write(count: int) -> None:
        try:
            tiny_bank.add(reopen(url), documents(count), batch_references=5)
        except BankError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=write, args=(count,)) for count in (20, 24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is being written by process" in line for line in refused) and len(refused) <= 1
    bank = reopen(url)
    tiny_bank.add(bank, documents(24))
    assert len(bank.ls()) == 24 and bank.verify().faults == ()
