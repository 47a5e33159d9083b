"""Several processes of one run on this machine, started and watched by torchrun.

torchrun runs within this process, so that its exceptions say which rank failed, and how. What the
ranks write goes to files; the first one's is shown as well.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

from strata.errors import GO_ON, LaunchError
from strata.train.checkpoint import storage_errors

_SAVE_S = 120  # what ranks may take to save after a signal, before torchrun kills them
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True)
class Meeting:
    """How the nodes of one run find each other.

    Attributes:
        nodes: how many there are.
        endpoint: HOST:PORT that all of them reach, on one of them.
        run_id: the same on all of them, another for each run.
    """

    nodes: int
    endpoint: str
    run_id: str


@dataclass(frozen=True)
class Ended:
    """How the ranks of this machine ended.

    Attributes:
        status: an exit status: 0, that of the rank that failed first, or 128 + its signal.
        line: what failed, where nobody has said it yet.
    """

    status: int
    line: str | None = None


def torchrun_arguments(
    command: Sequence[str], *, processes: int, logs: Path, meeting: Meeting | None = None
) -> list[str]:
    """What torchrun is given to start `command` as several ranks.

    Args:
        command: the program and its arguments.
        processes: ranks on this machine.
        logs: a folder for what they write.
        meeting: of several machines; None is this one alone, on a free port.
    """
    if meeting is None:
        where = ["--standalone", "--nnodes=1"]
    else:
        where = [
            f"--nnodes={meeting.nodes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={meeting.endpoint}",
            f"--rdzv-id={meeting.run_id}",
        ]
    return [
        *where,
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        "--role=",  # stands in front of each line that is shown
        f"--log-dir={logs}",
        "--tee=3",
        "--local-ranks-filter=0",
        "--no-python",
        *command,
    ]


def run_ranks(
    command: Sequence[str], *, processes: int, logs: Path, meeting: Meeting | None = None
) -> Ended:
    """Run `command` as several ranks until all have ended, or one has failed.

    SIGTERM and SIGINT are passed on once; the ranks then have two minutes to save.

    Args:
        command: the program and its arguments.
        processes: ranks on this machine.
        logs: a folder for what they write; each call makes one of its own within.
        meeting: of several machines; None is this one alone.

    Raises:
        LaunchError: the machines do not find each other.
        StorageError: `logs` cannot be written.
    """
    from torch.distributed.run import parse_args, run

    if meeting is not None:
        logs = logs / os.environ.get("SLURMD_NODENAME", socket.gethostname())
    with storage_errors(f"writing {logs}", consequence="nothing was started"):
        logs.mkdir(parents=True, exist_ok=True)
        logs = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=logs))
    arguments = torchrun_arguments(command, processes=processes, logs=logs, meeting=meeting)
    with _quiet_torchrun(), _environment(processes):
        try:
            run(parse_args(arguments))
        except ChildFailedError as error:
            return _failed(error.failures, logs)
        except SignalException as caught:
            stopped = caught.sigval == signal.SIGTERM
            return Ended(GO_ON if stopped else 128 + caught.sigval)
        except RendezvousError as error:
            at = "this machine" if meeting is None else meeting.endpoint
            said = " ".join(str(error).split())
            raise LaunchError(
                f"the processes did not find each other at {at} ({said}): is that address reached "
                "from every node, and its port free?"
            ) from None
    return Ended(0)


def _failed(failures: Mapping[int, ProcessFailure], logs: Path) -> Ended:
    """The failure that came first; torchrun then ended the others by SIGTERM, the same second."""

    def order(rank: int) -> tuple[bool, float, int]:
        failure = failures[rank]
        return failure.exitcode == -signal.SIGTERM, failure.timestamp, rank

    rank = min(failures, key=order)
    failure = failures[rank]
    if failure.exitcode in (GO_ON, 128 + signal.SIGINT):
        return Ended(failure.exitcode)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        log = _log(logs, failure.local_rank)
        return Ended(128 - failure.exitcode, f"rank {rank} was ended by {name}; its log is {log}")
    log = _log(logs, failure.local_rank)
    said = _last_line(log)
    shown = failure.local_rank == 0 or (said and said == _last_line(_log(logs, 0)))
    if shown and said.startswith("strata: error: "):
        return Ended(failure.exitcode)
    reason = said.removeprefix("strata: error: ") or f"exit status {failure.exitcode}"
    return Ended(failure.exitcode, f"rank {rank} failed: {reason}; its log is {log}")


def _log(logs: Path, local_rank: int) -> Path:
    """What a rank wrote to stderr; torchrun makes folders of its own within ours."""
    found = sorted(logs.glob(f"*/attempt_*/{local_rank}/stderr.log"))
    return found[-1] if found else logs


def _last_line(log: Path) -> str:
    """The last line of a log that is not blank, or an empty string."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _quiet_torchrun() -> Iterator[None]:
    """Keep torchrun from logging, and give back the signal handlers that it replaces."""
    disabled = logging.root.manager.disable
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def _environment(processes: int) -> Iterator[None]:
    """What torchrun and the ranks take from the environment, where the user has not said it."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    cpus = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    threads = str(max(1, cpus // processes))
    wanted = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(_SAVE_S),
        "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "${role_name}",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
