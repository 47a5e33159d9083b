"""`strata status`: runs that have begun, stopped, gone on, ended, and those in a queue."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from pretend_slurm import PretendSlurm

from strata.config import dump_yaml
from strata.launch.status import run_status
from strata.reader.stages import read_stages
from strata.train import Recipe, StepEvent, train

Run = Callable[..., tuple[int, str, str]]


def stop_at(step: int) -> Callable[[StepEvent], None]:
    def on_step(event: StepEvent) -> None:
        if event.step == step:
            signal.raise_signal(signal.SIGTERM)

    return on_step


def test_a_run_from_stop_to_end(run: Run, tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("run.validate_every=3")
    seen = []

    def look(event: StepEvent) -> None:
        seen.append(run_status(recipe.run_dir))
        stop_at(6)(event)

    train(recipe, progress=False, on_step=look)
    assert [status.state for status in seen] == ["running"] * 6
    assert [status.step for status in seen] == [1, 2, 3, 4, 5, 6]
    assert [status.checkpoint for status in seen] == [None, None, None, 4, 4, 4]

    code, out, _ = run("status", recipe.run_dir, "--json")
    stopped = json.loads(out)
    assert code == 0
    assert (stopped["state"], stopped["step"], stopped["steps"]) == ("stopped", 6, 12)
    assert (stopped["checkpoint"], stopped["held"], stopped["job_id"]) == (6, False, None)
    left_tokens = 6 * recipe.tokens_per_step
    assert stopped["eta_s"] == pytest.approx(left_tokens / stopped["tokens_per_s"])
    code, out, _ = run("status", recipe.run_dir)
    first, second, third = out.splitlines()
    assert first == f"{recipe.run_dir}: stopped, step 6 of 12"
    assert second.startswith(f"  loss {stopped['loss']:.4f}, validation ")
    assert second.endswith("0:00:00 left at that speed")
    assert third == "  newest checkpoint: step 6"

    train(recipe, progress=False)
    ended = run_status(recipe.run_dir)
    assert (ended.state, ended.step, ended.checkpoint, ended.eta_s) == ("finished", 12, 12, 0.0)
    assert "left" not in run("status", recipe.run_dir)[1]


def test_a_step_that_was_saved_but_not_logged_counts(tiny_recipe: Callable[..., Recipe]) -> None:
    recipe = tiny_recipe("run.log_every=5", "run.health_every=null")
    train(recipe, progress=False, on_step=stop_at(7))
    status = run_status(recipe.run_dir)
    assert (status.step, status.checkpoint) == (7, 7)


@pytest.mark.parametrize(
    ("answer", "state", "shown"),
    [
        ("PENDING|Priority|", "queued", "PENDING (Priority)"),
        ("RUNNING|None|n[1-2]", "running", "RUNNING on n[1-2]"),
        ("FAILED|NonZeroExitCode|n1", "not begun", "FAILED on n1 (NonZeroExitCode)"),
    ],
)
def test_a_job_that_has_not_begun(
    run: Run, slurm: PretendSlurm, tiny_recipe: Callable[..., Recipe],
    tmp_path: Path, answer: str, state: str, shown: str,
) -> None:  # fmt: skip
    recipe, folder = tiny_recipe(), tmp_path / "job"
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    recipe.run_dir.mkdir()
    job = {"job_id": 5, "folder": str(folder)}
    (recipe.run_dir / "job.json").write_text(json.dumps(job))
    slurm.answer("squeue", f"echo '{answer}'")
    assert run("status", recipe.run_dir)[1].splitlines() == [
        f"{recipe.run_dir}: {state}, step 0 of 12",
        "  newest checkpoint: none yet",
        f"  Slurm job 5: {shown}; its folder is {folder}",
    ]


def test_a_job_that_left_the_queue_and_a_machine_without_slurm(
    slurm: PretendSlurm, tiny_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    train(recipe, progress=False, on_step=stop_at(2))
    job = {"job_id": 5, "folder": "/elsewhere"}
    (recipe.run_dir / "job.json").write_text(json.dumps(job))
    left = run_status(recipe.run_dir)
    assert (left.state, left.job and left.job.state) == ("stopped", "UNKNOWN")
    slurm.answer("sacct", "echo 'CANCELLED by 1000|n1'")
    accounted = run_status(recipe.run_dir).job
    assert accounted is not None and (accounted.state, accounted.nodes) == ("CANCELLED", "n1")
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_status(recipe.run_dir).job is None


def test_a_reader_is_at_one_of_its_stages(
    run: Run, tiny_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    reader = tmp_path / "reader"
    reader.mkdir()
    (reader / "stages.yaml").write_text(dump_yaml(read_stages()))
    total = sum(stage.steps > 0 for stage in read_stages().stages.values())
    assert "has not begun its first stage" in run("status", reader)[2]
    train(tiny_recipe(f"run.dir={reader / '01-text1'}"), progress=False)
    between = run_status(reader)
    assert (between.state, between.stage, between.step) == ("stopped", f"1/{total}", 12)
    second = tiny_recipe(f"run.dir={reader / '02-text2'}")
    train(second, progress=False, on_step=stop_at(5))
    assert f"02-text2: stopped, stage 2/{total}, step 5 of 12" in run("status", reader)[1]
    for number in range(2, total + 1):
        shutil.copytree(reader / "01-text1", reader / f"{number:02d}-more", dirs_exist_ok=True)
    shutil.rmtree(second.run_dir)
    assert run_status(reader).state == "finished"
