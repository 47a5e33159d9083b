"""What a job script does when training ends; commands that stand in for Slurm's are on PATH."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from pretend_slurm import PretendSlurm

from strata.launch.script import MAX_FRUITLESS, SlurmOptions, job_script, sbatch_options

AWKWARD = "job's 100%n folder"  # quotes, spaces, and what Slurm would fill in


def write_script(tmp_path: Path, **asked: int) -> Path:
    folder = tmp_path / AWKWARD
    folder.mkdir(exist_ok=True)
    script = job_script(
        SlurmOptions(partition="low", **asked),
        name="tiny",
        folder=folder,
        working_dir=tmp_path,
        run_dir=tmp_path / "run",
        python="/usr/bin/python3",
    )
    path = folder / "job.sh"
    path.write_text(script)
    return path


def execute(script: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "SLURM_JOB_ID": "123456", **environment},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("ends", "status", "requeued"),
    [
        ("exit 0", 0, False),
        ("exit 75", 75, True),  # told to stop: the time limit, or preemption that grants time
        ("exit 143", 143, True),  # told to while it still imported
        ("exit 2", 2, False),
        ("kill -TERM $PPID; exit 75", 75, False),  # all were told: Slurm's to decide
        ("kill -TERM $PPID; exit 0", 0, False),
    ],
)
def test_queued_again_only_where_slurm_does_not(
    tmp_path: Path, slurm: PretendSlurm, ends: str, status: int, requeued: bool
) -> None:
    slurm.answer("srun", ends)
    slurm.answer("scontrol", "exit 0")
    assert execute(write_script(tmp_path)).returncode == status
    assert slurm.calls("scontrol") == (["requeue 123456"] if requeued else [])


def test_not_queued_again_for_ever(tmp_path: Path, slurm: PretendSlurm) -> None:
    slurm.answer("srun", "exit 75")
    slurm.answer("scontrol", "exit 0")
    script = write_script(tmp_path)
    ended = [execute(script) for _ in range(MAX_FRUITLESS)]
    assert len(slurm.calls("scontrol")) == MAX_FRUITLESS - 1
    assert "3 starts without a new checkpoint: give more --time" in ended[-1].stderr


def test_a_new_checkpoint_begins_the_count_anew(tmp_path: Path, slurm: PretendSlurm) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    slurm.answer("scontrol", "exit 0")
    script = write_script(tmp_path)
    for step in range(2 * MAX_FRUITLESS):
        saves = f"mkdir '{checkpoints}/step_{step:08d}'; " if step % 2 else ""
        slurm.answer("srun", f"{saves}exit 75")
        execute(script)
    assert len(slurm.calls("scontrol")) == 2 * MAX_FRUITLESS


def test_a_cluster_that_does_not_requeue_is_told_of(tmp_path: Path, slurm: PretendSlurm) -> None:
    slurm.answer("srun", "exit 75")
    slurm.answer("scontrol", "exit 1")
    ended = execute(write_script(tmp_path))
    assert ended.returncode == 75
    assert ended.stderr == (
        "strata: error: the job cannot be queued again: submit it again, and it goes on\n"
    )


@pytest.mark.parametrize(
    ("asked", "cpus", "threads"),
    [({}, "6", "6"), ({"processes_per_node": 4}, "6", "1"), ({"processes_per_node": 9}, "6", "1")],
)
def test_what_training_finds_in_its_environment(
    tmp_path: Path, slurm: PretendSlurm, asked: dict[str, int], cpus: str, threads: str
) -> None:
    slurm.answer("srun", f"env > {tmp_path}/env")
    execute(write_script(tmp_path, **asked), SLURM_CPUS_ON_NODE=cpus, PYTHONPATH="/mine")
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines())
    assert found["OMP_NUM_THREADS"] == found["MKL_NUM_THREADS"] == threads
    assert found["PYTHONPATH"] == f"{tmp_path / AWKWARD / 'code'}:/mine"
    assert found["PYTHONSAFEPATH"] == "1"


def test_one_process_is_plain_training(tmp_path: Path, slurm: PretendSlurm) -> None:
    execute(write_script(tmp_path, cpus_per_task=3))
    slurm.answer("srun", "exit 0")
    execute(write_script(tmp_path, cpus_per_task=3))
    folder = tmp_path / AWKWARD
    escaped = str(folder).replace("%", "%%")
    assert slurm.calls("srun") == [
        "--nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=3 --cpu-bind=none --wait=300 "
        f"--open-mode=append --output={escaped}/logs/node%n_%N.log "
        f"/usr/bin/python3 -m strata train {folder}/recipe.yaml"
    ]


def test_several_nodes_meet_at_the_first(tmp_path: Path, slurm: PretendSlurm) -> None:
    slurm.answer("srun", "exit 0")
    slurm.answer(
        "scontrol",
        'case "$2" in hostnames) echo a7; echo a8;;'
        ' node) echo "NodeName=$3 NodeAddr=10.0.0.7 NodeHostName=$3";; esac',
    )
    execute(
        write_script(tmp_path, nodes=2, gpus_per_node=4, cpus_per_task=3),
        SLURM_JOB_NODELIST="a[7-8]",
    )
    assert slurm.calls("scontrol") == ["show hostnames a[7-8]", "show node a7"]
    (call,) = slurm.calls("srun")
    folder = tmp_path / AWKWARD
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=12 " in call
    assert call.endswith(
        f"-m strata launch local {folder}/recipe.yaml --processes 4 --nodes 2 --rendezvous "
        f"10.0.0.7:23456 --rendezvous-id 123456 --logs {folder}/logs/ranks"
    )


def test_what_is_asked_of_the_cluster(tmp_path: Path) -> None:
    options = SlurmOptions(
        partition="low,high",
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=3,
        mem="64G",
        time="1-12:00:00",
        account="lab",
        qos="normal",
        signal_s=90,
    )
    assert sbatch_options(options, name="tiny", folder=Path("/j%j"), working_dir=tmp_path) == [
        "--job-name=tiny",
        "--partition=low,high",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--cpus-per-task=3",
        "--gpus-per-node=4",
        "--mem=64G",
        "--time=1-12:00:00",
        "--account=lab",
        "--qos=normal",
        "--requeue",
        "--signal=TERM@90",
        "--open-mode=append",
        "--output=/j%%j/logs/job.log",
        f"--chdir={tmp_path}",
    ]
