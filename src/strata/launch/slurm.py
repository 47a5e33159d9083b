"""Slurm's own commands: submit a script, ask for partitions and for the state of a job."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from strata.errors import ConfigError, LaunchError

_ANSWER_S = 60.0  # a controller that restarts is asked again by Slurm's commands for about so long
_WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "STOPPED"})
_ACTIVE = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING"})


@dataclass(frozen=True)
class JobState:
    """What Slurm says of a job.

    Attributes:
        state: Slurm's word, as PENDING or RUNNING; UNKNOWN if Slurm no longer knows the job.
        reason: why it waits or ended, or an empty string.
        nodes: where it runs, or an empty string.
    """

    state: str
    reason: str = ""
    nodes: str = ""

    @property
    def waits(self) -> bool:
        """Whether it will run without anybody's help."""
        return self.state in _WAITING

    @property
    def runs(self) -> bool:
        """Whether it has nodes."""
        return self.state in _ACTIVE


def require_slurm() -> None:
    """Check that jobs can be submitted from this machine.

    Raises:
        ConfigError: there is no sbatch.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on PATH: submit from a machine of a Slurm cluster, or train on this one "
            "with strata launch local"
        )


def require_partition(names: str) -> None:
    """Check that the cluster has a partition, or each of several separated by commas.

    Raises:
        ConfigError: it has not.
        LaunchError: Slurm does not answer.
    """
    known = _ask(["sinfo", "--noheader", "--format=%R"]).split()
    for name in names.split(","):
        if name not in known:
            allowed = ", ".join(sorted(set(known))) or "no partition"
            raise ConfigError(f"--partition {name}: this cluster has {allowed}; give one of them")


def submit(script: Path, options: Sequence[str]) -> int:
    """Submit a job script; the id of the job.

    Args:
        script: the file, whose text Slurm keeps.
        options: those of its `#SBATCH` lines; given once more, since variables such as
            SBATCH_PARTITION would overrule the lines, but not the options.

    Raises:
        LaunchError: Slurm refuses it or does not answer.
    """
    answer = _ask(["sbatch", "--parsable", *options, str(script)])
    job_id = answer.strip().split(";")[0]  # ID;CLUSTER where there are several clusters
    if not job_id.isdecimal():
        raise LaunchError(f"sbatch answered {answer.strip()!r} instead of the id of a job")
    return int(job_id)


def job_state(job_id: int) -> JobState | None:
    """What Slurm says of a job; None where Slurm is not installed or does not answer."""
    if shutil.which("squeue") is None:
        return None
    queue = ["squeue", "--noheader", "--states=all", f"--jobs={job_id}", "--format=%T|%r|%N"]
    try:
        answer = _ask(queue).strip()
    except LaunchError as error:
        if "nvalid job id" not in str(error):
            return None
        answer = ""  # ended some minutes ago: only accounting still knows it
    if answer:
        state, reason, nodes = answer.splitlines()[0].split("|")
        return JobState(state, "" if reason == "None" else reason, nodes)
    return _accounted(job_id)


def _accounted(job_id: int) -> JobState:
    """The same by accounting, which not every cluster has."""
    query = ["sacct", "--noheader", "-X", "-P", f"--jobs={job_id}", "--format=State,NodeList"]
    try:
        answer = _ask(query).strip()
    except LaunchError:
        answer = ""
    if not answer:
        return JobState("UNKNOWN")
    state, nodes = answer.splitlines()[-1].split("|")
    return JobState(state.split()[0], nodes=nodes)  # "CANCELLED by 1000"


def _ask(command: Sequence[str]) -> str:
    """What one of Slurm's commands prints; its complaints are one line."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, check=False
        )
    except FileNotFoundError:
        raise LaunchError(f"{command[0]} is not on PATH: is Slurm installed here?") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(
            f"{command[0]} did not answer within {_ANSWER_S:.0f} s: is the controller up (sinfo)?"
        ) from None
    if done.returncode != 0:
        said = " ".join(done.stderr.replace(f"{command[0]}: error:", "").split())
        raise LaunchError(f"{command[0]} refused: {said or f'exit status {done.returncode}'}")
    return done.stdout
