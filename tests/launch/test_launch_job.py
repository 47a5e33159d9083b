"""`strata launch slurm`: what is written and submitted, and what is left where it cannot be."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pretend_slurm import PretendSlurm

from strata.config import load_config
from strata.launch import job as job_module
from strata.train import Recipe, StepEvent
from strata.train import train as run_training

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def small_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one line instead of strata's hundreds of files."""
    package = tmp_path / "installed" / "strata"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VERSION = 'as submitted'\n")
    monkeypatch.setattr(job_module, "PACKAGE", package)
    return package


def test_a_job_folder_holds_code_and_recipe_as_they_were(
    run: Run, slurm: PretendSlurm, tiny_recipe_file: Path, small_package: Path, tmp_path: Path
) -> None:
    code, out, _ = run(
        "launch", "slurm", tiny_recipe_file, "run.steps=20", "--partition", "low", "--time", "60"
    )
    folder = tmp_path / "run" / "jobs" / "001"
    assert code == 0
    assert out.splitlines() == [
        f"job 77 submitted, its folder is {folder}",
        f"see how far it is with strata status {tmp_path / 'run'}",
    ]
    (small_package / "__init__.py").write_text("VERSION = 'edited'\n")
    tiny_recipe_file.write_text("name: edited\n")
    shown = subprocess.run(
        [sys.executable, "-c", "import strata; print(strata.VERSION)"],
        env={**os.environ, "PYTHONPATH": str(folder / "code")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "as submitted\n"
    assert load_config(Recipe, folder / "recipe.yaml").run.steps == 20

    (call,) = slurm.calls("sbatch")
    assert call.startswith("--parsable --job-name=tiny --partition=low --nodes=1 ")
    assert " --time=60 --requeue " in call and call.endswith(f" {folder}/job.sh")
    script = (folder / "job.sh").read_text()
    assert script.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n#SBATCH --partition=low\n")
    kept = json.loads((tmp_path / "run" / "job.json").read_text())
    assert kept == {"job_id": 77, "folder": str(folder)}


def test_a_folder_of_ones_choice_and_json(
    run: Run, slurm: PretendSlurm, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    out_dir = tmp_path / "deep" / "er"
    code, out, _ = run(
        "launch", "slurm", tiny_recipe_file, "--partition", "high", "--out", out_dir, "--json"
    )
    assert code == 0
    assert json.loads(out) == {"job_id": 77, "folder": str(out_dir)}
    assert {entry.name for entry in out_dir.iterdir()} == {"code", "recipe.yaml", "job.sh", "logs"}


def test_each_job_has_a_folder_of_its_own(
    run: Run, slurm: PretendSlurm, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        assert run("launch", "slurm", tiny_recipe_file, "--partition", "low")[0] == 0
    jobs = tmp_path / "run" / "jobs"
    assert {entry.name for entry in jobs.iterdir()} == {"001", "002"}
    assert json.loads((tmp_path / "run" / "job.json").read_text())["folder"] == str(jobs / "002")


def test_dry_run_prints_the_script_and_writes_nothing(
    run: Run, tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))  # no Slurm either
    before = {path for path in tmp_path.rglob("*")}
    code, out, _ = run(
        "launch", "slurm", tiny_recipe_file, "--partition", "any", "--nodes", 2, "--dry-run"
    )
    assert code == 0
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny\n#SBATCH --partition=any\n")
    assert "--nodes=2" in out and "launch local" in out
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("existed", [True, False])
def test_a_refused_job_leaves_nothing(
    run: Run, slurm: PretendSlurm, tiny_recipe_file: Path, tmp_path: Path, existed: bool
) -> None:
    if existed:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text("kept")
    slurm.answer(
        "sbatch",
        "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1",
    )
    before = {path for path in tmp_path.rglob("*")} | {tmp_path / "slurm" / "calls"}
    code, _, err = run("launch", "slurm", tiny_recipe_file, "--partition", "low", "--account", "x")
    assert code == 1
    assert err == ("strata: error: sbatch refused: Batch job submission failed: Invalid account\n")
    assert {path for path in tmp_path.rglob("*")} == before


def test_a_job_that_has_not_ended_is_not_doubled(
    run: Run, slurm: PretendSlurm, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    assert run("launch", "slurm", tiny_recipe_file, "--partition", "low")[0] == 0
    slurm.answer("squeue", "echo 'PENDING|Priority|'")
    code, _, err = run("launch", "slurm", tiny_recipe_file, "--partition", "low")
    assert code == 2
    assert err == (
        f"strata: error: job 77 of the run in {tmp_path / 'run'} is PENDING: wait for it, or "
        "scancel 77 first\n"
    )
    slurm.answer("squeue", "echo 'TIMEOUT|None|'")
    assert run("launch", "slurm", tiny_recipe_file, "--partition", "low")[0] == 0


def test_what_would_end_the_job_at_once_is_found_before(
    run: Run,
    slurm: PretendSlurm,
    tiny_recipe_file: Path,
    tiny_recipe: Callable[..., Recipe],
    tmp_path: Path,
) -> None:
    held = []

    def look(event: StepEvent) -> None:
        if event.step == 1:
            held.append(run("launch", "slurm", tiny_recipe_file, "--partition", "low"))

    run_training(tiny_recipe("optim.lr=0.002"), progress=False, on_step=look)
    assert held[0][0] == 2
    assert re.search(r"error: a process is training in \S+/run: wait for it", held[0][2])

    code, _, err = run("launch", "slurm", tiny_recipe_file, "--partition", "low")
    assert code == 2
    assert "holds a run of another recipe (optim.lr was 0.002, is 0.003" in err
    assert slurm.calls("sbatch") == []
