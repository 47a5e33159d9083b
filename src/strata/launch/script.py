"""The text of a Slurm job: what it asks of the cluster, what it runs, when it is queued again.

How signals arrive decides its form (seen on Slurm 22.05). Before the time limit (`--signal`) and
where preemption grants time (GraceTime), SIGTERM goes to what `srun` started and not to the script:
training saves and ends with 75, and the script asks for the job to be queued again. Where Slurm
ends a job at once (preemption without GraceTime, scancel), everything gets SIGTERM, the script too:
training saves within the cluster's KillWait, and whether the job is queued again is Slurm's to say,
or a cancelled job would come back.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from strata.errors import GO_ON, ConfigError

MAX_FRUITLESS = 3  # starts in a row that bring no new checkpoint
_NODES_END_WITHIN_S = 300  # of each other; what waits longer waits for a node that has failed
_TERMINATED = 128 + 15  # by SIGTERM, while Python still imported and could not save


@dataclass(frozen=True)
class SlurmOptions:
    """What a job asks of the cluster.

    Attributes:
        partition: one, or several separated by commas.
        nodes: how many.
        gpus_per_node: with GPUs each has one process; 0 trains on CPUs.
        processes_per_node: None is one for each GPU, or one without GPUs.
        cpus_per_task: CPUs for each process; None leaves it to the cluster.
        mem: memory of a node, as Slurm writes it; None leaves it to the cluster.
        time: limit, as Slurm writes it; None is the partition's.
        account, qos: as Slurm knows them; None is the user's default.
        signal_s: seconds before the time limit at which training is told to save and end.

    Raises:
        ConfigError: a number or a word is not allowed.
    """

    partition: str
    nodes: int = 1
    gpus_per_node: int = 0
    processes_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | None = None
    time: str | None = None
    account: str | None = None
    qos: str | None = None
    signal_s: int = 120

    def __post_init__(self) -> None:
        for name, number, least in (
            ("nodes", self.nodes, 1),
            ("gpus-per-node", self.gpus_per_node, 0),
            ("processes-per-node", self.processes_per_node, 1),
            ("cpus-per-task", self.cpus_per_task, 1),
            ("signal", self.signal_s, 1),
        ):
            if number is not None and number < least:
                raise ConfigError(f"--{name} {number}: give {least} or more")
        for name in ("partition", "mem", "time", "account", "qos"):
            word = getattr(self, name)
            if word is not None and not re.fullmatch(r"[\w.,:+/@-]+", word):
                raise ConfigError(f"--{name} {word!r}: give one word, as Slurm writes it")
        if self.gpus_per_node and self.processes_per_node not in (None, self.gpus_per_node):
            raise ConfigError(
                f"--processes-per-node {self.processes_per_node} with --gpus-per-node "
                f"{self.gpus_per_node}: each GPU has one process; leave the first out"
            )

    @property
    def processes(self) -> int:
        """Training processes on each node."""
        return self.processes_per_node or max(1, self.gpus_per_node)


def sbatch_options(
    options: SlurmOptions, *, name: str, folder: Path, working_dir: Path
) -> list[str]:
    """What sbatch is given, in the script and beside it.

    Args:
        options: what the job asks for.
        name: the job's, in the queue.
        folder: the job folder, absolute.
        working_dir: where the recipe's relative paths start, absolute.
    """
    asked = {
        "partition": options.partition,
        "nodes": options.nodes,
        "ntasks-per-node": options.processes,
        "cpus-per-task": options.cpus_per_task,
        "gpus-per-node": options.gpus_per_node or None,
        "mem": options.mem,
        "time": options.time,
        "account": options.account,
        "qos": options.qos,
    }
    return [
        f"--job-name={name}",
        *(f"--{key}={value}" for key, value in asked.items() if value is not None),
        "--requeue",
        f"--signal=TERM@{options.signal_s}",
        "--open-mode=append",
        f"--output={_no_pattern(folder)}/logs/job.log",
        f"--chdir={working_dir}",
    ]


def job_script(
    options: SlurmOptions,
    *,
    name: str,
    folder: Path,
    working_dir: Path,
    run_dir: Path,
    python: str,
) -> str:
    """The whole script.

    Args:
        options: what the job asks for.
        name: the job's, in the queue.
        folder: the job folder, absolute; it holds code/, recipe.yaml and logs/.
        working_dir: where the recipe's relative paths start, absolute.
        run_dir: the recipe's run folder, absolute.
        python: the interpreter, absolute, the same on all nodes.
    """
    given = sbatch_options(options, name=name, folder=folder, working_dir=working_dir)
    lines = "\n".join(f"#SBATCH {shlex.quote(option)}" for option in given)
    recipe = shlex.quote(str(folder / "recipe.yaml"))
    alone = options.nodes * options.processes == 1
    return _SCRIPT.format(
        lines=lines,
        code=shlex.quote(str(folder / "code")),
        processes=options.processes,
        rendezvous="" if options.nodes == 1 else _RENDEZVOUS,
        srun=_srun(options, folder),
        python=shlex.quote(python),
        verb=f"train {recipe}" if alone else _launch(options, recipe, folder),
        checkpoints=shlex.quote(str(run_dir / "checkpoints")),
        fruitless=shlex.quote(str(folder / "fruitless")),
        max_fruitless=MAX_FRUITLESS,
        go_on=GO_ON,
        terminated=_TERMINATED,
    )


def _srun(options: SlurmOptions, folder: Path) -> str:
    """One task a node, with all of the job's CPUs there and a log of its own."""
    cpus = options.cpus_per_task
    return " ".join(
        [
            f"srun --nodes={options.nodes} --ntasks={options.nodes} --ntasks-per-node=1",
            *([] if cpus is None else [f"--cpus-per-task={cpus * options.processes}"]),
            f"--cpu-bind=none --wait={_NODES_END_WITHIN_S} --open-mode=append",
            shlex.quote(f"--output={_no_pattern(folder)}/logs/node%n_%N.log"),
        ]
    )


def _launch(options: SlurmOptions, recipe: str, folder: Path) -> str:
    """The verb for several processes."""
    words = f"launch local {recipe} --processes {options.processes}"
    if options.nodes > 1:
        words += f' --nodes {options.nodes} --rendezvous "$rendezvous"'
        words += ' --rendezvous-id "$SLURM_JOB_ID"'
    return words + f" --logs {shlex.quote(str(folder / 'logs' / 'ranks'))}"


def _no_pattern(path: Path) -> str:
    """A path in which Slurm finds nothing to fill in."""
    return str(path).replace("%", "%%")


# A port below those that systems give to clients, the same for a job that is queued again.
_RENDEZVOUS = """
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
rendezvous=${address:-$first}:$((20000 + SLURM_JOB_ID % 10000))
"""

_SCRIPT = """\
#!/bin/bash
{lines}

# Written by strata launch slurm. SIGTERM to the training alone means: save, the job goes on later.
# SIGTERM to this script too: the job is cancelled, or preempted, and then Slurm queues it again.
terminated=
trap 'terminated=1' TERM

export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}
export PYTHONSAFEPATH=1  # a folder strata/ where training starts is not the one to run
export PYTHONUNBUFFERED=1
cpus=$(( ${{SLURM_CPUS_ON_NODE:-1}} / {processes} ))
export OMP_NUM_THREADS=$(( cpus > 0 ? cpus : 1 ))
export MKL_NUM_THREADS=$OMP_NUM_THREADS
{rendezvous}
newest() {{ ls {checkpoints} 2>/dev/null | tail -n 1; }}
before=$(newest)

{srun} \\
  {python} -m strata {verb}
status=$?

[ "$(newest)" = "$before" ] || rm -f {fruitless}
if [ -z "$terminated" ] && {{ [ $status -eq {go_on} ] || [ $status -eq {terminated} ]; }}; then
  [ "$(newest)" != "$before" ] || echo "$(date) $status" >> {fruitless}
  if [ -f {fruitless} ] && [ "$(wc -l < {fruitless})" -ge {max_fruitless} ]; then
    echo "strata: error: {max_fruitless} starts without a new checkpoint: give more --time" >&2
  elif ! scontrol requeue "$SLURM_JOB_ID"; then
    echo "strata: error: the job cannot be queued again: submit it again, and it goes on" >&2
  fi
fi
exit $status
"""
