"""`strata launch`: a training run as a Slurm job, or in several processes of this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strata.cli.train import train
from strata.errors import ConfigError

if TYPE_CHECKING:
    from strata.launch.ranks import Meeting

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe, as for strata train")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="a.b=value, replaces a key of the recipe")
]


def slurm(
    recipe: RecipeFile,
    partition: Annotated[str, typer.Option(help="one, or several separated by commas")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    gpus_per_node: Annotated[
        int, typer.Option(help="a process each; 0 trains on CPUs, a process a node")
    ] = 0,
    processes_per_node: Annotated[
        int | None, typer.Option(help="several on a node without GPUs")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPUs for each process")] = None,
    mem: Annotated[str | None, typer.Option(help="memory of a node, as 64G")] = None,
    time: Annotated[
        str | None, typer.Option(help="limit, as 12:00:00; then the job is queued again")
    ] = None,
    account: Annotated[str | None, typer.Option(help="whom it is booked on")] = None,
    qos: Annotated[str | None, typer.Option(help="quality of service")] = None,
    signal: Annotated[
        int, typer.Option(help="seconds before the limit at which training saves and ends")
    ] = 120,
    out: Annotated[
        Path | None, typer.Option(help="the job folder, new; default: RUN/jobs/NNN")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the job's script; write and submit nothing")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Submit a training run as a Slurm job that goes on after preemption and its time limit.

    The job runs a copy of strata and of the recipe as they are now. strata status says how far it
    is; scancel ends it, and the same command goes on from the newest checkpoint.
    """
    from strata.config import load_config
    from strata.launch.job import check_run, new_job_folder, script_of, submit_job
    from strata.launch.script import SlurmOptions
    from strata.train import Recipe

    options = SlurmOptions(
        partition=partition,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        cpus_per_task=cpus_per_task,
        mem=mem,
        time=time,
        account=account,
        qos=qos,
        signal_s=signal,
    )
    resolved = load_config(Recipe, recipe, overrides or ())
    check_run(resolved, gpus=gpus_per_node)
    folder = out if out is not None else new_job_folder(resolved.run_dir)
    if dry_run:
        script = script_of(resolved, options, folder=folder)
        print(json.dumps({"script": script}) if as_json else script, end="\n" if as_json else "")
        return
    job = submit_job(resolved, options, folder=folder)
    if as_json:
        print(json.dumps(asdict(job), default=str))
    else:
        print(f"job {job.job_id} submitted, its folder is {job.folder}")
        print(f"see how far it is with strata status {resolved.run_dir}")


def local(
    recipe: RecipeFile,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(help="on this machine")] = 1,
    nodes: Annotated[int, typer.Option(help="machines on which this is started alike")] = 1,
    rendezvous: Annotated[
        str | None, typer.Option(help="HOST:PORT on one of them that all reach; with --nodes")
    ] = None,
    rendezvous_id: Annotated[
        str, typer.Option(help="the same on all of them, another for each run")
    ] = "strata",
    logs: Annotated[
        Path | None, typer.Option(help="folder for what each process writes; default: RUN/logs")
    ] = None,
) -> None:
    """Train by a recipe in several processes of this machine (torchrun), or in this one.

    Shown is what the first process writes. Exit codes are those of strata train: SIGTERM makes all
    processes save and exits with 75, the same command goes on.
    """
    from strata.config import load_config
    from strata.train import Recipe

    meeting = _meeting(processes, nodes, rendezvous, rendezvous_id)
    if processes * nodes == 1:
        train(recipe, overrides)
        return
    resolved = load_config(Recipe, recipe, overrides or ())

    from strata.launch.ranks import run_ranks

    ended = run_ranks(
        [sys.executable, "-u", "-m", "strata", "train", str(recipe), *(overrides or ())],
        processes=processes,
        logs=logs if logs is not None else resolved.run_dir / "logs",
        meeting=meeting,
    )
    if ended.line is not None:
        print(f"strata: error: {ended.line}", file=sys.stderr)
    if ended.status:
        raise typer.Exit(ended.status)


def _meeting(
    processes: int, nodes: int, rendezvous: str | None, rendezvous_id: str
) -> Meeting | None:
    for name, number in (("--processes", processes), ("--nodes", nodes)):
        if number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    if nodes == 1:
        if rendezvous is not None:
            raise ConfigError(f"--rendezvous {rendezvous} is for several machines: give --nodes")
        return None
    host, _, port = (rendezvous or "").rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        given = "no --rendezvous" if rendezvous is None else f"--rendezvous {rendezvous}"
        raise ConfigError(f"{given} with --nodes {nodes}: give HOST:PORT, the same on all of them")
    from strata.launch.ranks import Meeting

    return Meeting(nodes, f"{host}:{port}", rendezvous_id)
