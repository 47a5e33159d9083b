"""Several processes by torchrun: what is started, what is shown, what is passed on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from strata.errors import LaunchError
from strata.launch.ranks import Ended, Meeting, run_ranks, torchrun_arguments

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


@pytest.mark.distributed
def test_training_in_two_processes_is_refused_in_one_line(
    tiny_recipe_file: Path, tmp_path: Path
) -> None:
    """Until training can be distributed."""
    command = [sys.executable, "-m", "strata", "launch", "local", tiny_recipe_file]
    done = subprocess.run(
        [*command, "--processes", "2"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    assert "strata trains in one process, this is one of 2" in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
