"""Wrong and damaged documents: one clear line when named, a line in the report when found."""

from __future__ import annotations

import builtins
import errno
import gzip
import json
import os
import socket
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from strata.errors import DataError, StrataError
from strata.explicit import document_rows, document_text
from strata.explicit.documents import ReadReport, read_documents
from strata.explicit.extras import MissingPackageError


def refused(*paths: Path, **options: Any) -> str:
    """The one line with which reading named files ends."""
    with pytest.raises(StrataError) as caught:
        list(read_documents(paths, report=ReadReport(), **options))
    line = str(caught.value)
    assert "\n" not in line
    return line


def skipped(folder: Path, **options: Any) -> tuple[str, int]:
    """Why the one bad file of a folder was left out, and how many documents came all the same."""
    report = ReadReport()
    (folder / "zz_good.txt").write_text("good")
    documents = list(read_documents([folder], report=report, **options))
    assert documents[-1].text == "good" and report.documents == len(documents)
    assert len(report.skipped) == 1
    return report.skipped[0].reason, len(documents)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    assert "no path given" in refused()
    assert f"nothing at {tmp_path}/none" in refused(tmp_path / "none")
    assert "nothing to read in" in refused(tmp_path / "empty")
    assert "nothing to read in" in refused(tmp_path / "other")
    assert "loop cannot be read" in refused(tmp_path / "loop")
    assert "cannot be read: embedded null" in refused(Path("a\0b"))
    with pytest.raises(DataError, match="must be a list of paths"):
        read_documents("docs")


def test_a_missing_path_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError):
        read_documents([tmp_path / "a.txt", tmp_path / "none"])


def test_neither_file_nor_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe.txt")
    assert skipped(tmp_path) == ("neither a file nor a folder", 1)
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    (tmp_path / "pipe.txt").unlink()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("socket.txt")
        assert skipped(tmp_path) == ("neither a file nor a folder", 1)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.txt", b"one\ntwo\xe9\n", "line 2: not UTF-8 (byte 7 of the file is 0xe9)"),
        ("a.txt", b"PK\3\4\0\0", "binary"),
        ("a.md", b"\xff\xfe\0", "not UTF-16, as its first bytes say"),
        ("a.html", b"<p>\xe9</p>", "not UTF-8"),
        ("a.html", b"<meta charset='ascii'><p>\xe9</p>", "neither UTF-8 nor 'ascii'"),
        ("a.html", b"<meta charset='martian'><p>\xe9</p>", "neither UTF-8 nor 'martian'"),
        ("a.html", b"\0\1\2", "binary"),
        ("a.pdf", b"no pdf at all", "damaged or not pdf"),
        ("a.pdf", b"%PDF-1.4\n%%EOF", "damaged or not pdf"),
        ("a.docx", b"no zip at all", "damaged or not docx"),
        ("a.parquet", b"PAR1 no", "damaged or not parquet"),
        ("a.parquet", b"", "damaged or not parquet"),
        ("a.jsonl.gz", b"no gzip", "damaged or not gz"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "damaged or not gz"),
        ("a.jsonl", b"\xff\n", "line 1: not UTF-8"),
        ("a.jsonl", b"{}\n", "line 1: no field 'text'; available: none"),
        ("a.jsonl", b'\n{"text": 3}\n', "line 2: field 'text' holds int, not a string"),
        ("a.jsonl", b'{"text": "a"\n', "line 1: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: holds list, not an object"),
        ("a.jsonl", b"[" * 100_000, "line 1: not"),
        ("a.jsonl", b'{"text": "\\ud800"}', "half a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "b": "\\ud800"}', "field 'b' holds half a surrogate pair"),
        ("a.jsonl", b'{"text": "a", "b": ' + b"9" * 5000 + b"}", "a number too long"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(tmp_path / name)
    assert line in message and name in message
    reason, _ = skipped(tmp_path)
    assert line in reason and name not in reason


def test_a_named_file_of_unknown_kind_has_to_be_text(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    assert "photo.jpg is binary, not text" in refused(tmp_path / "photo.jpg")


def test_rows_before_a_damaged_one_are_given(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": \n')
    reason, count = skipped(tmp_path)
    assert reason.startswith("line 3: not JSON") and count == 3


def test_columns_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "l": [[1]], "t": ["x"], "e": [""]}), path)
    assert "no field 'text'; available: 'n', 'l', 't'" in refused(path)
    assert "column 'n' holds int64, not strings" in refused(path, text_field="n")
    assert "no field 'k'" in refused(path, text_field="t", id_field="k")
    assert "column 'l' holds list" in refused(path, text_field="t", id_field="l")
    assert "row 1: id field 'e' holds ''" in refused(path, text_field="t", id_field="e")


@pytest.mark.parametrize("value", ["", None, True, 1.5, ["a"]])
def test_ids_that_name_nothing(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a", "id": value}))
    line = refused(tmp_path / "a.jsonl", id_field="id")
    assert "line 1: id field 'id' holds" in line


def test_strings_of_parquet_that_are_not_utf8(tmp_path: Path) -> None:
    bad = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": bad}), tmp_path / "a.parquet")
    assert "row 2: not UTF-8" in refused(tmp_path / "a.parquet")


def test_every_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document_text, "MAX_TEXT_BYTES", 2**20)
    monkeypatch.setattr(document_text, "MAX_HTML_BYTES", 2**20)
    monkeypatch.setattr(document_text, "MAX_OFFICE_BYTES", 2**20)
    monkeypatch.setattr(document_rows, "MAX_ROW_BYTES", 2**20)
    for name in ("a.txt", "a.html", "a.pdf"):
        (tmp_path / name).write_bytes(b"x" * (2**20 + 1))
        assert "is longer than 1 MiB: split it" in refused(tmp_path / name)
    (tmp_path / "a.jsonl").write_bytes(b"x" * (2**20 + 1))
    assert "line 1: longer than 1 MiB" in refused(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x" * 2**26))
    assert "line 1: longer than 1 MiB" in refused(tmp_path / "a.jsonl.gz")
    with zipfile.ZipFile(tmp_path / "a.docx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 2**24)
    assert (tmp_path / "a.docx").stat().st_size < 2**20
    assert "is longer than 1 MiB unpacked" in refused(tmp_path / "a.docx")
    pq.write_table(pa.table({"text": ["x" * (2**20 + 1)]}), tmp_path / "a.parquet")
    assert "row 1: longer than 1 MiB" in refused(tmp_path / "a.parquet")


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every file can be read, so opening fails by hand."""
    (tmp_path / "a.txt").write_text("a")
    real = builtins.open

    def closed(file: Any, *arguments: Any, **options: Any) -> Any:
        if str(file).endswith("a.txt"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(file, *arguments, **options)

    monkeypatch.setattr(builtins, "open", closed)
    assert "a.txt cannot be read: Permission denied" in refused(tmp_path / "a.txt")
    assert skipped(tmp_path) == ("cannot be read: Permission denied", 1)


def test_folders_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def closed(folder: Any) -> Any:
        if str(folder).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(folder)

    monkeypatch.setattr(os, "scandir", closed)
    assert skipped(tmp_path) == ("cannot be read: Permission denied", 1)


@pytest.mark.parametrize(
    ("name", "module"), [("a.html", "bs4"), ("a.pdf", "markitdown"), ("a.docx", "markitdown")]
)
def test_packages_that_are_not_installed(
    tmp_path: Path,
    without: Callable[[str], None],
    name: str,
    module: str,
) -> None:
    (tmp_path / name).write_bytes(b"x")
    without(module)
    line = refused(tmp_path / name)
    assert f"needs {module}" in line and 'pip install "strata-lm[documents]"' in line
    assert 'pip install "strata-lm[documents]"' in skipped(tmp_path)[0]
    with pytest.raises(MissingPackageError):
        list(read_documents([tmp_path / name]))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package look as if it were not installed."""

    def hide(package: str) -> None:
        for module in list(sys.modules):
            if module == package or module.startswith(f"{package}."):
                monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]

    return hide
