"""Where a run lives: its folder, the signals that stop it, its device.

RUN/recipe.yaml      the resolved recipe
RUN/metrics.jsonl    one line a logged step
RUN/checkpoints/     what resumption needs, see checkpoint.py
RUN/model/           the finished model with its tokenizer, for from_pretrained
"""

from __future__ import annotations

import fcntl
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.config import dump_yaml, validate
from strata.errors import CheckpointError, ConfigError
from strata.files import replace_text
from strata.train.checkpoint import Checkpoint, CheckpointFolder, storage_errors
from strata.train.metrics import METRICS_NAME
from strata.train.recipe import RECIPE_NAME, Recipe, require_same_run

if TYPE_CHECKING:
    from strata.train.tune.recipe import TuneRecipe

LOCK_NAME = ".lock"
_UNFINISHED = ".unfinished_"
_LOCK_WAIT_S = 0.2  # how long a lock may be held by someone who only looks, see `is_held`


class RunFolder:
    """The folder of one run, held by this process while the context is open.

    Args:
        recipe: the run.
        is_main: hold the folder; the other processes of a run read it only.

    Raises:
        ConfigError: on entering, another process trains in this folder.
        StorageError: on entering, the folder cannot be written.
    """

    def __init__(self, recipe: Recipe | TuneRecipe, *, is_main: bool = True) -> None:
        self.recipe = recipe
        self.is_main = is_main
        self.dir = recipe.run_dir
        self.model_dir = self.dir / "model"
        self.checkpoints = CheckpointFolder(
            self.dir / "checkpoints", keep=recipe.run.keep_checkpoints
        )
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> RunFolder:
        if not self.is_main:
            return self
        if self.dir.exists() and not self.dir.is_dir():
            raise ConfigError(f"run.dir {self.dir} is a file: name a folder, new or a run's own")
        with storage_errors(f"opening {self.dir}", consequence="choose another run.dir"):
            self.dir.mkdir(parents=True, exist_ok=True)
            self._lock = (self.dir / LOCK_NAME).open("wb")
        if not _take(self._lock, for_s=_LOCK_WAIT_S):
            self._lock.close()
            raise ConfigError(
                f"another process is training in {self.dir}: wait for it or choose another run.dir"
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def clear(self) -> None:
        """Delete what a run writes, and nothing else that lies in the folder."""
        for name in ("checkpoints", "model", "tensorboard", f"{_UNFINISHED}model"):
            shutil.rmtree(self.dir / name, ignore_errors=True)
        for name in (RECIPE_NAME, METRICS_NAME, "wandb_id"):
            (self.dir / name).unlink(missing_ok=True)

    def open_newest(self, *, part: int = 0, parts: int = 1) -> Checkpoint | None:
        """The newest checkpoint if there is one, checked to belong to this recipe.

        Args:
            part: with `parts`, check this part of its files: others check the rest.
            parts: how many processes share the work.

        Raises:
            CheckpointError: it is damaged, or an incompatible version wrote it.
            ConfigError: it belongs to a recipe that gives another result.
        """
        if self.is_main:
            self.checkpoints.clean()
        steps = self.checkpoints.steps()
        if not steps:
            return None
        checkpoint = self.checkpoints.open(steps[-1], part=part, parts=parts)
        require_same_run(stored_recipe(checkpoint), self.recipe)
        return checkpoint

    def write_recipe(self) -> None:
        """Write the resolved recipe into the folder."""
        path = self.dir / RECIPE_NAME
        with storage_errors(f"writing {path}", consequence="training has not begun"):
            replace_text(path, dump_yaml(self.recipe))

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write the finished model and its tokenizer, whole or not at all."""
        write_model(
            self.model_dir,
            model,
            tokenizer,
            consequence="the checkpoint of the last step is intact",
        )


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, consequence: str
) -> None:
    """Write a model and its tokenizer, whole or not at all, in the place of what is there.

    Raises:
        StorageError: it cannot be written; the line ends with the consequence.
    """
    temporary = folder.with_name(f"{_UNFINISHED}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    with storage_errors(f"saving {folder}", consequence=consequence):
        try:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def is_held(run_dir: Path) -> bool:
    """Whether a process of this machine trains in the folder; of another, if the disk says so."""
    try:
        with (run_dir / LOCK_NAME).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _take(lock: IO[bytes], *, for_s: float) -> bool:
    """Lock the file for this process alone, trying for some time; whether that was possible."""
    until_s = time.monotonic() + for_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until_s:
                return False
            time.sleep(0.05)
        else:
            return True


class StopRequest:
    """Remembers SIGTERM or SIGINT, so that the loop can finish its step and save.

    SIGINT acts at once when a signal came before. SIGTERM never does: a scheduler sends it to every
    process of a job, and what started this process then sends it once more. Outside the main
    thread, where Python allows no handlers, signals do what they always do.

    Args:
        for_s: also ask to stop after so many seconds; None never does.
    """

    def __init__(self, *, for_s: float | None = None) -> None:
        self.signal: str | None = None
        self._until_s = math.inf if for_s is None else time.monotonic() + for_s
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def reason(self) -> str | None:
        """The signal's name, or "time"; None to go on."""
        if self.signal is None and time.monotonic() >= self._until_s:
            return "time"
        return self.signal

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number).name
            signal.signal(signal.SIGINT, self._previous[signal.SIGINT])

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def require_one_process(verb: str) -> None:
    """Refuse to be one of several processes, which would all write the same run folder.

    Args:
        verb: what runs in one process only, as "strata sft".

    Raises:
        ConfigError: WORLD_SIZE says that there are more.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise ConfigError(
            f"{verb} trains in one process, this is one of {world_size}: start it without torchrun"
        )


def stored_recipe(checkpoint: Checkpoint) -> Recipe:
    """The recipe of the run that wrote a checkpoint.

    Raises:
        CheckpointError: another version of strata did.
    """
    try:
        return validate(Recipe, checkpoint.state["recipe"], origin=str(checkpoint.path))
    except ConfigError as error:
        raise CheckpointError(
            f"{checkpoint.path} was written by another version of strata ({error}): "
            "go on with that version, or start over with --fresh"
        ) from None
