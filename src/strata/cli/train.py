"""`strata train RECIPE [a.b=c ...]`: pretrain a model, or go on where the run folder stands."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strata.cli.allocator import keep_freed_memory
from strata.errors import GO_ON

if TYPE_CHECKING:
    from strata.train import Recipe, TrainResult


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/dense_373m.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=value, replaces a key of the recipe")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="only count parameters, FLOPs and bytes; allocates nothing"),
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="with --dry-run: processes that share the run")
    ] = None,
    memory_group: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="with --dry-run: processes that share a copy of the value tables; "
            "else the recipe's, or those of a machine of eight",
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="delete the run's checkpoints and start over")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print the result as JSON; no progress")
    ] = False,
) -> None:
    """Train a model by a recipe.

    If the run folder has checkpoints, training goes on from the newest. SIGTERM finishes the
    step, saves and exits with 75; Ctrl-C does the same and exits with 130.
    """
    from strata.config import load_config
    from strata.train import Recipe

    resolved = load_config(Recipe, recipe, overrides or ())
    if not dry_run and (world_size or memory_group):
        _fail(
            "--world-size and --memory-group belong to --dry-run: torchrun or strata launch starts "
            "processes, and distributed.memory_group=G shares tables"
        )
    if dry_run:
        from strata.cli.dry_run import count_run

        count_run(resolved, processes=world_size or 1, memory_group=memory_group, as_json=as_json)
    else:
        _train(resolved, fresh=fresh, as_json=as_json)


def _train(recipe: Recipe, *, fresh: bool, as_json: bool) -> None:
    import torch

    from strata.train import train as run_training

    keep_freed_memory()
    try:
        result = run_training(recipe, fresh=fresh, progress=not as_json)
    except torch.OutOfMemoryError:
        _fail("the GPU's memory is full: lower data.batch_size and raise run.accumulate as much")
    if int(os.environ.get("RANK", "0")) == 0:  # of the processes of a run, one tells
        print(json.dumps(asdict(result), default=str) if as_json else _summary(result))
    if result.stopped_by is not None:
        raise typer.Exit(130 if result.stopped_by == "SIGINT" else GO_ON)


def _summary(result: TrainResult) -> str:
    from strata.train.metrics import duration

    parts = [f"{result.steps} steps"]
    if result.loss is not None:
        parts.append(f"loss {result.loss:.4f}")
    if result.validation_loss is not None:
        parts.append(f"validation {result.validation_loss:.4f}")
    if result.tokens_per_s is not None:
        parts.append(f"{result.tokens_per_s:,.0f} tokens/s")
    parts.append(duration(result.wall_s))
    parts.append(f"model in {result.model_dir}" if result.model_dir else "not finished")
    return ", ".join(parts)


def _fail(message: str) -> None:
    print(f"strata: error: {message}", file=sys.stderr)
    raise typer.Exit(1)
