"""Damaged, truncated and foreign banks: the same content, or one clear line; nothing in between."""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from strata.errors import BankError
from strata.explicit.bank import Bank
from strata.explicit.codec import make_codec
from strata.explicit.extras import MissingPackageError
from strata.explicit.settings import ExplicitMemoryConfig
from tiny_bank import CONFIG, SHAPE, TinyEmbedder, TinyEncoder, add, create, cut, documents

TRAINED = ExplicitMemoryConfig(codec="OPQ2_8,Residual2x5,PQ2x4", tokens_per_head=4)


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with several files, removed rows, indexes over a part, and a trained codec."""
    bank = create(tmp_path_factory.mktemp("master") / "bank", config=TRAINED)
    bank.train(documents(60), cut=cut, encoder=TinyEncoder(), iterations=2)
    add(bank, documents(30))
    bank.compact(keep_s=0)
    add(bank, documents(20, start=30))
    bank.remove(["stones/3.txt", "stones/33.txt"])
    return bank.path


@pytest.fixture
def path(master: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(master, tmp_path / "bank")
    return tmp_path / "bank"


def content(path: Path) -> list[object]:
    """Everything that a user can get out of a bank."""
    bank = Bank.open(path)
    query = TinyEmbedder().embed_documents(["heron plum"])[0]
    hits = bank.search(query, 300)
    found: list[object] = [bank.search("heron plum", 5), hits, bank.ls()]
    ids = sorted(hit.id for hit in hits)
    found.append([(r.id, r.text, r.codes, r.vector.tobytes()) for r in bank.take(ids)])
    found.append(bank.load(ids).keys_nstd.numpy().tobytes())
    return found


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 600 and "Traceback" not in text
    return text


def files_of(path: Path) -> dict[str, list[Path]]:
    """Files by kind, of the newest version."""
    seals = sorted((path / "seals").iterdir())
    sealed = json.loads(seals[-1].read_text())["files"]
    dataset = path / "references.lance"
    kinds: dict[str, list[Path]] = {
        "settings": [path / "bank.json"],
        "codec": [path / "codec.safetensors"],
        "seal": [seals[-1]],
    }
    for name in sealed:
        kinds.setdefault(name.split("/")[0], []).append(dataset / name)
    assert {"data", "_versions", "_deletions", "_indices"} <= kinds.keys()
    return kinds


KINDS = ["settings", "codec", "seal", "data", "_versions", "_deletions", "_indices"]


def flip_bytes(path: Path, kind: str, rounds: int, rng: random.Random) -> tuple[int, int]:
    """Flip one bit at a time; counts of (refused, read as it was)."""
    want = content(path)
    refused = same = 0
    for _ in range(rounds):
        victim = rng.choice(files_of(path)[kind])
        raw = victim.read_bytes()
        near_end = kind == "data" and rng.random() < 0.5
        at = rng.randrange(max(0, len(raw) - 3000) if near_end else 0, len(raw))
        damaged = bytearray(raw)
        damaged[at] ^= 1 << rng.randrange(8)
        victim.write_bytes(damaged)
        try:
            got = content(path)
        except BankError as error:
            one_line(error)
            refused += 1
        else:
            assert got == want, f"{victim} read as something else with byte {at} flipped"
            same += 1
            if kind != "data":
                pytest.fail(f"{victim}: nothing noticed that byte {at} is flipped")
        victim.write_bytes(raw)
    assert content(path) == want
    return refused, same


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_refused_or_changes_nothing(path: Path, kind: str) -> None:
    refused, _ = flip_bytes(path, kind, 12, random.Random(KINDS.index(kind)))
    assert refused


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_flipped_bits(path: Path, kind: str) -> None:
    flip_bytes(path, kind, 300, random.Random(100 + KINDS.index(kind)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damage", ["empty", "cut", "foreign", "gone", "longer"])
def test_truncated_missing_and_foreign_files(path: Path, kind: str, damage: str) -> None:
    victim = files_of(path)[kind][0]
    raw = victim.read_bytes()
    if damage == "gone":
        victim.unlink()
    else:
        new = {"empty": b"", "cut": raw[: len(raw) // 2], "foreign": b"PK\x03\x04" * 99}
        victim.write_bytes(new.get(damage, raw + b"\0"))
    if kind == "seal" and damage == "gone":  # then the version is as if it had never been
        assert len(Bank.open(path)) > len(Bank.open(path).take([])) == 0
        return
    with pytest.raises(BankError) as error:
        content(path)
    said = one_line(error.value)
    assert str(path) in said


def test_verify_names_what_a_look_does_not_touch(path: Path) -> None:
    """Bytes in the middle of data files: each of them is found, and told by its file."""
    for victim in files_of(path)["data"]:
        raw = victim.read_bytes()
        at = 200 if len(raw) > 70_000 else None
        if at is None:
            continue
        victim.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        faults = Bank.open(path).verify().faults
        assert any(victim.name in fault for fault in faults)
        victim.write_bytes(raw)
    assert Bank.open(path).verify().faults == ()


def test_verify_goes_on_after_a_fault(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records whose checksums are wrong are listed one by one."""
    from strata.explicit.bank import records

    real = records.codes_check
    monkeypatch.setattr(
        records, "codes_check", lambda i, c: real(i, c) if i[0] in "012345678" else bytes(16)
    )
    bank = Bank.open(path)
    report = bank.verify()
    wrong = [i for b in bank._store.scan(["id"]) for i in b["id"].to_pylist() if i[0] in "9abcdef"]
    assert len(report.faults) == len(wrong) > 10 and report.records == len(bank)
    assert all("is not what was written" in fault for fault in report.faults)


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """Change bank.json as somebody would who can compute its checksum."""
    from strata.explicit.bank.settings import parse_sealed, write_sealed

    tree = parse_sealed(path / "bank.json", (path / "bank.json").read_bytes())
    change(tree)
    write_sealed(path / "bank.json", tree)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(format_version=2), "'strata-bank' version 2, this strata reads"),
        (lambda t: t.update(format="other"), "'other' version 1"),
        (lambda t: t.update(extra=1), "extra: Extra inputs"),
        (lambda t: t.update(tokens=10**9), "tokens: Input should be less"),
        (lambda t: t["config"].update(codec="PQ9999999x8"), "no codec 'PQ9999999x8'"),
        (lambda t: t["config"].update(codec="int8"), "has no trained state"),
        (lambda t: t.update(head_dim=16), "no codec|not for"),
        (lambda t: t.update(codec_sha256="0" * 64), "not the codec that this bank was"),
    ],
)
def test_settings_that_do_not_fit(path: Path, change: Callable[[dict], None], says: str) -> None:
    rewrite(path, change)
    with pytest.raises(BankError, match=says) as error:
        content(path)
    one_line(error.value)


def test_what_is_no_bank(tmp_path: Path, path: Path) -> None:
    for where in (tmp_path / "none", tmp_path):
        with pytest.raises(BankError, match=r"no bank at .*: give the folder"):
            Bank.open(where)
    with pytest.raises(BankError, match="there is a bank at"):
        Bank.create(path, config=CONFIG)
    (tmp_path / "file").write_text("x")
    with pytest.raises(BankError, match="is a file"):
        Bank.create(tmp_path / "file", config=CONFIG)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("x")
    with pytest.raises(BankError, match=r"not empty .it holds 'letter.txt'"):
        Bank.create(tmp_path / "full", config=CONFIG)
    with pytest.raises(BankError, match="no codec 'mp3'"):
        Bank.create(
            tmp_path / "new", config=ExplicitMemoryConfig(codec="mp3"), shape=SHAPE,
            fingerprint=Bank.open(path).settings.fingerprint,
        )  # fmt: skip
    assert not (tmp_path / "new").exists() and (tmp_path / "full" / "letter.txt").exists()


def test_damaged_exports(path: Path, tmp_path: Path) -> None:
    Bank.open(path).export(tmp_path / "out")
    rng = random.Random(5)
    for name in ("bank.json", "records.parquet", "codec.safetensors", "export.json"):
        victim = tmp_path / "out" / name
        raw = victim.read_bytes()
        for _ in range(3):
            damaged = bytearray(raw)
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            for content_ in (bytes(damaged), raw[:-7], b""):
                victim.write_bytes(content_)
                with pytest.raises(BankError) as error:
                    Bank.import_(tmp_path / "out", tmp_path / "new")
                one_line(error.value)
                assert not (tmp_path / "new" / "bank.json").exists()
        victim.write_bytes(raw)
    with pytest.raises(BankError, match="is not an exported bank"):
        Bank.import_(path, tmp_path / "new")
    assert Bank.import_(tmp_path / "out", tmp_path / "new").digest() == Bank.open(path).digest()


def test_a_missing_library_is_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingPackageError, match=r'needs faiss.*pip install "strata-lm\[bank'):
        make_codec("faiss", SHAPE)
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(MissingPackageError, match="needs lance, which is not installed"):
        Bank.create(path.parent / "new", config=CONFIG)


def test_importing_the_bank_imports_nothing_heavy() -> None:
    import subprocess

    code = "import sys, strata.explicit.bank; print([m for m in ('lance', 'faiss') if m in " \
        "sys.modules])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
