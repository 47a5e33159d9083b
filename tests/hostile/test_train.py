"""Wrong recipes, damaged checkpoints, full disks: one line, a non-zero exit, nothing lost."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from strata.cli.main import main


def strata(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of the command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["strata", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if "strata: error:" in line]
    assert len(lines) == 1
    return lines[0]


def checkpoint_names(run_dir: Path) -> list[str]:
    return sorted(entry.name for entry in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds NoneType, not a mapping"),
        ("- a", "holds list, not a mapping"),
        ("a: [", "is not YAML"),
        ("name: x", "is required but not given"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
        ("x: " + "[" * 50, "is not YAML"),
    ],
)
def test_wrong_recipe_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    assert strata(monkeypatch, "train", path) == 2
    assert message in error_line(capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", "unknown key optim.learning_rate; allowed here: lr,"),
        ("run.steps=many", "run.steps"),
        ("run.steps", "not of the form a.b=value"),
        ("model.host.hidden_sise=3", "hidden_sise"),
        ("memory.layers=[9]", "names layer 9"),
        ("data.dir=/nowhere", "no prepared data at /nowhere"),
    ],
)
def test_wrong_overrides(
    tiny_recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    assert strata(monkeypatch, "train", tiny_recipe_file, override) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_run_folder_is_a_file(
    tiny_recipe_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run").write_text("a file")
    assert strata(monkeypatch, "train", tiny_recipe_file) == 2
    assert "is a file: name a folder" in error_line(capsys)


@pytest.fixture
def half_run(tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run folder of a finished run of 12 steps with checkpoints 8 and 12."""
    assert strata(monkeypatch, "train", tiny_recipe_file, "--json") == 0
    assert checkpoint_names(tmp_path / "run") == ["step_00000008", "step_00000012"]
    return tmp_path / "run"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "dense_optimizer.safetensors",
        "value_optimizer.safetensors",
        "rng.safetensors",
        "state.json",
        "manifest.json",
    ],
)
def test_a_truncated_file_is_named_and_never_skipped(
    half_run: Path,
    tiny_recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    newest = half_run / "checkpoints" / "step_00000012"
    path = newest / name
    path.write_bytes(path.read_bytes()[:-7])
    assert strata(monkeypatch, "train", tiny_recipe_file) == 2
    line = error_line(capsys)
    assert str(path) in line and f"delete {newest} to go on from step 8" in line

    shutil.rmtree(newest)  # what the line says to do
    assert strata(monkeypatch, "train", tiny_recipe_file) == 0


def test_a_checkpoint_of_another_model_under_this_recipe(
    half_run: Path,
    tiny_recipe_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A whole, correctly signed checkpoint whose tensors are not this model's."""
    import json

    from strata.train.checkpoint import CheckpointFolder

    checkpoints = CheckpointFolder(half_run / "checkpoints")
    opened = checkpoints.open(12)
    groups = {
        path.stem: dict(opened.tensors(path.stem)) for path in opened.path.glob("*.safetensors")
    }
    groups["model"].pop("lm_head.weight")
    state = json.loads((opened.path / "state.json").read_text())
    shutil.rmtree(opened.path)
    checkpoints.save(12, groups=groups, state=state)
    assert strata(monkeypatch, "train", tiny_recipe_file) == 2
    assert "it lacks the weight lm_head.weight" in error_line(capsys)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that holds about four checkpoints and no more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_disk_full_while_saving(
    tiny_recipe_file: Path,
    tiny_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tiny_disk / "run"
    arguments = ("train", tiny_recipe_file, f"run.dir={run_dir}", "run.checkpoint_every=1")
    assert strata(monkeypatch, *arguments, "run.keep_checkpoints=null") == 1
    line = error_line(capsys)
    assert "disk full while saving" in line and "is intact" in line
    kept = checkpoint_names(run_dir)
    assert kept and all(name.startswith("step_") for name in kept)

    # With room made, the same command goes on from what is left.
    for name in kept[:-1]:
        shutil.rmtree(run_dir / "checkpoints" / name)
    assert strata(monkeypatch, *arguments, "run.keep_checkpoints=1") == 0
    assert checkpoint_names(run_dir) == ["step_00000012"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process may grow beyond 50 kB: what a quota does, and needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_size_limit_is_a_full_disk(
    tiny_recipe_file: Path,
    tmp_path: Path,
    small_files: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert strata(monkeypatch, "train", tiny_recipe_file) == 1
    line = error_line(capsys)
    assert "disk full while saving" in line and "this run has no earlier checkpoint" in line
    assert checkpoint_names(tmp_path / "run") == []
