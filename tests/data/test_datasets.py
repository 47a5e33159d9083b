"""Data sets of the hub, and folders that mirror them, are prepared as files are."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_documents import Prepare, folder_bytes, make_texts, write_jsonl
from tiny_hub import Hub, make_mirror, serving, splits_of

from strata.cli.main import main
from strata.data.dataset import TokenDataset
from strata.data.hub.mirror import mirror_name, mirror_revision
from strata.data.hub.names import ALIASES, DatasetName, parse_source
from strata.errors import ConfigError, DataError, HubError

pytest.importorskip("datasets")

TEXTS = make_texts(240)
FIRST, SECOND = "1" * 40, "2" * 40
REPO = "owner/tiny"


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    return make_mirror(tmp_path / "mirror", TEXTS)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mirror: Path) -> Iterator[Hub]:
    """A hub with `owner/tiny` at FIRST."""
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.add(f"datasets/{REPO}", mirror, commit=FIRST)
        yield hub


def shards(folder: Path) -> dict[str, bytes]:
    """The bytes of everything but the manifest, which names its sources."""
    return {name: data for name, data in folder_bytes(folder).items() if name != "manifest.json"}


def as_jsonl(tmp_path: Path, name: str, texts: list[str]) -> Path:
    return write_jsonl(tmp_path / f"{name}.jsonl", texts)


# Names


def test_names_of_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def parse(text: str) -> Path | DatasetName:
        return parse_source(text, config=None, split="train")

    assert parse("a/b") == DatasetName("a/b", None, "train")
    assert parse("a/b:en.x@v1.0") == DatasetName("a/b", "en.x", "train", "v1.0")
    assert parse("fineweb_edu@abc") == DatasetName(
        "HuggingFaceFW/fineweb-edu", None, "train", "abc"
    )
    assert parse("fineweb_edu_10bt") == DatasetName(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", "train"
    )
    assert str(parse("a/b:c@d")) == "a/b:c@d"
    assert all(isinstance(parse(name), DatasetName) for name in ALIASES)
    for path in ("a/b.jsonl", "./a/b", "/a/b", "a/b/c", "a.parquet", "../a"):
        assert parse(path) == Path(path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "dclm").mkdir()
    assert parse("a/b") == Path("a/b") and parse("dclm") == Path("dclm")
    folder = Path("a/b")
    assert parse("a/b:c") == DatasetName("a/b", "c", "train", folder=folder)
    (folder / "README.md").write_text("# configs:\n---\nconfigs:\n---\n")
    assert parse("a/b") == folder
    (folder / "README.md").write_text("---\nlicense: mit\nconfigs:\n- x\n---\n")
    assert parse("a/b") == DatasetName("a/b", None, "train", folder=folder)


def test_commits_of_mirrors(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--owner--tiny" / "snapshots" / FIRST
    snapshot.mkdir(parents=True)
    assert (mirror_name(snapshot), mirror_revision(snapshot)) == (REPO, FIRST)
    clone = tmp_path / "clone"
    (clone / ".git" / "refs" / "heads").mkdir(parents=True)
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    assert (mirror_name(clone), mirror_revision(clone)) == ("clone", None)
    (clone / ".git" / "packed-refs").write_text(f"# pack\n{SECOND} refs/heads/main\n")
    assert mirror_revision(clone) == SECOND
    (clone / ".git" / "refs" / "heads" / "main").write_text(f"{FIRST}\n")
    assert mirror_revision(clone) == FIRST
    noted = tmp_path / "local" / ".cache" / "huggingface" / "download" / "data"
    noted.mkdir(parents=True)
    for name, commit in (("a", FIRST), ("b", FIRST)):
        (noted / f"{name}.parquet.metadata").write_text(f"{commit}\netag\n1.0\n")
    assert mirror_revision(tmp_path / "local") == FIRST
    (noted / "b.parquet.metadata").write_text(f"{SECOND}\netag\n1.0\n")
    assert mirror_revision(tmp_path / "local") is None


# Mirrors


def test_a_mirror_is_its_configuration_and_split(
    tmp_path: Path, prepare_to: Prepare, mirror: Path
) -> None:
    train, validation, sample = splits_of(TEXTS)
    manifest = prepare_to(tmp_path / "m", mirror, val_sources=[mirror])
    prepare_to(
        tmp_path / "f",
        as_jsonl(tmp_path, "train", train),
        val_sources=[as_jsonl(tmp_path, "val", validation)],
    )
    assert shards(tmp_path / "m") == shards(tmp_path / "f")
    assert [(e.name, e.config, e.split, e.first, e.num_files) for e in _datasets(manifest)] == [
        ("mirror", "default", "train", 0, 2),
        ("mirror", "default", "validation", 2, 1),
    ]
    names = [entry.name for entry in manifest.prepared_from.sources]
    assert names == [f"data/train-0000{n}-of-00002.parquet" for n in range(2)]
    prepare_to(tmp_path / "s", mirror, config="sample")
    prepare_to(tmp_path / "t", as_jsonl(tmp_path, "sample", sample))
    assert shards(tmp_path / "s") == shards(tmp_path / "t")
    # Named in the SOURCE, which wins.
    again = prepare_to(tmp_path / "u", f"{mirror}:sample", config="default")
    assert shards(tmp_path / "u") == shards(tmp_path / "s")
    assert _datasets(again)[0].asked == "mirror:sample"


def _datasets(manifest):  # type: ignore[no-untyped-def]
    return manifest.prepared_from.datasets


def test_snapshots_of_links_are_read(tmp_path: Path, prepare_to: Prepare, mirror: Path) -> None:
    snapshot = tmp_path / "datasets--owner--tiny" / "snapshots" / FIRST
    for path in sorted(mirror.rglob("*")):
        if path.is_file():
            link = snapshot / path.relative_to(mirror)
            link.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(path, link)
    manifest = prepare_to(tmp_path / "a", snapshot)
    prepare_to(tmp_path / "b", mirror)
    assert shards(tmp_path / "a") == shards(tmp_path / "b")
    (entry,) = _datasets(manifest)
    assert (entry.name, entry.revision, entry.is_mirror) == (REPO, FIRST, True)
    # The data set itself is another source, which is looked up.
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        prepare_to(tmp_path / "a", REPO)


def test_other_columns_are_named(tmp_path: Path, prepare_to: Prepare) -> None:
    mirror = make_mirror(tmp_path / "mirror", TEXTS, column="body")
    with pytest.raises(DataError, match=r"no field 'text', .* available: 'body', 'id'"):
        prepare_to(tmp_path / "out", mirror)
    assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = prepare_to(tmp_path / "out", mirror, text_field="body")
    assert manifest.num_documents == len(splits_of(TEXTS)[0])


# The hub


@pytest.mark.parametrize("streaming", [False, True])
def test_the_hub_gives_what_a_mirror_gives(
    tmp_path: Path, prepare_to: Prepare, mirror: Path, hub: Hub, streaming: bool
) -> None:
    manifest = prepare_to(tmp_path / "h", REPO, val_sources=[REPO], streaming=streaming)
    prepare_to(tmp_path / "m", mirror, val_sources=[mirror])
    assert shards(tmp_path / "h") == shards(tmp_path / "m")
    assert [(e.name, e.asked, e.revision, e.config, e.split) for e in _datasets(manifest)] == [
        (REPO, REPO, FIRST, "default", "train"),
        (REPO, REPO, FIRST, "default", "validation"),
    ]
    fetched = [path.name for path in (tmp_path / "cache").rglob("*.parquet")]
    assert len(fetched) == (0 if streaming else 3)
    # A finished folder asks nothing more.
    hub.asked.clear()
    assert prepare_to(tmp_path / "h", REPO, val_sources=[REPO]) == manifest
    assert hub.asked == []


def test_configurations_and_lines_of_the_hub(
    tmp_path: Path, prepare_to: Prepare, mirror: Path, hub: Hub
) -> None:
    hub.add(f"datasets/{REPO}", mirror, commit=SECOND, branch="v2")
    manifest = prepare_to(tmp_path / "h", f"{REPO}:sample@v2")
    prepare_to(tmp_path / "m", f"{mirror}:sample")
    assert shards(tmp_path / "h") == shards(tmp_path / "m")
    assert _datasets(manifest)[0].revision == SECOND
    assert _datasets(manifest)[0].asked == f"{REPO}:sample@v2"


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_branch_that_moves_changes_nothing(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None, hub: Hub, mirror: Path
) -> None:
    """What was looked up once is read until the folder is done, whatever became of the branch."""
    prepare_to(tmp_path / "whole", REPO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strata.data.passes.read_batches", _die)
        with pytest.raises(Killed):
            prepare_to(tmp_path / "broken", REPO)
    other = make_mirror(tmp_path / "other", make_texts(240, seed=1))
    hub.add(f"datasets/{REPO}", other, commit=SECOND)
    hub.asked.clear()
    manifest = prepare_to(tmp_path / "broken", REPO)
    assert folder_bytes(tmp_path / "broken") == folder_bytes(tmp_path / "whole")
    assert _datasets(manifest)[0].revision == FIRST
    assert not any(FIRST not in path for path in hub.asked), "something was looked up anew"
    # A new folder reads what is there now; the commit can be named, too.
    assert _datasets(prepare_to(tmp_path / "new", REPO))[0].revision == SECOND
    prepare_to(tmp_path / "old", f"{REPO}@{FIRST}")
    assert shards(tmp_path / "old") == shards(tmp_path / "whole")
    with pytest.raises(DataError, match=rf"the data sets were .* at {FIRST}, now .* at {SECOND}"):
        prepare_to(tmp_path / "whole", f"{REPO}@{SECOND}")


def _die(*arguments: object, **options: object) -> None:
    raise Killed


def test_a_lost_connection_keeps_what_was_done(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None, hub: Hub
) -> None:
    prepare_to(tmp_path / "whole", REPO)
    shutil.rmtree(tmp_path / "cache")
    hub.broken = 403
    with pytest.raises(HubError, match=f"the hub answered 403 for the data set {REPO}"):
        prepare_to(tmp_path / "broken", REPO)
    hub.broken = 0
    prepare_to(tmp_path / "broken", REPO)
    assert folder_bytes(tmp_path / "broken") == folder_bytes(tmp_path / "whole")


# What is refused

Refused = Callable[..., str]


@pytest.fixture
def refused(
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """`refused("owner/name", "--split", "x")`: the one line with which the command ends."""

    def run(*arguments: str, code: int = 2) -> str:
        command = ["strata", "data", "prepare", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*command, "--tokenizer", str(tokenizer), *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert end.value.code == code, captured.err
        assert captured.out == ""
        assert captured.err.startswith("strata: error: ") and captured.err.count("\n") == 1
        assert not (tmp_path / "out" / "manifest.json").exists()
        return captured.err

    return run


def test_offline_gives_one_line(refused: Refused) -> None:
    for name in ("owner/name", "fineweb_edu_10bt", f"owner/name@{FIRST}"):
        error = refused(name, code=1)
        assert "is on the hub, and HF_HUB_OFFLINE says not to ask it" in error
        assert "give a folder that it was downloaded to" in error


def test_a_hub_that_does_not_answer(
    refused: Refused, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert "the hub cannot be reached for the data set owner/name" in refused("owner/name", code=1)


def test_what_the_hub_does_not_have(refused: Refused, hub: Hub) -> None:
    error = refused("owner/none", code=1)
    assert "no data set owner/none on the hub, and no file or folder of that name here" in error
    assert "has no revision 'v9'" in refused(f"{REPO}@v9", code=1)
    assert "'nope' not found. Available: ['default', 'sample']" in refused(f"{REPO}:nope")
    assert "has no split 'x', only train, validation" in refused(REPO, "--split", "x")
    hub.gated.add(f"datasets/{REPO}")
    error = refused(REPO, code=1)
    assert f"the data set {REPO} is gated: accept its terms at https://huggingface.co/" in error
    assert "put it into HF_TOKEN" in error


def test_mirrors_that_cannot_be_read(tmp_path: Path, refused: Refused, mirror: Path) -> None:
    assert "Available: ['default', 'sample']" in refused(f"{mirror}:nope")
    assert "has no split 'x', only train, validation" in refused(str(mirror), "--split", "x")
    assert "given twice" in refused(str(mirror), "--val", str(mirror), "--val-split", "train")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (mirror / "data" / "train-00001-of-00002.parquet").write_text(pointer)
    assert "is a pointer of git-lfs, not the file: run `git lfs pull`" in refused(str(mirror))
    (mirror / "sample" / "a.json").unlink()
    assert "sample" in refused(f"{mirror}:sample")
    (mirror / "sample" / "a.json").write_text(json.dumps([{"text": "a"}]))
    assert "a.json, line 1: holds list, not an object" in refused(f"{mirror}:sample")
    (mirror / "sample" / "a.json").rename(mirror / "sample" / "a.csv")
    (mirror / "README.md").write_text(
        (mirror / "README.md").read_text().replace("sample/*.json", "sample/*.csv")
    )
    error = refused(f"{mirror}:sample")
    assert "holds sample/a.csv: strata reads parquet, JSON lines (plain, gz, zst) and txt" in error
    (mirror / "README.md").write_text("---\nconfigs:\n- [unclosed\n---\n")
    assert "mirror" in refused(str(mirror))


def test_options_for_data_sets_need_one(tmp_path: Path, prepare_to: Prepare) -> None:
    source = as_jsonl(tmp_path, "a", TEXTS[:5])
    with pytest.raises(ConfigError, match="are for data sets, and no SOURCE is one"):
        prepare_to(tmp_path / "out", source, config="default")
    with pytest.raises(DataError, match=r"no source at nowhere: .* fineweb_edu_10bt, dclm"):
        prepare_to(tmp_path / "out", "nowhere")


def test_the_command_line_prepares_a_mirror(
    tmp_path: Path,
    tokenizer: Path,
    mirror: Path,
    run: Callable[..., tuple[int, str, str]],
    prepare_to: Prepare,
) -> None:
    code, printed, _ = run(
        *("data", "prepare", f"{mirror}:default", "--out", tmp_path / "out", "--json"),
        *("--tokenizer", tokenizer, "--min-chars", 40, "--rule", "words=..20"),
    )
    assert code == 0
    summary = json.loads(printed)
    train = splits_of(TEXTS)[0]
    short = sum(len(text) < 40 for text in train)
    wordy = sum(len(text) >= 40 and len(text.split()) > 20 for text in train)
    assert short > 10 and wordy > 10
    assert summary["num_dropped"] == {"min_chars": short, "words": wordy}
    assert summary["num_documents"] == len(train) - short - wordy
    assert TokenDataset.open(tmp_path / "out").num_documents == summary["num_documents"]
