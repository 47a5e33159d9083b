"""How far a run is, read from its folder, and from Slurm where a job was submitted for it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from strata.config import load_config
from strata.errors import ConfigError
from strata.launch.job import read_job
from strata.launch.slurm import JobState, job_state
from strata.reader.stages import read_stages
from strata.reader.train import STAGES_NAME
from strata.train import Recipe, read_metrics
from strata.train.checkpoint import CheckpointFolder
from strata.train.recipe import RECIPE_NAME
from strata.train.run import is_held

State = Literal["not begun", "queued", "running", "stopped", "finished"]
_RECENT = 20  # newest records that say how fast training is


@dataclass(frozen=True)
class RunStatus:
    """How far a run is.

    Attributes:
        run: its folder; of a reader that of the stage it is at.
        state: "running" if a process holds the folder or Slurm says that the job runs; "queued" if
            the job waits; "stopped" if the same command would go on.
        stage: of a reader, as "3/8"; else None.
        step: updates made, by the newest record or checkpoint.
        steps: updates in the whole run.
        loss: of the newest record, nats a token; None before the first.
        validation_loss: the newest one, or None.
        tokens_per_s: median over the newest records, or None.
        eta_s: seconds of training that are left at this speed, or None.
        checkpoint: step of the newest checkpoint, or None.
        held: whether a process holds the folder's lock.
        job_id: of the Slurm job that was submitted last, or None.
        job_folder: of that job, or None.
        job: what Slurm says of it; None where Slurm does not answer.
    """

    run: Path
    state: State
    stage: str | None
    step: int
    steps: int
    loss: float | None
    validation_loss: float | None
    tokens_per_s: float | None
    eta_s: float | None
    checkpoint: int | None
    held: bool
    job_id: int | None
    job_folder: Path | None
    job: JobState | None


def run_status(run_dir: Path) -> RunStatus:
    """Read how far a run is; changes nothing.

    Args:
        run_dir: a folder of `strata train`, `strata launch` or `strata reader train`.

    Raises:
        ConfigError: there is no run in that folder, or it cannot be read.
    """
    if not run_dir.is_dir():
        raise ConfigError(f"no run at {run_dir}: give the folder of strata train, runs/NAME mostly")
    if (run_dir / STAGES_NAME).is_file():
        return _reader_status(run_dir)
    return _status(run_dir)


def _reader_status(run_dir: Path) -> RunStatus:
    """That of the stage a reader is at. Between two stages, while it is asked, no lock is held."""
    stages = read_stages(run_dir / STAGES_NAME).stages.values()
    folders = sorted(path.parent for path in run_dir.glob(f"[0-9][0-9]-*/{RECIPE_NAME}"))
    if not folders:
        raise ConfigError(f"{run_dir} has not begun its first stage: ask again later")
    number, total = len(folders), sum(stage.steps > 0 for stage in stages)
    status = _status(folders[-1])
    between = status.state == "finished" and number < total
    return replace(
        status,
        state="stopped" if between else status.state,
        stage=f"{number}/{total}",
    )


def _status(run_dir: Path) -> RunStatus:
    submitted = read_job(run_dir)
    job = None if submitted is None else job_state(submitted.job_id)
    recipe = _recipe(run_dir, None if submitted is None else submitted.folder)
    records = read_metrics(run_dir)
    checkpoints = CheckpointFolder(run_dir / "checkpoints").steps()
    held = is_held(run_dir)

    newest = records[-1] if records else {}
    step = max(newest.get("step", 0), checkpoints[-1] if checkpoints else 0)  # saved, not logged
    rates = [record["tokens_per_s"] for record in records[-_RECENT:] if record.get("tokens_per_s")]
    rate = statistics.median(rates) if rates else None
    left_tokens = (recipe.run.steps - step) * recipe.tokens_per_step
    validation = (record.get("validation_loss") for record in reversed(records))
    return RunStatus(
        run=run_dir,
        state=_state(run_dir, held=held, job=job, begun=step > 0),
        stage=None,
        step=step,
        steps=recipe.run.steps,
        loss=newest.get("loss"),
        validation_loss=next((loss for loss in validation if loss is not None), None),
        tokens_per_s=rate,
        eta_s=None if rate is None else left_tokens / rate,
        checkpoint=checkpoints[-1] if checkpoints else None,
        held=held,
        job_id=None if submitted is None else submitted.job_id,
        job_folder=None if submitted is None else submitted.folder,
        job=job,
    )


def _state(run_dir: Path, *, held: bool, job: JobState | None, begun: bool) -> State:
    if held:
        return "running"
    if (run_dir / "model").is_dir():
        return "finished"
    if job is not None and job.runs:
        return "running"  # on another machine, whose locks this one does not see
    if job is not None and job.waits:
        return "queued"
    return "stopped" if begun else "not begun"


def _recipe(run_dir: Path, job_folder: Path | None) -> Recipe:
    """The run's own recipe, or its job's while it has not begun."""
    for path in (run_dir, job_folder):
        if path is not None and (path / RECIPE_NAME).is_file():
            return load_config(Recipe, path / RECIPE_NAME)
    raise ConfigError(
        f"{run_dir} holds no {RECIPE_NAME}: give a folder of strata train or strata reader train"
    )
