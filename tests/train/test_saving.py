"""Checkpoints written beside training: the bytes of those that training waited for."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strata.errors import StorageError
from strata.models import build
from strata.models.tensor_file import read_header
from strata.train import Recipe, StepEvent, train
from strata.train import checkpoint as checkpoint_module
from strata.train import loop as loop_module
from strata.train.checkpoint import CheckpointFolder
from strata.train.footprint import footprint
from strata.train.saving import Saving
from strata.train.shares import shares_of
from strata.train.state import DENSE, MODEL, VALUES

MakeRecipe = Callable[..., Recipe]
BESIDE = "run.checkpoint_async=true"


def tensors(run_dir: Path, step: int) -> dict[str, str]:
    """The sha256 of every file of tensors in a checkpoint."""
    manifest = run_dir / "checkpoints" / f"step_{step:08d}" / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}


@pytest.mark.parametrize("algorithm", ["adagrad", "adam"])
def test_what_is_written_is_what_was_when_training_went_on(
    tiny_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    options = [f"optim.value_algorithm={algorithm}", "run.keep_checkpoints=null"]
    waited = tiny_recipe(*options, f"run.dir={tmp_path / 'waited'}")
    train(waited, progress=False)

    later, write_groups = threading.Event(), checkpoint_module.write_groups

    def hold(*arguments: Any) -> list[str]:
        assert later.wait(60)  # until step 7 has changed every tensor that step 4 saves
        return write_groups(*arguments)

    def on_step(event: StepEvent) -> None:
        if event.step == 7:
            assert CheckpointFolder(tmp_path / "beside" / "checkpoints").steps() == []
            later.set()

    monkeypatch.setattr(checkpoint_module, "write_groups", hold)
    beside = tiny_recipe(*options, BESIDE, f"run.dir={tmp_path / 'beside'}")
    train(beside, progress=False, on_step=on_step)

    for step in (4, 8, 12):
        assert tensors(beside.run_dir, step) == tensors(waited.run_dir, step)
    state = json.loads((beside.run_dir / "checkpoints/step_00000004/state.json").read_text())
    assert state["progress"]["step"] == 4
    models = [run.run_dir / "model" / "model.safetensors" for run in (beside, waited)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_the_copy_is_as_large_as_was_said(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe(BESIDE, "run.steps=4")
    train(recipe, progress=False)
    folder = recipe.run_dir / "checkpoints" / "step_00000004"
    files = [folder / f"{group}.safetensors" for group in (MODEL, DENSE, VALUES)]
    saved = sum(place.num_bytes for file in files for place in read_header(file).values())
    model = build(recipe.model, recipe.memory, device="meta")
    said = footprint(model, recipe, shares_of(recipe, processes=1)).copied_bytes
    assert said == saved > 0


def test_one_is_written_at_a_time_and_the_newest_are_kept(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, most = [0], [0]
    finish = CheckpointFolder.finish

    def counted(self: CheckpointFolder, *arguments: Any, **options: Any) -> None:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        finish(self, *arguments, **options)
        writing[0] -= 1

    monkeypatch.setattr(CheckpointFolder, "finish", counted)
    recipe = tiny_recipe(BESIDE, "run.checkpoint_every=1", "run.keep_checkpoints=3")
    train(recipe, progress=False)
    assert most == [1]
    assert CheckpointFolder(recipe.run_dir / "checkpoints").steps() == [10, 11, 12]
    assert len(list((recipe.run_dir / "checkpoints").iterdir())) == 3


def test_a_run_that_was_stopped_while_it_saved_goes_on(
    tiny_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Its signal comes right after a save has begun: both are whole, and the bits those of one."""
    whole, stopped = (tiny_recipe(BESIDE, f"run.dir={tmp_path / n}") for n in ("whole", "stopped"))
    train(whole, progress=False)

    def on_step(event: StepEvent) -> None:
        if event.step == 4:
            os.kill(os.getpid(), 15)

    assert train(stopped, progress=False, on_step=on_step).stopped_by == "SIGTERM"
    assert CheckpointFolder(stopped.run_dir / "checkpoints").steps() == [4]
    train(stopped, progress=False)
    assert tensors(whole.run_dir, 12) == tensors(stopped.run_dir, 12)


def test_a_disk_that_fills_beside_training_ends_it_in_one_line(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the step at which that is seen, not at the next one that saves."""
    save_file, made, steps = checkpoint_module.save_file, [], []

    class Seen(Saving):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    def full(tensors: Any, path: Path) -> None:
        if "step_00000008" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path)

    def on_step(event: StepEvent) -> None:
        steps.append(event.step)
        until_s = time.monotonic() + 60
        while event.step == 9 and not made[0].failed and time.monotonic() < until_s:
            time.sleep(0.01)

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    monkeypatch.setattr(loop_module, "Saving", Seen)
    recipe = tiny_recipe(BESIDE)
    with pytest.raises(
        StorageError, match=r"disk full while saving .*step_00000008.*step 4 is int"
    ):
        train(recipe, progress=False, on_step=on_step)
    assert steps[-1] in (8, 9)  # the disk may be full before the next step ends
    assert [p.name for p in (recipe.run_dir / "checkpoints").iterdir()] == ["step_00000004"]
