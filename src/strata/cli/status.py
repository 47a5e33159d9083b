"""`strata status RUN`: how far a run is, here or on a cluster."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from strata.launch.status import RunStatus


def status(
    run: Annotated[Path, typer.Argument(help="the folder of strata train, launch or reader train")],
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Say how far a run is, whether it is running, and what Slurm says of its job."""
    from strata.launch.status import run_status

    found = run_status(run)
    if as_json:
        print(json.dumps(asdict(found), default=str))
    else:
        print("\n".join(_lines(found)))


def _lines(found: RunStatus) -> list[str]:
    from strata.train.metrics import duration

    stage = f"stage {found.stage}, " if found.stage else ""
    lines = [f"{found.run}: {found.state}, {stage}step {found.step:,} of {found.steps:,}"]
    numbers = []
    if found.loss is not None:
        numbers.append(f"loss {found.loss:.4f}")
    if found.validation_loss is not None:
        numbers.append(f"validation {found.validation_loss:.4f}")
    if found.tokens_per_s is not None:
        numbers.append(f"{found.tokens_per_s:,.0f} tokens/s")
    if found.eta_s is not None and found.step < found.steps:
        numbers.append(f"{duration(found.eta_s)} left at that speed")
    if numbers:
        lines.append(f"  {', '.join(numbers)}")
    at = "none yet" if found.checkpoint is None else f"step {found.checkpoint:,}"
    lines.append(f"  newest checkpoint: {at}")
    if found.job_id is not None:
        lines.append(f"  Slurm job {found.job_id}: {_job(found)}; its folder is {found.job_folder}")
    return lines


def _job(found: RunStatus) -> str:
    if found.job is None:
        return "Slurm does not answer here"
    nodes = f" on {found.job.nodes}" if found.job.nodes else ""
    reason = f" ({found.job.reason})" if found.job.reason else ""
    return f"{found.job.state}{nodes}{reason}"
