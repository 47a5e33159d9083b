"""`strata launch`: a training run in several processes of this machine."""

from __future__ import annotations

import sys
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
