"""Several processes by torchrun: what is started, what is shown, what is passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed.run
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from strata.errors import LaunchError
from strata.launch.ranks import Ended, Meeting, run_ranks, torchrun_arguments
from strata.train import read_metrics

# A rank without strata, which starts at once.
START = "import os, signal, sys, time; rank = int(os.environ['RANK'])\n"
STANDS_STILL = "time.sleep(60)\n"


def ranks(program: str, tmp_path: Path, *, processes: int = 2) -> Ended:
    command = [sys.executable, "-c", START + program]
    return run_ranks(command, processes=processes, logs=tmp_path / "logs")


def test_the_command_line_of_one_machine(tmp_path: Path) -> None:
    assert torchrun_arguments(["train", "r.yaml"], processes=3, logs=tmp_path) == [
        "--standalone",
        "--nnodes=1",
        "--nproc-per-node=3",
        "--max-restarts=0",
        "--role=",
        f"--log-dir={tmp_path}",
        "--tee=3",
        "--local-ranks-filter=0",
        "--no-python",
        "train",
        "r.yaml",
    ]


def test_the_command_line_of_several_machines(tmp_path: Path) -> None:
    meeting = Meeting(nodes=2, endpoint="10.0.0.7:23456", run_id="123456")
    arguments = torchrun_arguments(["x"], processes=4, logs=tmp_path, meeting=meeting)
    assert arguments[:5] == [
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=10.0.0.7:23456",
        "--rdzv-id=123456",
        "--nproc-per-node=4",
    ]


def test_the_first_rank_is_shown_and_all_are_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "print(rank, os.environ['WORLD_SIZE'], os.environ['OMP_NUM_THREADS'])"
    assert ranks(program, tmp_path, processes=3) == Ended(0)
    threads = os.environ["OMP_NUM_THREADS"]
    captured = capfd.readouterr()
    assert captured.out == f"0 3 {threads}\n" and captured.err == ""
    logs = sorted((tmp_path / "logs").glob("*/*/attempt_0/*/stdout.log"))
    assert [log.read_text() for log in logs] == [f"{rank} 3 {threads}\n" for rank in range(3)]


def test_the_rank_that_failed_is_named_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = (
        "if rank == 1:\n"
        "    print('a warning', file=sys.stderr)\n"
        "    print('strata: error: no room', file=sys.stderr)\n"
        "    sys.exit(3)\n"
    )
    ended = ranks(program + STANDS_STILL, tmp_path)
    assert ended.status == 3
    (log,) = (tmp_path / "logs").glob("*/*/attempt_0/1/stderr.log")
    assert ended.line == f"rank 1 failed: no room; its log is {log}"
    assert capfd.readouterr().err == ""


def test_what_all_ranks_say_is_shown_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "print('strata: error: refused', file=sys.stderr); time.sleep(0.5); sys.exit(2)\n"
    assert ranks(program, tmp_path, processes=3) == Ended(2)
    assert capfd.readouterr().err == "strata: error: refused\n"


def test_a_rank_that_was_killed(tmp_path: Path) -> None:
    ended = ranks("if rank == 1: os.kill(os.getpid(), 9)\n" + STANDS_STILL, tmp_path)
    assert ended.status == 137
    assert ended.line is not None and ended.line.startswith("rank 1 was ended by SIGKILL; ")


def test_a_traceback_is_followed_by_its_rank(tmp_path: Path) -> None:
    ended = ranks("if rank == 0: raise KeyError('x')\n" + STANDS_STILL, tmp_path)
    assert ended.status == 1
    assert ended.line is not None and ended.line.startswith("rank 0 failed: KeyError: 'x'; its log")


SAVES = """
def save(*_):
    open(f"{os.environ['SAVED']}/{rank}", "w").close()
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, save)
open(f"{os.environ['SAVED']}/ready{rank}", "w").close()
while rank == 0 and not os.path.exists(f"{os.environ['SAVED']}/ready1"): time.sleep(0.01)
if rank == 0: os.kill(os.getppid(), signal.SIG)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_reaches_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, status: int
) -> None:
    monkeypatch.setenv("SAVED", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    program = SAVES.replace("signal.SIG)", f"signal.{name})") + STANDS_STILL
    assert ranks(program, tmp_path) == Ended(status)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_stopped_is_passed_on(tmp_path: Path) -> None:
    assert ranks("sys.exit(75)\n", tmp_path) == Ended(75)


def test_machines_that_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: object) -> None:
        raise RendezvousConnectionError("the connection\nhas failed")

    monkeypatch.setattr(torch.distributed.run, "run", fails)
    with pytest.raises(LaunchError) as caught:
        run_ranks(["x"], processes=2, logs=tmp_path, meeting=Meeting(2, "far:29500", "one"))
    assert str(caught.value).startswith(
        "the processes did not find each other at far:29500 (the connection has failed): "
    )


def launched(recipe: Path, *options: str) -> subprocess.Popen[str]:
    """`strata launch local` of two processes."""
    command = [sys.executable, "-m", "strata", "launch", "local", str(recipe), "run.threads=1"]
    return subprocess.Popen(
        [*command, *options, "--processes", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def process_of(rank: int, run_dir: Path) -> int:
    """The training process of that rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue  # has ended, or is another user's
        if f"RANK={rank}".encode() in environment and str(run_dir.parent).encode() in command:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.distributed
def test_two_processes_train_and_wrong_input_is_told_once(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    said, errors = launched(tiny_recipe_file, "data.batch_size=3").communicate(timeout=300)
    assert said == "" and errors.count("\n") == 1
    assert "data.batch_size 3 cannot be split over 2 processes" in errors
    run = launched(tiny_recipe_file)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == list(range(1, 13))
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


@pytest.mark.distributed
def test_a_killed_rank_ends_the_job_with_one_line(tiny_recipe_file: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = launched(tiny_recipe_file, "run.steps=3000", "run.checkpoint_every=50")
    until_s = time.monotonic() + 200
    while not list((run_dir / "checkpoints").glob("step_*")):
        assert time.monotonic() < until_s and run.poll() is None
        time.sleep(0.05)
    os.kill(process_of(1, tiny_recipe_file), signal.SIGKILL)
    _, errors = run.communicate(timeout=300)
    lines = [line for line in errors.splitlines() if not line.startswith("step ")]
    assert run.returncode == 128 + signal.SIGKILL
    assert len(lines) == 1 and "rank 1 was ended by SIGKILL" in lines[0], errors
