"""A run that was interrupted and resumed ends with the bits of one that was not."""

from __future__ import annotations

import fcntl
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from strata.errors import GO_ON, CheckpointError, ConfigError
from strata.train import Recipe, StepEvent, read_metrics, train
from strata.train import loop as loop_module
from strata.train.run import LOCK_NAME, is_held

MakeRecipe = Callable[..., Recipe]

# Dropout in attention and memory makes the random state matter.
DROPOUT = ("model.host.attention_dropout=0.1", "memory.value_dropout=0.1")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums of different thread counts differ in their last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def final_bits(run_dir: Path, step: int) -> dict[str, Any]:
    """Everything of the last checkpoint but the clock."""
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    bits = {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}
    state = json.loads((folder / "state.json").read_text())
    for clock in ("wall_s", "tokens_per_s"):
        del state["progress"][clock]
    del state["recipe"]  # run.dir and the like may differ
    return {**bits, **state, "saved": (run_dir / "model" / "model.safetensors").read_bytes()}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it."""


def kill_at(step: int) -> Callable[[StepEvent], None]:
    def on_step(event: StepEvent) -> None:
        if event.step == step:
            raise Killed

    return on_step


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.value_algorithm=adagrad",),
        ("optim.value_algorithm=adam", "run.accumulate=2"),
        ("optim.value_algorithm=sgd", "data.packing=document", "data.document_mask=true"),
        ("model.dtype=bfloat16", "run.precision=bf16"),
        ("model.dtype=bfloat16", "optim.value_algorithm=adam"),
        ("memory=null",),
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_killed_and_resumed_equals_uninterrupted(
    tiny_recipe: MakeRecipe, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    dropout = DROPOUT if "memory=null" not in overrides else DROPOUT[:1]
    whole = tiny_recipe(*dropout, *overrides, f"run.dir={tmp_path / 'whole'}")
    train(whole, progress=False)

    broken = tiny_recipe(*dropout, *overrides, f"run.dir={tmp_path / 'broken'}")
    with pytest.raises(Killed):
        train(broken, progress=False, on_step=kill_at(7))
    torch.manual_seed(12345)  # a new process knows nothing of the old one's random state
    train(broken, progress=False)

    assert final_bits(whole.run_dir, 12) == final_bits(broken.run_dir, 12)


def test_metrics_of_lost_steps_are_written_once(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    with pytest.raises(Killed):
        train(recipe, progress=False, on_step=kill_at(7))
    with (recipe.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')  # the line a kill cut short
    assert [record["step"] for record in read_metrics(recipe.run_dir)] == list(range(1, 8))
    before = read_metrics(recipe.run_dir)
    train(recipe, progress=False)
    after = read_metrics(recipe.run_dir)
    assert [record["step"] for record in after] == list(range(1, 13))
    assert [record["loss"] for record in after][:7] == [record["loss"] for record in before]


def test_a_finished_run_is_left_as_it_is(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()
    first = train(recipe, progress=False)
    bits = final_bits(recipe.run_dir, 12)
    again = train(recipe, progress=False)
    assert again == first
    assert final_bits(recipe.run_dir, 12) == bits


def test_an_observer_changes_nothing(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    def disturb(event: StepEvent) -> None:
        torch.rand(100)
        event.model(torch.zeros(1, 8, dtype=torch.long))

    watched = tiny_recipe(*DROPOUT, f"run.dir={tmp_path / 'watched'}")
    alone = tiny_recipe(*DROPOUT, f"run.dir={tmp_path / 'alone'}")
    train(watched, progress=False, on_step=disturb)
    train(alone, progress=False)
    assert final_bits(watched.run_dir, 12) == final_bits(alone.run_dir, 12)


def test_validation_changes_nothing(tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    watched = tiny_recipe(*DROPOUT, f"run.dir={tmp_path / 'watched'}", "run.validate_every=3")
    alone = tiny_recipe(*DROPOUT, f"run.dir={tmp_path / 'alone'}")
    train(watched, progress=False)
    train(alone, progress=False)
    names = ("model.safetensors", "dense_optimizer.safetensors", "value_optimizer.safetensors")
    left, right = final_bits(watched.run_dir, 12), final_bits(alone.run_dir, 12)
    assert [left[name] for name in names] == [right[name] for name in names]


def test_another_recipe_is_refused_with_the_keys_that_differ(tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(), progress=False)
    with pytest.raises(ConfigError) as caught:
        train(tiny_recipe("optim.lr=0.5", "run.steps=20", "run.log_every=3"), progress=False)
    line = str(caught.value)
    assert "optim.lr was 0.003, is 0.5" in line and "run.steps was 12, is 20" in line
    assert "log_every" not in line and "--fresh" in line


def test_what_is_logged_and_kept_may_change(tiny_recipe: MakeRecipe) -> None:
    with pytest.raises(Killed):
        train(tiny_recipe(), progress=False, on_step=kill_at(5))
    changed = tiny_recipe("run.log_every=3", "run.keep_checkpoints=1", "run.checkpoint_every=6")
    assert train(changed, progress=False).steps == 12
    assert "log_every: 3" in (changed.run_dir / "recipe.yaml").read_text()


def test_fresh_starts_over_and_touches_nothing_else(tiny_recipe: MakeRecipe) -> None:
    train(tiny_recipe(), progress=False)
    other = tiny_recipe("optim.lr=0.001")
    note = other.run_dir / "notes.txt"
    note.write_text("mine")
    seen: list[int] = []
    train(other, progress=False, fresh=True, on_step=lambda event: seen.append(event.step))
    assert seen == list(range(1, 13)) and note.read_text() == "mine"


def test_other_data_is_refused(tiny_recipe: MakeRecipe, tmp_path: Path, tiny_data: Path) -> None:
    from strata.data.prepare import PrepareConfig, prepare

    with pytest.raises(Killed):
        train(tiny_recipe(), progress=False, on_step=kill_at(5))
    source = tmp_path / "other.jsonl"
    source.write_text(json.dumps({"text": "Quite another text. " * 200}) + "\n")
    other = tmp_path / "other"
    prepare(
        [source],
        out=other,
        tokenizer=tiny_data / "tokenizer",
        config=PrepareConfig(memory_gb=1.0, val_fraction=0.0),
    )
    with pytest.raises(CheckpointError, match="holds other data than the run"):
        train(tiny_recipe(f"data.dir={other}"), progress=False)


def test_one_process_a_run_folder(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe()

    def second(event: StepEvent) -> None:
        with pytest.raises(ConfigError, match="another process is training"):
            train(recipe, progress=False)

    train(recipe, progress=False, on_step=second)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_finishes_the_step_and_saves(tiny_recipe: MakeRecipe, name: str) -> None:
    recipe = tiny_recipe()

    def send(event: StepEvent) -> None:
        if event.step == 6:
            signal.raise_signal(signal.Signals[name])

    stopped = train(recipe, progress=False, on_step=send)
    assert (stopped.steps, stopped.stopped_by, stopped.model_dir) == (6, name, None)
    assert (recipe.run_dir / "checkpoints" / "step_00000006").is_dir()
    finished = train(recipe, progress=False)
    assert (finished.steps, finished.stopped_by) == (12, None)


def test_sigterm_twice_still_finishes_the_step(tiny_recipe: MakeRecipe) -> None:
    """As from a scheduler, and from the launcher that it told too."""
    recipe = tiny_recipe()

    def send(event: StepEvent) -> None:
        if event.step == 6:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)

    stopped = train(recipe, progress=False, on_step=send)
    assert (stopped.steps, stopped.stopped_by) == (6, "SIGTERM")


def test_sigint_twice_acts_at_once(tiny_recipe: MakeRecipe) -> None:
    # What a shell starts in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def send(event: StepEvent) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_recipe(), progress=False, on_step=send)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_look_at_the_lock_does_not_keep_a_run_from_starting(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("run.steps=4")
    recipe.run_dir.mkdir()
    with (recipe.run_dir / LOCK_NAME).open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        assert not is_held(recipe.run_dir)  # those who look do not see each other
        threading.Timer(0.1, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        assert train(recipe, progress=False).steps == 4


def test_who_trains_holds_the_lock(tiny_recipe: MakeRecipe) -> None:
    recipe = tiny_recipe("run.steps=4")
    held = []
    assert not is_held(recipe.run_dir)
    train(recipe, progress=False, on_step=lambda event: held.append(is_held(recipe.run_dir)))
    assert held == [True] * 4 and not is_held(recipe.run_dir)


def test_handlers_are_given_back(tiny_recipe: MakeRecipe) -> None:
    before = signal.getsignal(signal.SIGTERM)
    train(tiny_recipe(), progress=False)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_broken_loss_stops_and_keeps_the_checkpoint(
    tiny_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe()
    real, calls = loop_module.summed_loss, iter(range(1, 100))

    def breaks_at_six(*args: Any) -> torch.Tensor:
        return real(*args) * (float("nan") if next(calls) == 6 else 1.0)

    monkeypatch.setattr(loop_module, "summed_loss", breaks_at_six)
    with pytest.raises(loop_module.DivergenceError) as caught:
        train(recipe, progress=False)
    assert "loss is nan at step 6 (the checkpoint of step 4 is intact)" in str(caught.value)
    assert [entry.name for entry in (recipe.run_dir / "checkpoints").iterdir()] == ["step_00000004"]


COMMAND = [sys.executable, "-c", "from strata.cli.main import main; main()", "train"]


def start(recipe_file: Path, *overrides: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(recipe_file), "run.threads=1", *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def newest_step(run_dir: Path) -> int:
    names = [entry.name for entry in run_dir.glob("checkpoints/step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def kill_at_random(recipe_file: Path, run_dir: Path, rng: random.Random, *overrides: str) -> bool:
    """Start training, and kill it some time after its next checkpoint; whether it was in time."""
    resumed_from = newest_step(run_dir)
    process = start(recipe_file, *overrides)
    while process.poll() is None and newest_step(run_dir) == resumed_from:
        time.sleep(0.002)
    time.sleep(rng.uniform(0.0, 0.3))
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def kill_many_times(
    recipe_file: Path, recipe: MakeRecipe, tmp_path: Path, *, num_kills: int, steps: int
) -> None:
    overrides = (*DROPOUT, f"run.steps={steps}")
    whole = recipe(*overrides, f"run.dir={tmp_path / 'whole'}", "run.checkpoint_every=1000")
    train(whole, progress=False)
    broken_dir = tmp_path / "broken"
    killed = (*overrides, f"run.dir={broken_dir}", "run.checkpoint_every=3")
    rng = random.Random(20)
    kills = sum(kill_at_random(recipe_file, broken_dir, rng, *killed) for _ in range(num_kills))
    assert kills == num_kills, "the run ended before the last kill: give it more steps"
    train(recipe(*killed), progress=False)
    assert final_bits(whole.run_dir, steps) == final_bits(broken_dir, steps)
    steps_logged = [record["step"] for record in read_metrics(broken_dir)]
    assert steps_logged == list(range(1, steps + 1))


def test_two_random_kills(tiny_recipe_file: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    kill_many_times(tiny_recipe_file, tiny_recipe, tmp_path, num_kills=2, steps=100)


@pytest.mark.slow
def test_ten_random_kills(tiny_recipe_file: Path, tiny_recipe: MakeRecipe, tmp_path: Path) -> None:
    kill_many_times(tiny_recipe_file, tiny_recipe, tmp_path, num_kills=10, steps=600)


def test_sigterm_to_the_command_asks_to_go_on(tiny_recipe_file: Path, tmp_path: Path) -> None:
    process = start(tiny_recipe_file, "run.steps=100000")
    while process.poll() is None and newest_step(tmp_path / "run") == 0:
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == GO_ON, stderr
    step = newest_step(tmp_path / "run")
    assert (
        f"SIGTERM: stopped after step {step} and saved it, run the same command to go on" in stderr
    )
