"""A real Slurm on this machine alone: its daemons run from a temporary folder and end with it.

Three nodes of two CPUs each are processes (`slurmd -N`) of this machine. Jobs in the partition
`high` preempt those in `low`, which are then queued again; `patient` is as `low`, but lets a
preempted job live for some seconds.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "squeue", "scancel")
NUM_NODES = 3
SYSTEM_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"  # where daemons are, not on every PATH

SETTINGS = """\
ClusterName=strata
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=3
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
JobRequeue=1
KillWait=15
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=low Nodes=ALL PriorityTier=1 Default=YES
PartitionName=patient Nodes=ALL PriorityTier=1 GraceTime=12
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=off
"""


class Slurm:
    """The daemons, while the context is open."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm_", dir="/tmp"))  # sockets: short paths
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._up = False
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:{SYSTEM_FOLDERS}",
        }

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self._up:
                self.cancel_all()  # what starts a job's processes outlives slurmd
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            for daemon in reversed(self._daemons):
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, *command: object) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout.strip()

    def state(self, job_id: int) -> str:
        """Slurm's word for a job's state."""
        return self.run("squeue", "-h", "--states=all", "-j", job_id, "-o", "%T")

    def wait_for(self, job_id: int, state: str, *, for_s: float = 90) -> None:
        """Wait until a job is in that state."""
        wait_until(lambda: self.state(job_id) == state, for_s=for_s, what=f"job {job_id} {state}")

    def preempt(self) -> None:
        """Take all nodes for a moment with a job in the partition `high`."""
        command = [
            "sbatch",
            "--parsable",
            "--partition=high",
            f"--nodes={NUM_NODES}",
            "--exclusive",
        ]
        job_id = int(self.run(*command, "--output=/dev/null", "--wrap=sleep 1"))
        self.wait_for(job_id, "COMPLETED")

    def start_now(self, job_id: int) -> None:
        """Start a job that was queued again, which Slurm otherwise lets wait for two minutes."""
        self.wait_for(job_id, "PENDING")
        self.run("scontrol", "update", f"JobId={job_id}", "StartTime=now")

    def cancel_all(self) -> None:
        """End all jobs and wait until every node is free."""
        for job_id in self.run("squeue", "-h", "-o", "%i").split():
            self.run("scancel", job_id)
        wait_until(self._all_idle, for_s=60, what="the nodes to be idle")

    def _start(self) -> None:
        host = socket.gethostname().split(".")[0]
        controller_port, *ports = free_ports(1 + NUM_NODES)
        nodes = "\n".join(
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
            "CPUs=2 RealMemory=2000"
            for number, port in enumerate(ports, start=1)
        )
        settings = SETTINGS.format(
            host=host, controller_port=controller_port, folder=self.folder, nodes=nodes
        )
        (self.folder / "slurm.conf").write_text(settings)
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

        at = self.folder
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}",
            f"--socket={at / 'munge.socket'}", f"--pid-file={at / 'munged.pid'}",
            f"--seed-file={at / 'munge.seed'}", f"--log-file={at / 'munged.log'}",
        )  # fmt: skip
        wait_until(lambda: (at / "munge.socket").exists(), for_s=20, what="munged to start")
        self._daemon("slurmctld", "-D")
        for number in range(1, NUM_NODES + 1):
            (at / f"spool-n{number}").mkdir()
            self._daemon("slurmd", "-D", "-N", f"n{number}")
        wait_until(self._all_idle, for_s=60, what="the nodes to be idle")
        self._up = True

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdout=log, stderr=log, cwd=self.folder
                )
            )

    def _all_idle(self) -> bool:
        try:
            return (
                self.run("sinfo", "-h", "-N", "-o", "%T", "-p", "low").split()
                == ["idle"] * NUM_NODES
            )
        except subprocess.CalledProcessError:
            return False


def wait_until(holds: Callable[[], bool], *, for_s: float, what: str) -> None:
    """Ask five times a second until something holds.

    Raises:
        TimeoutError: it did not within so many seconds.
    """
    until_s = time.monotonic() + for_s
    while not holds():
        if time.monotonic() > until_s:
            raise TimeoutError(f"waited {for_s:.0f} s for {what}")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses just now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
