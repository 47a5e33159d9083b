"""Every kind of file yields the same documents, and reading goes on behind any record."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from tiny_documents import make_texts

from strata.data.readers import Document, ReadOptions, read_documents, read_rows
from strata.data.sources import find_sources
from strata.errors import DataError

TEXTS = [*make_texts(30), "", "twö lines\nand \u2028 no third", "日本語 \x00 text"]
PAIRS = [{"prompt": f"Q{number}", "completion": f" A{number}"} for number in range(5)]


def read(path: Path, *, skip: int = 0, options: ReadOptions | None = None) -> list[Document]:
    (source,) = find_sources([path])
    return list(read_documents(source, options=options or ReadOptions(), skip=skip))


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content[:100]) + gzip.compress(content[100:])  # two members
    elif path.suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        content = compress(content[:100]) + compress(content[100:])  # two frames
    if path.suffix == ".parquet":
        table = pa.table({name: [row[name] for row in rows] for name in rows[0]})
        pq.write_table(table, path, row_group_size=7)
    else:
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "A.JSONL"])
def test_rows_of_texts(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / name, [{"id": "x", "text": text} for text in TEXTS])
    documents = read(path)
    assert [document.text for document in documents] == TEXTS
    assert all(document.prompt == "" for document in documents)
    assert [document.record for document in documents] == list(range(1, len(TEXTS) + 1))
    assert 0 < documents[-1].bytes_read <= path.stat().st_size
    for skip in (1, 7, 8, 20, len(TEXTS)):
        assert read(path, skip=skip) == documents[skip:]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_of_prompts_and_completions(tmp_path: Path, name: str) -> None:
    documents = read(write_rows(tmp_path / name, PAIRS))
    assert [(d.prompt, d.text) for d in documents] == [(f"Q{n}", f" A{n}") for n in range(5)]


def test_text_field_can_be_named(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert [d.text for d in read(path, options=ReadOptions(text_field="body"))] == ["yes"]


def test_blank_lines_and_null_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": null}\n{"text": "b"}')
    assert [(d.text, d.record) for d in read(path)] == [("a", 1), ("", 3), ("b", 4)]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_txt_is_one_document_or_its_paragraphs(tmp_path: Path, name: str) -> None:
    content = "\ufeffone\ntwo\n\n \t\r\nthrée\r\n\n\n\nfour\n"
    path = tmp_path / name
    pack = {".txt": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}
    path.write_bytes(pack[path.suffix](content.encode()))
    assert [d.text for d in read(path)] == [content[1:]]
    assert read(path, skip=1) == []
    options = ReadOptions(txt_documents="paragraph")
    blocks = read(path, options=options)
    assert [(d.text, d.record) for d in blocks] == [("one\ntwo", 1), ("thrée", 2), ("four", 3)]
    assert read(path, options=options, skip=2) == blocks[2:]


def test_skippable_zstd_frames_are_skipped(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor().compress(b'{"text": "a"}\n')
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + frame + skippable)
    assert [d.text for d in read(tmp_path / "a.jsonl.zst")] == ["a"]


def test_large_and_dictionary_strings_in_parquet(tmp_path: Path) -> None:
    for kind in (pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        column = pa.array(["a", None, "b"], pa.string()).cast(kind)
        pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
        assert [d.text for d in read(tmp_path / "a.parquet")] == ["a", "", "b"]


def test_folders_are_walked_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "b/10.jsonl", "a.txt", "c.csv", ".hidden.txt", ".git/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    names = [source.entry.name for source in find_sources([tmp_path])]
    assert names == ["a.txt", "b/10.jsonl", "b/2.jsonl"]


def test_sources_change_their_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 300_000)
    before = find_sources([path])[0].entry
    assert find_sources([path])[0].entry == before
    path.write_bytes(b"a" * 299_999 + b"b")
    assert find_sources([path])[0].entry != before


def test_a_source_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="given twice"):
        find_sources([tmp_path, tmp_path / "a.txt"])


def test_rows_keep_their_nested_fields(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "Where?"}], "references": ["a", "b"]},
        {"messages": [{"role": "user", "content": "Who?"}], "references": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    for suffix, noun in (("parquet", "row"), ("jsonl", "line")):
        path = tmp_path / f"rows.{suffix}"
        found = list(read_rows(find_sources([path])[0]))
        assert [row for _, row in found] == rows
        assert [where for where, _ in found] == [f"{path}, {noun} 1", f"{path}, {noun} 2"]
    (tmp_path / "rows.txt").write_text("text")
    with pytest.raises(DataError, match="rows with fields come from jsonl or parquet"):
        list(read_rows(find_sources([tmp_path / "rows.txt"])[0]))
