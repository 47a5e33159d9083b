"""Wrong and damaged input to the data room: one clear line, a non-zero exit, nothing lost."""

from __future__ import annotations

import builtins
import errno
import gzip
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from strata.cli.main import main
from strata.data import prepare as prepare_file
from strata.data.dataset import TokenDataset
from strata.data.loader import Loader, LoaderConfig
from strata.data.manifest import TokenManifest
from strata.data.prepare import MemoryPlan, PrepareConfig, prepare
from strata.data.readers import ReadOptions, read_documents
from strata.data.sources import find_sources
from strata.data.tokenizer import train_tokenizer
from strata.errors import DataError, StorageError

ROWS = [{"text": f"{number} stones lie under the snow"} for number in range(300)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "a.jsonl").write_bytes(LINES)
    train_tokenizer([folder / "a.jsonl"], out=folder / "bpe", vocab_size=280)
    return folder / "bpe"


Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path, bpe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """`refused("a.jsonl", "--seed", "x")`: the one line with which `strata data prepare` ends."""

    def run(*arguments: str, code: int = 2) -> str:
        command = ["strata", "data", "prepare", "--out", str(tmp_path / "out")]
        command += [] if "--tokenizer" in arguments else ["--tokenizer", str(bpe)]
        monkeypatch.setattr(sys, "argv", [*command, *arguments])
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert end.value.code == code
        assert captured.out == ""
        assert captured.err.startswith("strata: error: ") and captured.err.count("\n") == 1
        assert not (tmp_path / "out" / "manifest.json").exists()
        return captured.err

    return run


# Sources


def test_missing_and_unknown_sources(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.csv").write_text("text\n")
    assert "no source at no.jsonl" in refused("no.jsonl")
    assert "a.csv is of no known kind: expected .parquet" in refused("a.csv")
    assert "nothing to read in empty: expected .parquet" in refused("empty")
    assert "nothing to read in none" in refused("none")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_sources_without_text(tmp_path: Path, refused: Refused, name: str) -> None:
    if name == "a.parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(b"")
    assert f"no text in {name}: every record is empty" in refused(name)


def test_text_that_is_not_utf8(tmp_path: Path, refused: Refused) -> None:
    latin = "caf\xe9".encode("latin-1")
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"text": "' + latin + b'"}\n')
    assert "a.jsonl, line 301: not UTF-8 (byte 14 of the line is 0xe9)" in refused("a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n" + latin)
    assert "a.txt, line 3: not UTF-8 (byte 11 of the file is 0xe9)" in refused("a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n\n" + latin)
    error = refused("b.txt", "--paragraphs")
    assert "b.txt, line 5: not UTF-8 (byte 16 of the file is 0xe9)" in error
    strings = pa.array([b"ok", latin], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    assert "a.parquet, row 2: not UTF-8 (byte 4 of the text)" in refused("a.parquet")


def test_missing_fields_name_those_there_are(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b'{"body": "a", "id": 3}\n')
    error = refused("a.jsonl")
    assert "a.jsonl, line 301: no field 'text'" in error
    assert "available: 'body', 'id'" in error and "--text-field" in error
    pq.write_table(pa.table({"body": ["a"], "id": [3]}), tmp_path / "a.parquet")
    assert "a.parquet: no field 'text'" in refused("a.parquet")
    assert "column 'id' holds int64, not strings" in refused("a.parquet", "--text-field", "id")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter (column "),
        (b'["text"]', "holds list, not an object with fields"),
        (b'{"text": 3}', "field 'text' holds int, not a string"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "a"}', "no field 'text', nor 'prompt' and 'completion'"),
        (b"[" * 200_000, "too deep a nesting"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "a number too long"),
        (b"{}", "available: none"),
    ],
)
def test_lines_that_are_no_rows(
    tmp_path: Path, refused: Refused, line: bytes, message: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    error = refused("a.jsonl")
    assert "a.jsonl, line 2: " in error and message in error


def test_damaged_compressed_files(tmp_path: Path, refused: Refused) -> None:
    zstd = zstandard.ZstdCompressor(write_checksum=True)
    packed = {"gz": gzip.compress(LINES), "zst": zstd.compress(LINES)}
    for suffix, content in packed.items():
        broken = bytearray(content)
        broken[len(broken) // 2] ^= 0xFF
        for damage in (content[:-9], content[: len(content) // 2], bytes(broken), LINES):
            (tmp_path / f"a.jsonl.{suffix}").write_bytes(damage)
            error = refused(f"a.jsonl.{suffix}")
            # A flipped byte may also show as a text that is no text.
            assert f"a.jsonl.{suffix}" in error
            assert "damaged" in error or damage == bytes(broken)


def test_a_zstd_bomb_is_not_unpacked(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor(level=19).compress(bytes(2**30))
    assert len(frame) < 2**17
    (tmp_path / "a.jsonl.zst").write_bytes(frame)
    (source,) = find_sources([tmp_path / "a.jsonl.zst"])
    with pytest.raises(DataError, match="line 1: the line is longer than 1 MiB"):
        list(read_documents(source, options=ReadOptions(max_document_bytes=2**20)))


def test_damaged_parquet_files(tmp_path: Path, refused: Refused) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [row["text"] for row in ROWS]}), path, compression="zstd")
    whole = path.read_bytes()
    inside = bytearray(whole)
    inside[100:200] = bytes(100)
    for damage in (whole[:-20], b"PAR1", b"", bytes(inside), LINES):
        path.write_bytes(damage)
        assert "a.parquet is damaged or not parquet: " in refused("a.parquet")


def test_documents_too_long_for_memory(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = MemoryPlan(
        batch_bytes=2**20, max_document_bytes=1000, run_bytes=2**20, range_bytes=2**20
    )
    monkeypatch.setattr(prepare_file, "plan_memory", lambda *_, **__: plan)
    text = "snow " * 201
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.txt").write_text(text + "\nand more")
    pq.write_table(pa.table({"text": ["ok", text, "ok"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"prompt": [text], "completion": ["a"]}), tmp_path / "b.parquet")
    assert "a.jsonl, line 1: the line is longer than 1000 bytes" in refused("a.jsonl")
    assert "is longer than 1000 bytes" in refused("a.txt")
    assert "(--paragraphs)" in refused("a.txt")
    assert "a.txt, line 1: " in refused("a.txt", "--paragraphs")
    assert "a.parquet, row 2: the document is longer" in refused("a.parquet")
    assert "b.parquet, row 1: the document is longer" in refused("b.parquet")


# Arguments


def test_arguments_out_of_range(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert "memory_gb" in refused("a.jsonl", "--memory-gb", "0.1")
    assert "memory_gb" in refused("a.jsonl", "--memory-gb", "nan")
    assert "val_fraction" in refused("a.jsonl", "--val-fraction", "1.0")
    assert "shard_tokens" in refused("a.jsonl", "--shard-tokens", "0")


def test_tokenizers_that_are_none(tmp_path: Path, bpe: Path, refused: Refused) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    folder = tmp_path / "bpe"
    arguments = ("a.jsonl", "--tokenizer", "bpe")
    assert "no tokenizer.json in bpe: make one with" in refused(*arguments)
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is damaged" in refused(*arguments)
    (folder / "tokenizer.json").write_bytes((bpe / "tokenizer.json").read_bytes())
    assert "tokenizer_config.json names no eos_token" in refused(*arguments)
    (folder / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is damaged" in refused(*arguments)
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert "eos_token '</s>' is not in tokenizer.json" in refused(*arguments)


def test_folders_that_cannot_be_the_output(tmp_path: Path, bpe: Path, refused: Refused) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    assert "lies inside the source" in refused(".")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    assert "exists and holds other files" in refused("a.jsonl")
    assert (tmp_path / "out" / "diary.txt").read_text() == "mine"
    (tmp_path / "out" / "diary.txt").unlink()
    (tmp_path / "out").rmdir()
    (tmp_path / "out").write_text("a file")
    assert "cannot write" in refused("a.jsonl", code=1)


def test_other_arguments_on_a_finished_folder(
    tmp_path: Path,
    bpe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    out = tmp_path / "out"
    command = ["strata", "data", "prepare", str(tmp_path / "a.jsonl"), "--out", str(out)]
    command += ["--tokenizer", str(bpe)]

    def run(*more: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    code, first, _ = run()
    assert code == 0 and "train: " in first and "300 documents" in first
    code, second, _ = run()
    assert code == 0 and "is complete already" in second
    code, summary, _ = run("--json")
    assert code == 0 and json.loads(summary)["num_documents"] == 300
    assert json.loads(summary)["was_complete"] is True
    code, _, error = run("--seed", "7", "--val-fraction", "0.1")
    assert code == 2 and "seed was 42, now 7; val_fraction was 0.0, now 0.1" in error
    (tmp_path / "a.jsonl").write_bytes(LINES[:-100])
    code, _, error = run()
    assert code == 2 and "the sources are others or have changed" in error


# A full disk


class FullFile(io.FileIO):
    """A file on a disk that is full behind `LIMIT` bytes."""

    LIMIT = 2500

    def write(self, content: object) -> int:
        view = memoryview(content).cast("B")  # type: ignore[arg-type]
        if self.tell() + len(view) > self.LIMIT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(view)


def test_a_full_disk_keeps_what_was_done(
    tmp_path: Path, bpe: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "elsewhere").mkdir()
    plan = MemoryPlan(
        batch_bytes=1000, max_document_bytes=10_000, run_bytes=1500, range_bytes=10_000
    )
    monkeypatch.setattr(prepare_file, "plan_memory", lambda *_, **__: plan)
    config = PrepareConfig()
    prepare([tmp_path / "a.jsonl"], out=tmp_path / "whole", tokenizer=bpe, config=config)

    really_open = builtins.open

    def open_full(path: object, mode: str = "r", *arguments: object, **options: object) -> object:
        if mode in ("wb", "ab") and "out" in Path(str(path)).parts:
            return FullFile(str(path), mode)
        return really_open(path, mode, *arguments, **options)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", open_full)
        error = refused("a.jsonl", code=1)
    assert "disk full while writing" in error and "run the same command again" in error
    state = json.loads((tmp_path / "out" / ".prepare" / "state.json").read_text())
    assert state["runs"] and not state["scattered"]
    prepare([tmp_path / "a.jsonl"], out=tmp_path / "out", tokenizer=bpe, config=config)
    for path in (tmp_path / "whole").rglob("*.npy"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes() == (
            path.read_bytes()
        )


def test_an_unwritable_tokenizer_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        train_tokenizer([tmp_path / "a.jsonl"], out=tmp_path / "file" / "bpe", vocab_size=280)


# Prepared folders


@pytest.fixture
def prepared(tmp_path: Path, bpe: Path) -> Path:
    """A folder of several shards, to be damaged."""
    (tmp_path / "a.jsonl").write_bytes(LINES)
    config = PrepareConfig(shard_tokens=1000)
    prepare([tmp_path / "a.jsonl"], out=tmp_path / "tokens", tokenizer=bpe, config=config)
    return tmp_path / "tokens"


def change_manifest(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(DataError) as error:
        TokenDataset.open(folder, **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    return str(error.value)


def test_folders_that_are_no_data(tmp_path: Path, prepared: Path) -> None:
    assert "no manifest.json in" in refusal(tmp_path / "nowhere")
    assert "has no split 'val', only train" in refusal(prepared, split="val")
    assert "tokenizer of 280 tokens, the model has 279" in refusal(prepared, vocab_size=279)
    (prepared / "manifest.json").unlink()
    (prepared / ".prepare").mkdir()
    assert "is unfinished: run the same" in refusal(prepared)


def test_manifests_that_are_damaged_or_new(prepared: Path) -> None:
    def set_(key: str, value: object) -> Callable[[dict], None]:
        return lambda content: content.__setitem__(key, value)

    whole = (prepared / "manifest.json").read_text()
    changes = {
        "format_version is 2, this strata reads": set_("format_version", 2),
        "format is 'other'": set_("format", "other"),
        "its counts do not add up": lambda c: c["splits"]["train"].update(num_tokens=1),
        "is damaged: dtype": set_("dtype", "object"),
        "is damaged: colour": set_("colour", "red"),
        "is damaged: splits": lambda c: c["splits"]["train"]["shards"][0].update(name="../../x"),
        "is empty": lambda c: c["splits"].update(
            train={"num_tokens": 0, "num_documents": 0, "shards": []}
        ),
    }
    for message, change in changes.items():
        (prepared / "manifest.json").write_text(whole)
        change_manifest(prepared, change)
        assert message in refusal(prepared)
    for content in (whole[:-30], "", "[]", "\x00"):
        (prepared / "manifest.json").write_text(content)
        assert "manifest.json is damaged" in refusal(prepared)


def test_shards_missing_truncated_or_swapped(prepared: Path) -> None:
    for kind in ("tokens", "documents", "loss_from"):
        path = prepared / "train" / f"00001.{kind}.npy"
        whole = path.read_bytes()
        path.unlink()
        assert f"00001.{kind}.npy cannot be read: No such file" in refusal(prepared)
        path.write_bytes(whole[:-10])
        assert "it has" in refusal(prepared) and "the manifest says" in refusal(prepared)
        for header in (b"PK\x03\x04", b"\x93NUMPY\x09\x00", b"\x80\x04\x95\x00"):
            path.write_bytes(header + whole[len(header) :])
            assert f"00001.{kind}.npy is damaged: " in refusal(prepared)
        for old, new in ((b"'<", b"'>"), (b"<i8", b"<f8"), (b"<u2", b"|O2"), (b"(", b"[")):
            if old in whole[:128]:
                path.write_bytes(whole[:128].replace(old, new) + whole[128:])
                assert f"00001.{kind}.npy is damaged: " in refusal(prepared)
        path.write_bytes(whole)
    TokenDataset.open(prepared, verify=True)


def test_a_flipped_bit_is_found_by_verify(prepared: Path) -> None:
    path = prepared / "train" / "00000.tokens.npy"
    content = bytearray(path.read_bytes())
    content[200] ^= 1
    path.write_bytes(content)
    TokenDataset.open(prepared)
    assert "its sha256 is not the manifest's" in refusal(prepared, verify=True)


@pytest.mark.parametrize(
    ("index", "value"), [(0, 5), (1, 0), (1, -1), (1, 2**40), (-1, 2**40), (2, -(2**63))]
)
def test_document_offsets_out_of_order_or_range(prepared: Path, index: int, value: int) -> None:
    path = prepared / "train" / "00000.documents.npy"
    documents = np.load(path, mmap_mode="r+")
    documents[index] = value
    documents.flush()
    assert "00000.tokens.npy is damaged: " in refusal(prepared)


@pytest.mark.parametrize("value", [-1, 10_000, -(2**31)])
def test_losses_outside_of_their_documents(prepared: Path, value: int) -> None:
    path = prepared / "train" / "00000.loss_from.npy"
    loss_from = np.load(path, mmap_mode="r+")
    loss_from[3] = value
    loss_from.flush()
    assert "a loss starts outside of its document" in refusal(prepared)


def test_token_ids_that_the_vocabulary_does_not_have(prepared: Path) -> None:
    for path in sorted((prepared / "train").glob("*.tokens.npy")):
        tokens = np.load(path, mmap_mode="r+")
        tokens[5] = 60_000
        tokens.flush()
    dataset = TokenDataset.open(prepared)
    loader = Loader(dataset, LoaderConfig(batch_size=1, sequence_tokens=512))
    with pytest.raises(DataError, match=r"00.*token id 60000 with a vocabulary of 280"):
        for _ in range(loader.num_rows):
            next(loader)
    with pytest.raises(DataError, match="token id 60000"):
        dataset.document(0)
    with pytest.raises(DataError, match="no document 300"):
        dataset.document(300)


def test_manifest_survives_its_own_json(prepared: Path) -> None:
    content = (prepared / "manifest.json").read_bytes()
    manifest = TokenManifest.model_validate_json(content)
    assert manifest.model_dump_json(indent=1).encode() + b"\n" == content
