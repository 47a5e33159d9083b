"""`strata sft RECIPE [a.b=c ...]`, `strata dpo RECIPE [a.b=c ...]`: fine-tune a trained model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strata.cli.allocator import keep_freed_memory

if TYPE_CHECKING:
    from strata.train.tune import TuneResult

RecipeFile = Annotated[Path, typer.Argument(help="YAML recipe, e.g. recipes/sft_laptop.yaml")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="a.b=value, replaces a key of the recipe")
]
BankFolder = Annotated[
    Path | None,
    typer.Option("--bank", help="find the references of rows that name none here (reading.bank)"),
]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="delete the run's checkpoints and model, and start over")
]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON; no progress")]


def sft(
    recipe: RecipeFile,
    overrides: Overrides = None,
    bank: BankFolder = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune a model on prompts and completions, with references if the rows have some.

    If the run folder has checkpoints, training goes on from the newest. Afterwards a bank of the
    old model is refused: make a new one of the same documents.
    """
    from strata.config import load_config
    from strata.train.tune import SFTRecipe
    from strata.train.tune import sft as run

    resolved = load_config(SFTRecipe, recipe, _with_bank(overrides, bank))
    keep_freed_memory()
    _report(run(resolved, fresh=fresh, progress=not as_json), as_json=as_json)


def dpo(
    recipe: RecipeFile,
    overrides: Overrides = None,
    bank: BankFolder = None,
    fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:
    """Train a model to prefer chosen answers to rejected ones, with the same references.

    If the run folder has checkpoints, training goes on from the newest. Afterwards a bank of the
    old model is refused: make a new one of the same documents.
    """
    from strata.config import load_config
    from strata.train.tune import DPORecipe
    from strata.train.tune import dpo as run

    resolved = load_config(DPORecipe, recipe, _with_bank(overrides, bank))
    keep_freed_memory()
    _report(run(resolved, fresh=fresh, progress=not as_json), as_json=as_json)


def _with_bank(overrides: list[str] | None, bank: Path | None) -> list[str]:
    given = list(overrides or ())
    return given if bank is None else [*given, f"reading.bank={json.dumps(str(bank))}"]


def _report(result: TuneResult, *, as_json: bool) -> None:
    print(json.dumps(asdict(result), default=str) if as_json else _summary(result))
    if result.stopped_by == "SIGINT":
        raise typer.Exit(130)


def _summary(result: TuneResult) -> str:
    from strata.train.metrics import duration

    parts = [f"{result.steps} steps on {result.rows:,} rows"]
    before, after = result.before or {}, result.after or {}
    for name, shown in (
        ("loss", "held-out loss"),
        ("rewards/margins", "margin"),
        ("rewards/accuracies", "preferred"),
    ):
        if name in before and name in after:
            parts.append(f"{shown} {before[name]:.4f} -> {after[name]:.4f}")
    parts.append(duration(result.wall_s))
    parts.append(f"model in {result.model_dir}" if result.model_dir else "not finished")
    return ", ".join(parts)
