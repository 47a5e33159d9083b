"""Files and folders to documents: every kind, in order, with its source and metadata."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
import zipfile
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from strata.explicit.documents import Document, ReadReport, read_documents

PAGE = """<!DOCTYPE html><html><head><title>River
 guide</title><style>p {color: red}</style><script>var hidden_code = 1;</script></head>
<body><nav>Home | About</nav><div><h1>The Rhine</h1>
<p>It flows from the <b>Al</b>ps to the
 sea &amp; carries&nbsp;ships.</p><ul><li>Basel</li><li>Cologne</li></ul>
<table><tr><td>length</td><td>1,233 km</td></tr></table><pre>a
  b</pre><!-- a comment --><p hidden>secret</p></div><footer>imprint</footer></body></html>"""


def read(*paths: Path, **options: object) -> tuple[list[Document], ReadReport]:
    """All documents, and the report."""
    report = ReadReport()
    return list(read_documents(paths, report=report, **options)), report  # type: ignore[arg-type]


def write_docx(path: Path, *paragraphs: str) -> None:
    """A Word file of plain paragraphs, as small as the format allows."""
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    body = "".join(f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>" for text in paragraphs)
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    types = "http://schemas.openxmlformats.org/package/2006/content-types"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "[Content_Types].xml",
            f'<Types xmlns="{types}"><Default Extension="rels" ContentType='
            '"application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/word/document.xml" ContentType="{main}"/></Types>',
        )
        archive.writestr(
            "_rels/.rels",
            f'<Relationships xmlns="{relations}"><Relationship Id="r1" '
            f'Type="{office}/officeDocument" Target="word/document.xml"/></Relationships>',
        )
        archive.writestr(
            "word/document.xml",
            f'<w:document xmlns:w="{word}"><w:body>{body}</w:body></w:document>',
        )


def write_pdf(path: Path, *lines: str) -> None:
    """A PDF file of one page, with a correct table of its objects."""
    shown = "".join(f"({line}) Tj 0 -20 Td " for line in lines)
    stream = f"BT /F1 12 Tf 72 720 Td {shown}ET".encode("latin-1")
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, item)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = len(content)
    content += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    content += b"trailer << /Size %d /Root 1 0 R >>\n" % (len(objects) + 1)
    path.write_bytes(content + b"startxref\n%d\n%%%%EOF\n" % end)


def test_folder_is_read_in_order_without_hidden_and_unknown_files(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "b").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b" / "two.md").write_text("# Two\n")
    (folder / "a.txt").write_text("one")
    (folder / "c.TXT").write_text("three")
    (folder / ".secret.txt").write_text("hidden")
    (folder / ".git" / "x.txt").write_text("hidden")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8")
    (folder / "blank.txt").write_text(" \n\t\n")
    (folder / "zero.txt").write_bytes(b"")
    documents, report = read(folder)
    assert [(d.text, d.source) for d in documents] == [
        ("one", f"{folder}/a.txt"),
        ("# Two\n", f"{folder}/b/two.md"),
        ("three", f"{folder}/c.TXT"),
    ]
    assert report.documents == 3 and report.blank == 2 and report.files == 5
    assert {s.path.name: s.reason.partition(" (")[0] for s in report.skipped} == {
        "photo.jpg": "of no known kind",
        "blank.txt": "no text in it",
        "zero.txt": "no text in it",
    }


def test_same_documents_at_every_reading(tmp_path: Path) -> None:
    for name in ("z", "m", "a", "Ä", "10", "9"):
        (tmp_path / f"{name}.txt").write_text(name)
    first, second = read(tmp_path)[0], read(tmp_path)[0]
    assert first == second and [d.text for d in first] == ["10", "9", "a", "m", "z", "Ä"]


def test_links_are_followed_once_and_loops_end(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (folder / "sub" / "own.txt").write_text("own")
    (tmp_path / "outside" / "far.txt").write_text("far")
    (folder / "a_loop").symlink_to(folder)
    (folder / "sub" / "up").symlink_to("..")
    (folder / "b_link").symlink_to(tmp_path / "outside")
    (folder / "c_link").symlink_to(tmp_path / "outside")
    (folder / "a.txt").symlink_to(folder / "sub" / "own.txt")
    (folder / "broken.txt").symlink_to("nowhere")
    (folder / "self.txt").symlink_to("self.txt")
    documents, report = read(folder)
    assert [(d.text, d.source) for d in documents] == [
        ("far", f"{folder}/b_link/far.txt"),
        ("own", f"{folder}/sub/own.txt"),
    ]
    assert {s.path.name for s in report.skipped} == {"broken.txt", "self.txt"}
    assert all("link to nothing" in s.reason for s in report.skipped)


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    documents, report = read(tmp_path / "a.txt", tmp_path)
    assert len(documents) == 1
    assert [s.reason for s in report.skipped] == [f"the same file as {tmp_path}/a.txt"]


def test_named_files_may_have_any_suffix_and_be_hidden(tmp_path: Path) -> None:
    for name in ("README", ".env", "main.py"):
        (tmp_path / name).write_text(f"content of {name}")
    documents, _ = read(*(tmp_path / name for name in ("README", ".env", "main.py")))
    assert [d.text.split()[-1] for d in documents] == ["README", ".env", "main.py"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_with_a_mark(tmp_path: Path, encoding: str) -> None:
    text = "Der Fluß\nläuft 🌊 北京"
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read(tmp_path / "a.txt")[0][0].text == text


def test_a_file_name_that_is_not_utf8_becomes_a_source_that_is(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt"))
    try:
        path.write_text("x")
    except OSError:
        pytest.skip("this file system refuses such names")
    assert read(tmp_path)[0][0].source.encode("utf-8").endswith(b"/\\xff.txt")


def test_page_gives_its_main_text(tmp_path: Path) -> None:
    (tmp_path / "rhine.html").write_text(PAGE)
    documents, _ = read(tmp_path)
    assert documents[0].metadata == {"title": "River guide"}
    assert documents[0].text == (
        "The Rhine\n\nIt flows from the Alps to the sea & carries ships.\n\n"
        "Basel\nCologne\n\nlength 1,233 km\n\na\n  b"
    )


def test_page_with_a_main_element_or_one_article(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<body><div>ads</div><main><p>told</p></main></body>")
    (tmp_path / "b.htm").write_text("<div>ads</div><article>told</article>")
    (tmp_path / "c.html").write_text("<article>one</article><article>two</article>")
    assert [d.text for d in read(tmp_path)[0]] == ["told", "told", "one\n\ntwo"]


def test_page_in_the_encoding_that_it_names(tmp_path: Path) -> None:
    page = '<meta charset="iso-8859-2"><p>Łódź</p>'
    (tmp_path / "a.html").write_bytes(page.encode("iso-8859-2"))
    assert read(tmp_path)[0][0].text == "Łódź"


def test_page_nested_deeper_than_python_recurses(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<div>" * 5000 + "deep" + "</div>" * 5000)
    assert read(tmp_path)[0][0].text == "deep"


def test_pdf_and_docx(tmp_path: Path) -> None:
    write_pdf(tmp_path / "a.pdf", "The Rhine rises", "in the Alps.")
    write_docx(tmp_path / "b.docx", "The Danube ends", "in the Black Sea &amp; a delta.")
    pdf, docx = read(tmp_path)[0]
    assert " ".join(pdf.text.split()) == "The Rhine rises in the Alps."
    assert docx.text == "The Danube ends\n\nin the Black Sea & a delta."


def test_rows_of_jsonl_are_documents(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "id": "a", "year": 1999, "ok": True, "share": 0.5, "none": None},
        {"text": "", "id": "b"},
        {"text": "three\u2028still three", "id": 7, "tags": ["x"], "body": "y" * 1001},
    ]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    with gzip.open(tmp_path / "b.jsonl.gz", "wb") as file:
        file.write(lines.encode() + b"\n")
    documents, report = read(tmp_path)
    assert documents[0] == Document(
        "one", f"{tmp_path}/a.jsonl#1", {"id": "a", "year": 1999, "ok": True, "share": 0.5}
    )
    assert documents[1] == Document("three\u2028still three", f"{tmp_path}/a.jsonl#5", {"id": 7})
    assert [d.source for d in documents[2:]] == [
        f"{tmp_path}/b.jsonl.gz#1",
        f"{tmp_path}/b.jsonl.gz#5",
    ]
    assert report.blank == 2 and report.skipped == []
    named, _ = read(tmp_path / "a.jsonl", id_field="id", metadata_fields=["body", "year"])
    assert [d.source for d in named] == ["a", "7"]
    assert [dict(d.metadata) for d in named] == [{"year": 1999}, {"body": "y" * 1001}]


def test_rows_of_parquet_are_documents(tmp_path: Path) -> None:
    table = pa.table(
        {
            "body": pa.array(["one", None, "three"], pa.large_string()),
            "key": [11, 12, 13],
            "day": [date(2020, 1, 2)] * 3,
            "at": pa.array([datetime(2020, 1, 2, 3, 4, 5)] * 3, pa.timestamp("ns")),
            "price": [Decimal("1.50")] * 3,
            "share": [0.25, None, float("nan")],
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "vector": [[1.0, 2.0]] * 3,
            "raw": [b"\xff"] * 3,
        }
    )
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    documents, report = read(tmp_path / "a.parquet", text_field="body", id_field="key")
    assert [(d.text, d.source) for d in documents] == [("one", "11"), ("three", "13")]
    assert documents[0].metadata == {
        "day": "2020-01-02",
        "at": "2020-01-02 03:04:05.000000000",
        "price": "1.50",
        "share": 0.25,
        "kind": "x",
    }
    assert "share" not in documents[1].metadata
    assert report.blank == 1
    assert [d.source for d in read_documents([tmp_path / "a.parquet"], text_field="body")] == [
        f"{tmp_path}/a.parquet#1",
        f"{tmp_path}/a.parquet#3",
    ]


def test_one_line_of_ten_megabytes(tmp_path: Path) -> None:
    text = "word " * 2_000_000
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": text}))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "c.parquet")
    assert [len(d.text) for d in read(tmp_path)[0]] == [10_000_000] * 3


def test_tables_are_streamed(tmp_path: Path) -> None:
    """A hundred megabytes of rows go by; a few are held."""
    text = "x" * 100_000
    writer = pq.ParquetWriter(tmp_path / "a.parquet", pa.schema({"text": pa.string()}))
    for _ in range(10):
        writer.write_table(pa.table({"text": [text] * 50}))
    writer.close()
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", compresslevel=1) as file:
        for _ in range(500):
            file.write(json.dumps({"text": text}) + "\n")
    held = pa.total_allocated_bytes()
    tracemalloc.start()
    most = count = 0
    for document in read_documents([tmp_path], report=ReadReport()):
        count += len(document.text)
        most = max(most, pa.total_allocated_bytes() - held)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 100_000_000
    assert most < 24 * 2**20 and peak < 12 * 2**20


def test_skipped_files_are_warned_of_without_a_report(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\0\1")
    with pytest.warns(UserWarning, match=r"b\.txt skipped: binary, not text"):
        assert [d.text for d in read_documents([tmp_path])] == ["a"]
