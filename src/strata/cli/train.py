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
    from strata.models import Counts
    from strata.train import Recipe, TrainResult


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/dense_373m.yaml")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="a.b=value, replaces a key of the recipe")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only count parameters and FLOPs; allocates nothing")
    ] = False,
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
    if dry_run:
        _dry_run(resolved, as_json=as_json)
    else:
        _train(resolved, fresh=fresh, as_json=as_json)


def _dry_run(recipe: Recipe, *, as_json: bool) -> None:
    from strata.models import build, count

    model = build(recipe.model, recipe.memory, device="meta")
    counts = count(model, sequence_tokens=recipe.data.sequence_tokens)
    if as_json:
        print(json.dumps(asdict(counts)))
    else:
        _print_table(recipe, counts)


def _print_table(recipe: Recipe, counts: Counts) -> None:
    from rich.console import Console
    from rich.table import Table

    run = recipe.run
    table = Table(title=recipe.name, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("parameters", f"{counts.params_total:,}")
    table.add_row("  dense", f"{counts.params_dense:,}")
    table.add_row("  in value tables", f"{counts.params_values:,}")
    table.add_row("  active for one token", f"{counts.params_active:,}")
    table.add_row("forward FLOPs a token", f"{counts.flops_per_token:,}")
    table.add_section()
    table.add_row("steps", f"{run.steps:,}")
    table.add_row("tokens a step", f"{recipe.tokens_per_step:,}")
    table.add_row("tokens", f"{run.steps * recipe.tokens_per_step:,}")
    table.add_row("run folder", str(recipe.run_dir))
    Console().print(table)


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
