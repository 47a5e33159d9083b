"""Checkpoint folders: whole or absent, oldest deleted last, damage named."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from strata.errors import CheckpointError, StorageError
from strata.train import checkpoint as checkpoint_module
from strata.train.checkpoint import CheckpointFolder

STATE = {"where": {"epoch": 3}}


def groups(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "model": {"weight": torch.full((64, 8), value), "scale": torch.tensor(value)},
        "empty": {},
    }


def saved(folder: Path, *steps: int, keep: int | None = None) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, keep=keep)
    for step in steps:
        checkpoints.save(step, groups=groups(step), state=STATE)
    return checkpoints


def test_round_trip(tmp_path: Path) -> None:
    path = saved(tmp_path, 7).path(7)
    assert path.name == "step_00000007"
    opened = CheckpointFolder(tmp_path).open(7)
    assert opened.state == STATE
    assert dict(opened.tensors("empty")) == {}
    tensors = dict(opened.tensors("model"))
    assert tensors["weight"].equal(torch.full((64, 8), 7.0))
    assert tensors["scale"].shape == ()


def test_no_pickle_on_disk(tmp_path: Path) -> None:
    files = {file.suffix for file in saved(tmp_path, 1).path(1).iterdir()}
    assert files == {".safetensors", ".json"}


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 3, 4, keep=2).steps() == [3, 4]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step_00000003", "step_00000004"]


def test_keep_none_keeps_all(tmp_path: Path) -> None:
    assert saved(tmp_path, 1, 2, 3).steps() == [1, 2, 3]


def test_oldest_is_deleted_only_after_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(OSError, match="broken disk"):
        checkpoints.save(2, groups=groups(), state=STATE)
    assert checkpoints.steps() == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]
    checkpoints.open(1)


def test_stray_temporaries_are_cleaned_and_never_counted(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    (tmp_path / ".unfinished_step_00000002").mkdir()
    (tmp_path / ".unfinished_step_00000002" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".unfinished_deleted_00000000").mkdir()
    (tmp_path / "notes").mkdir()
    assert checkpoints.steps() == [1]
    checkpoints.clean()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["notes", "step_00000001"]


def test_a_kill_while_deleting_leaves_no_half_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)
    monkeypatch.setattr(checkpoint_module.shutil, "rmtree", _killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(2, groups=groups(), state=STATE)
    assert checkpoints.steps() == [2]


def _killed(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("model.safetensors", _truncate, "bytes, written as"),
        ("model.safetensors", _flip_a_byte, "sha256 differs"),
        ("model.safetensors", Path.unlink, "missing"),
        ("state.json", _flip_a_byte, "sha256 differs"),
        ("state.json", Path.unlink, "missing"),
        ("manifest.json", Path.unlink, "missing"),
        ("manifest.json", lambda path: path.write_text("{"), "not JSON"),
        ("manifest.json", lambda path: path.write_text("[" * 100_000), "not JSON"),
        ("manifest.json", lambda path: path.write_text("[]"), "list, not a mapping"),
        ("manifest.json", lambda path: path.write_text("{}"), "not the manifest"),
        ("manifest.json", lambda path: path.write_bytes(b"\xff"), "not JSON"),
        ("manifest.json", lambda path: path.write_text(" " * (2 << 20)), "at most 1048576 allowed"),
    ],
)
def test_damage_is_named_with_what_to_do(
    tmp_path: Path, name: str, damage: object, message: str
) -> None:
    checkpoints = saved(tmp_path, 100, 200)
    assert callable(damage)
    damage(checkpoints.path(200) / name)
    with pytest.raises(CheckpointError) as caught:
        checkpoints.open(200)
    line = str(caught.value)
    assert message in line and name in line and "\n" not in line
    assert line.endswith(f"delete {checkpoints.path(200)} to go on from step 100")


def test_without_an_earlier_one_the_remedy_is_to_start_anew(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 100)
    (checkpoints.path(100) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="to start this run from its beginning"):
        checkpoints.open(100)


def test_a_path_in_the_manifest_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    manifest_path = checkpoints.path(1) / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    manifest["files"]["../../secret"] = manifest["files"]["state.json"]
    manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"bad entry '\.\./\.\./secret'"):
        checkpoints.open(1)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    manifest_path = checkpoints.path(1) / "manifest.json"
    text = manifest_path.read_text().replace('"format_version": 1', '"format_version": 9')
    manifest_path.write_text(text)
    with pytest.raises(CheckpointError, match="format 9, this strata reads format 1"):
        checkpoints.open(1)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    checkpoints = saved(tmp_path, 1, keep=1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, "full")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(StorageError) as caught:
        checkpoints.save(2, groups=groups(), state=STATE)
    assert "disk full while saving" in str(caught.value)
    assert "the checkpoint of step 1 is intact" in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_00000001"]


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(StorageError, match="no permission while saving"):
        saved(tmp_path, 1)
