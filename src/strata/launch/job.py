"""One Slurm job of a run, from the recipe to its id.

JOB/code/strata/   the package as it was, so that later edits change nothing of a queued job
JOB/recipe.yaml    the recipe with its overrides
JOB/job.sh         what was submitted
JOB/logs/          job.log of the script, node0_NAME.log of each node, ranks/ of each process
RUN/job.json       which job was submitted last for this run, see `read_job`
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import strata
from strata.config import dump_yaml, load_config
from strata.errors import ConfigError
from strata.files import replace_text
from strata.launch.script import SlurmOptions, job_script, sbatch_options
from strata.launch.slurm import job_state, require_partition, require_slurm, submit
from strata.models import build
from strata.train import Recipe
from strata.train.checkpoint import CheckpointFolder, storage_errors
from strata.train.feed import Feed
from strata.train.recipe import RECIPE_NAME, require_same_run
from strata.train.run import is_held

JOB_NAME = "job.json"
PACKAGE = Path(strata.__file__).parent


@dataclass(frozen=True)
class SubmittedJob:
    """A job that Slurm has taken.

    Attributes:
        job_id: Slurm's number.
        folder: the job folder, absolute.
    """

    job_id: int
    folder: Path


def check_run(recipe: Recipe, *, gpus: int) -> None:
    """Find before a job waits in a queue what would end it at once.

    Args:
        recipe: the run.
        gpus: on each node.

    Raises:
        ConfigError, ModelError, DataError: the model, the data or the run folder do not fit it.
    """
    device = recipe.run.device
    if gpus and device == "cpu":
        raise ConfigError(f"run.device is cpu but --gpus-per-node is {gpus}: change one of the two")
    if not gpus and device.startswith("cuda"):
        raise ConfigError(f"run.device is {device} but --gpus-per-node is 0: change one of the two")
    # Kernels of attention may need a GPU, which a login node does not have; shapes do not.
    shapes = recipe.model.model_copy(update={"attn_implementation": None})
    Feed(recipe).check_model(build(shapes, recipe.memory, device="meta"))

    run_dir = recipe.run_dir
    if is_held(run_dir):
        raise ConfigError(
            f"a process is training in {run_dir}: wait for it or choose another run.dir"
        )
    stored = run_dir / RECIPE_NAME
    if CheckpointFolder(run_dir / "checkpoints").steps() and stored.exists():
        require_same_run(
            load_config(Recipe, stored),
            recipe,
            remedy="give back the old values, or choose another run.dir",
        )


def script_of(recipe: Recipe, options: SlurmOptions, *, folder: Path) -> str:
    """The script that `submit_job` would submit."""
    return job_script(
        options,
        name=recipe.name,
        folder=folder.absolute(),
        working_dir=Path.cwd(),
        run_dir=recipe.run_dir.absolute(),
        python=sys.executable,
    )


def new_job_folder(run_dir: Path) -> Path:
    """The first unused of RUN/jobs/001, 002, ..."""
    jobs = run_dir / "jobs"
    names = [entry.name for entry in jobs.iterdir()] if jobs.is_dir() else []
    numbers = [int(name) for name in names if re.fullmatch(r"\d{3,}", name)]
    return jobs / f"{max(numbers, default=0) + 1:03d}"


def submit_job(
    recipe: Recipe, options: SlurmOptions, *, folder: Path, package: Path | None = None
) -> SubmittedJob:
    """Write a job folder and submit its script; where that fails nothing is left of it.

    Args:
        recipe: the run, checked.
        options: what the job asks of the cluster.
        folder: the job folder, not there yet.
        package: the strata that the job runs; None is this one.

    Raises:
        ConfigError: there is no sbatch or no such partition, the folder exists, or an earlier job
            of this run has not ended.
        LaunchError: Slurm refuses the job or does not answer.
        StorageError: the folder cannot be written.
    """
    require_slurm()
    require_partition(options.partition)
    _require_no_job(recipe.run_dir)
    folder, run_dir = folder.absolute(), recipe.run_dir.absolute()
    if folder.exists():
        raise ConfigError(f"--out {folder} exists: name a folder that does not")
    made = _missing_folders(folder, run_dir)
    try:
        with storage_errors(f"writing {folder}", consequence="nothing was submitted"):
            _write(recipe, options, folder=folder, package=package or PACKAGE)
            run_dir.mkdir(parents=True, exist_ok=True)
        given = sbatch_options(options, name=recipe.name, folder=folder, working_dir=Path.cwd())
        job_id = submit(folder / "job.sh", given)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            _remove_if_empty(parent)
        raise
    job = SubmittedJob(job_id, folder)
    with storage_errors(f"writing {run_dir / JOB_NAME}", consequence=f"job {job_id} is submitted"):
        tree = {"job_id": job_id, "folder": str(folder)}
        replace_text(run_dir / JOB_NAME, json.dumps(tree) + "\n")
    return job


def read_job(run_dir: Path) -> SubmittedJob | None:
    """The job that was submitted last for a run; None if there was none.

    Raises:
        ConfigError: the file that says so is damaged.
    """
    path = run_dir / JOB_NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return SubmittedJob(int(tree["job_id"]), Path(tree["folder"]))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} does not name a job: delete it to go without") from None


def _require_no_job(run_dir: Path) -> None:
    """Two jobs would wait for one run folder, and the second fail."""
    job = read_job(run_dir)
    state = None if job is None else job_state(job.job_id)
    if job is not None and state is not None and (state.waits or state.runs):
        raise ConfigError(
            f"job {job.job_id} of the run in {run_dir} is {state.state}: wait for it, or "
            f"scancel {job.job_id} first"
        )


def _write(recipe: Recipe, options: SlurmOptions, *, folder: Path, package: Path) -> None:
    (folder / "logs").mkdir(parents=True)
    # With what Python and numba have compiled, which stays valid as long as files keep their times.
    shutil.copytree(package, folder / "code" / "strata")
    (folder / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    (folder / "job.sh").write_text(script_of(recipe, options, folder=folder), encoding="utf-8")


def _missing_folders(*folders: Path) -> list[Path]:
    """Which of these folders' parents, and themselves, are not there; innermost first."""
    missing = {path for folder in folders for path in (folder, *folder.parents)}
    return sorted(
        (path for path in missing if not path.exists()),
        key=lambda path: len(path.parts),
        reverse=True,
    )


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
