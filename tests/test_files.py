"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from strata.errors import DataError
from strata.files import parse_row, replace_text, replacing, sha256_of


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="died"), replacing(path) as file:
        file.write(b"ne")
        raise RuntimeError("died")
    assert path.read_text() == "old"
    replace_text(path, "néw\n")
    assert path.read_bytes() == "néw\n".encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_bytes_are_on_the_disk_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    replace_text(tmp_path / "a", "x")
    assert done == ["sync", "name", "sync"]


def test_sha256_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    # FIPS 180-2, B.1
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(path) == expected


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\xff{}", "not UTF-8 \\(byte 1 of the line is 0xff\\)"),
        (b"{", "not JSON"),
        (b"[1]", "holds list, not an object"),
        (b"9" * 5000, "a number too long"),
    ],
)
def test_a_row_that_is_none_is_one_line(line: bytes, said: str) -> None:
    with pytest.raises(DataError, match=f"a.jsonl, line 3: .*{said}") as raised:
        parse_row(line, "a.jsonl, line 3")
    assert "\n" not in str(raised.value)
