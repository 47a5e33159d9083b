"""Jobs on a real Slurm: preempted, queued again, gone on with, cancelled, refused."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from one_machine import Slurm, wait_until

import strata
from strata.launch.job import SubmittedJob, submit_job
from strata.launch.script import SlurmOptions
from strata.launch.status import run_status
from strata.train import Recipe, read_metrics, train

pytestmark = pytest.mark.slurm

Run = Callable[..., tuple[int, str, str]]
MakeRecipe = Callable[..., Recipe]

# Stands in for strata where only signals and exit statuses matter: trains for a minute unless told
# to save, and has ended when it is started again.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

starts = Path(sys.argv[-1]).parent / "starts"
with starts.open("a") as file:
    file.write(os.environ.get("SLURM_RESTART_COUNT", "0") + "\\n")
if len(starts.read_text().split()) > 1:
    sys.exit(0)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
time.sleep(60)
sys.exit(1)
"""

# Ranks that only say who they are; the launcher that starts them is strata's own.
WHO_AM_I = """
import os, sys

if sys.argv[1] == "train":
    print(*(os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURMD_NODENAME")))
else:
    from strata.cli.main import main
    main()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    package = tmp_path / "stand_in" / "strata"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(STAND_IN)
    return package


def starts(job: SubmittedJob) -> list[str]:
    path = job.folder / "starts"
    return path.read_text().split() if path.exists() else []


def submit_and_wait(
    recipe: Recipe, options: SlurmOptions, folder: Path, package: Path
) -> SubmittedJob:
    """Submit a stand-in and wait until it runs; its package may be gone by then."""
    job = submit_job(recipe, options, folder=folder, package=package)
    shutil.rmtree(package)
    wait_until(lambda: starts(job) == ["0"], for_s=60, what="the first start")
    return job


def final_bits(run_dir: Path, step: int) -> dict[str, str]:
    """What the last checkpoint holds, but the clock."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}


def pause_training(job_folder: Path) -> None:
    """Stop a job's training where it is; Slurm wakes it when it tells it to end."""
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:4] == ["-m", "strata", "train"] and line[4] == str(job_folder / "recipe.yaml"):
            process.send_signal(signal.SIGSTOP)


def test_a_preempted_run_ends_as_one_that_was_not(
    slurm: Slurm, run: Run, tiny_recipe: MakeRecipe, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    steps = 400
    given = (f"run.steps={steps}", "run.threads=1", "run.health_every=null")
    whole = tiny_recipe(*given, f"run.dir={tmp_path / 'whole'}", "run.checkpoint_every=1000")
    train(whole, progress=False)

    broken = tmp_path / "broken"
    code, out, err = run(
        "launch", "slurm", tiny_recipe_file, *given, f"run.dir={broken}",
        "run.checkpoint_every=1000", "--partition", "low", "--cpus-per-task", 1, "--json",
    )  # fmt: skip
    assert code == 0, err
    job = SubmittedJob(**json.loads(out))
    tiny_recipe_file.write_text("edited: while the job waits\n")
    wait_until(lambda: len(read_metrics(broken)) > 5, for_s=90, what="the first steps")
    pause_training(Path(job.folder))
    assert run_status(broken).state == "running"

    slurm.preempt()
    slurm.wait_for(job.job_id, "PENDING")
    queued = run_status(broken)
    assert queued.state == "queued" and queued.job_id == job.job_id
    assert queued.checkpoint == queued.step and 5 < queued.step < steps  # saved when told to

    slurm.start_now(job.job_id)
    slurm.wait_for(job.job_id, "COMPLETED", for_s=120)
    ended = run_status(broken)
    assert (ended.state, ended.step) == ("finished", steps)
    assert [record["step"] for record in read_metrics(broken)] == list(range(1, steps + 1))
    assert final_bits(whole.run_dir, steps) == final_bits(broken, steps)
    model = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    assert (broken / "model" / "model.safetensors").read_bytes() == model
    (log,) = (Path(job.folder) / "logs").glob("node0_*.log")
    said = log.read_text()
    assert f"SIGTERM: stopped after step {queued.step} and saved it" in said
    assert f"{steps} steps, loss " in said


def test_preemption_that_grants_time(
    slurm: Slurm, tiny_recipe: MakeRecipe, tmp_path: Path, stand_in: Path
) -> None:
    """Only training is told to end; its status 75 is what the job is queued again for."""
    options = SlurmOptions(partition="patient")
    job = submit_and_wait(tiny_recipe(), options, tmp_path / "job", stand_in)
    slurm.preempt()
    slurm.start_now(job.job_id)
    slurm.wait_for(job.job_id, "COMPLETED")
    assert starts(job) == ["0", "1"]
    assert "Exited with exit code 75" in (job.folder / "logs" / "job.log").read_text()


def test_the_time_limit(
    slurm: Slurm, tiny_recipe: MakeRecipe, tmp_path: Path, stand_in: Path
) -> None:
    options = SlurmOptions(partition="low", time="1", signal_s=45)
    job = submit_and_wait(tiny_recipe(), options, tmp_path / "a folder", stand_in)
    slurm.start_now(job.job_id)
    slurm.wait_for(job.job_id, "COMPLETED")
    assert starts(job) == ["0", "1"]


def test_a_cancelled_job_stays_cancelled(
    slurm: Slurm, tiny_recipe: MakeRecipe, tmp_path: Path, stand_in: Path
) -> None:
    options = SlurmOptions(partition="low")
    job = submit_and_wait(tiny_recipe(), options, tmp_path / "job", stand_in)
    slurm.run("scancel", job.job_id)
    slurm.cancel_all()
    assert slurm.state(job.job_id) == "CANCELLED"
    assert starts(job) == ["0"]


def test_ranks_on_two_nodes_meet(slurm: Slurm, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    package = tmp_path / "who" / "strata"
    shutil.copytree(Path(strata.__file__).parent, package)
    (package / "__main__.py").write_text(WHO_AM_I)
    options = SlurmOptions(partition="low", nodes=2, processes_per_node=2, cpus_per_task=1)
    job = submit_job(tiny_recipe(), options, folder=tmp_path / "job", package=package)
    slurm.wait_for(job.job_id, "COMPLETED", for_s=180)
    logs = job.folder / "logs"
    shown = [log.read_text().split() for log in sorted(logs.glob("node?_*.log"))]
    first = [int(words[0]) for words in shown]
    assert sorted(first) == [0, 2]
    assert shown == [
        [str(rank), "0", "4", node] for rank, node in zip(first, ("n1", "n2"), strict=True)
    ]
    every = [log.read_text().split() for log in logs.glob("ranks/*/*/*/attempt_0/*/stdout.log")]
    assert sorted(int(words[0]) for words in every) == [0, 1, 2, 3]


def test_a_partition_that_is_not_there(
    slurm: Slurm, run: Run, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*")}
    code, out, err = run("launch", "slurm", tiny_recipe_file, "--partition", "huge")
    assert (code, out) == (2, "")
    assert err == (
        "strata: error: --partition huge: this cluster has high, low, patient; give one of them\n"
    )
    assert {path for path in tmp_path.rglob("*")} == before


def test_what_slurm_refuses_is_one_line(
    slurm: Slurm, run: Run, tiny_recipe_file: Path, tmp_path: Path
) -> None:
    before = {path for path in tmp_path.rglob("*")}
    code, _, err = run(
        "launch", "slurm", tiny_recipe_file, "run.device=auto", "--partition", "low",
        "--gpus-per-node", 2,
    )  # fmt: skip
    assert code == 1
    assert err.startswith("strata: error: sbatch refused: ") and err.count("\n") == 1
    assert {path for path in tmp_path.rglob("*")} == before
