"""`strata train RECIPE --dry-run`: what a run would be, hold and send."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from strata.models import Counts
    from strata.train import Recipe
    from strata.train.footprint import Footprint


def count_run(recipe: Recipe, *, processes: int, memory_group: int | None, as_json: bool) -> None:
    """Print what a run would be, without allocating any of it.

    Args:
        recipe: the run.
        processes: that would share it.
        memory_group: of the processes, instead of the recipe's.
        as_json: print it for programs.
    """
    from strata.models import build, count
    from strata.train.footprint import footprint
    from strata.train.shares import shares_of

    shares = shares_of(recipe, processes=processes, memory_group=memory_group)
    model = build(recipe.model, recipe.memory, device="meta")
    counts = count(model, sequence_tokens=recipe.data.sequence_tokens)
    found = footprint(model, recipe, shares)
    if as_json:
        print(json.dumps({**asdict(counts), **found.as_dict()}))
    else:
        _print(recipe, counts, found)


def _print(recipe: Recipe, counts: Counts, found: Footprint) -> None:
    from rich.console import Console

    console = Console()
    console.print(_sizes(recipe, counts))
    console.print(_held(recipe, found))
    if found.shares.processes > 1:
        console.print(_sent(found))
        if found.shares.rows_read is None and recipe.memory is not None:
            console.print("Distinct rows are estimated: as many as even picks would read.")


def _sizes(recipe: Recipe, counts: Counts) -> Table:
    run, table = recipe.run, _table(recipe.name, "")
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
    return table


def _held(recipe: Recipe, found: Footprint) -> Table:
    shares = found.shares
    who = "the process" if shares.processes == 1 else f"each of {shares.processes:,} processes"
    table = _table(f"bytes that {who} holds", "")
    if shares.processes > 1:
        table.add_row("dense part", shares.dense)
        if recipe.memory is not None:
            table.add_row("memory group", f"{shares.memory_group:,}")
            table.add_row("replicas of the tables", f"{shares.replicas:,}")
    table.add_row("tokens of a micro-batch", f"{shares.tokens:,}")
    for when, title in (("always", "always"), ("passes", "forward, backward"), ("rows", "rows")):
        table.add_section()
        for part in found.held:
            if part.when == when:
                table.add_row(f"{part.kind} ({title})", amount(part.num_bytes))
    table.add_section()
    table.add_row("most at once", amount(found.peak_bytes))
    if found.copied_bytes:
        table.add_row("copy of a checkpoint, in CPU memory", amount(found.copied_bytes))
    return table


def _sent(found: Footprint) -> Table:
    table = _table("bytes that a process sends in a step", "rings (NCCL)", "gloo")
    rings, gloo = found.sent["rings"], found.sent["gloo"]
    for kind, num_bytes in rings.items():
        table.add_row(kind, amount(num_bytes), amount(gloo[kind]))
    table.add_section()
    table.add_row("together", amount(sum(rings.values())), amount(sum(gloo.values())))
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, show_header=any(columns))
    table.add_column()
    for column in columns:
        table.add_column(column, justify="right")
    return table


def amount(num_bytes: float) -> str:
    """Bytes in the unit that suits them, in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.2f} {unit}"
