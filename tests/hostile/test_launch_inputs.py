"""What `strata launch` and `strata status` refuse: one line, and nothing is written or started."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def partitions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that has two partitions and takes no job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, shell in (("sinfo", "echo long; echo debug"), ("sbatch", "exit 9")):
        (folder / name).write_text(f"#!/bin/sh\n{shell}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nodes", 0], "--nodes 0: give 1 or more"),
        (["--gpus-per-node", -1], "--gpus-per-node -1: give 0 or more"),
        (["--processes-per-node", 0], "--processes-per-node 0: give 1 or more"),
        (["--cpus-per-task", 0], "--cpus-per-task 0: give 1 or more"),
        (["--signal", 0], "--signal 0: give 1 or more"),
        (["--time", "1 hour"], "--time '1 hour': give one word, as Slurm writes it"),
        (["--mem", "1G\n#SBATCH --wrap"], "--mem '1G\\n#SBATCH --wrap': give one word"),
        (["--account", ""], "--account '': give one word"),
        (
            ["--gpus-per-node", 2, "--processes-per-node", 3],
            "--processes-per-node 3 with --gpus-per-node 2: each GPU has one process",
        ),
        (["--gpus-per-node", 2], "run.device is cpu but --gpus-per-node is 2"),
        (["run.device=cuda"], "run.device is cuda but --gpus-per-node is 0"),
        (["run.stepps=3"], "unknown key run.stepps"),
        (["run.steps=0"], "run.steps: Input should be greater than 0"),
        (["model.host.hidden_size=31"], "The hidden size (31) is not a multiple"),
        (["model.host.vocab_size=20"], "raise model.host.vocab_size"),
        (["data.dir=nowhere"], "no prepared data at nowhere"),
        (["--partition", "short"], "--partition short: this cluster has debug, long; give one"),
        (["--partition", "long,short"], "--partition short: this cluster has debug, long"),
    ],
)
def test_refused_before_anything_is_written(
    run: Run,
    partitions: None,
    tiny_recipe_file: Path,
    tmp_path: Path,
    arguments: list[object],
    line: str,
) -> None:
    before = {path for path in tmp_path.rglob("*")}
    partition = [] if "--partition" in arguments else ["--partition", "long"]
    code, out, err = run("launch", "slurm", tiny_recipe_file, *partition, *arguments)
    assert code == 2 and out == ""
    assert line in err and err.startswith("strata: error: ") and err.count("\n") == 1
    assert {path for path in tmp_path.rglob("*")} == before


def test_no_slurm(
    run: Run, tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    code, _, err = run("launch", "slurm", tiny_recipe_file, "--partition", "long")
    assert code == 2
    assert err.startswith("strata: error: sbatch is not on PATH: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", [["slurm", "--partition", "long"], ["local", "--processes", 2]])
def test_no_recipe(run: Run, partitions: None, tmp_path: Path, verb: list[object]) -> None:
    code, _, err = run("launch", verb[0], tmp_path / "gone.yaml", *verb[1:])
    assert code == 2
    assert err == (
        f"strata: error: no recipe at {tmp_path / 'gone.yaml'}: give the path of a YAML file\n"
    )


def test_a_job_folder_that_is_there(
    run: Run, partitions: None, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    code, _, err = run(
        "launch", "slurm", tiny_recipe_file, "--partition", "long", "--out", tmp_path / "mine"
    )
    assert code == 2
    assert f"--out {tmp_path / 'mine'} exists: name a folder that does not" in err
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--processes", 0], "--processes 0: give 1 or more"),
        (["--nodes", 0], "--nodes 0: give 1 or more"),
        (["--nodes", 2], "no --rendezvous with --nodes 2: give HOST:PORT, the same on all of them"),
        (
            ["--nodes", 2, "--rendezvous", "host"],
            "--rendezvous host with --nodes 2: give HOST:PORT",
        ),
        (["--nodes", 2, "--rendezvous", "h:99999"], "--rendezvous h:99999 with --nodes 2"),
        (["--rendezvous", "h:9"], "--rendezvous h:9 is for several machines: give --nodes"),
        (["--processes", 2, "run.stepps=3"], "unknown key run.stepps"),
    ],
)
def test_local_refusals(
    run: Run, tiny_recipe_file: Path, tmp_path: Path, arguments: list[object], line: str
) -> None:
    code, out, err = run("launch", "local", tiny_recipe_file, *arguments)
    assert code == 2 and out == ""
    assert line in err and err.startswith("strata: error: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_status_of_what_is_no_run(run: Run, tmp_path: Path) -> None:
    code, _, err = run("status", tmp_path / "gone")
    assert code == 2 and err.startswith(f"strata: error: no run at {tmp_path / 'gone'}: ")
    code, _, err = run("status", tmp_path)
    assert code == 2 and f"{tmp_path} holds no recipe.yaml" in err
    (tmp_path / "job.json").write_text("[]")
    code, _, err = run("status", tmp_path)
    assert code == 2 and f"{tmp_path / 'job.json'} does not name a job" in err
