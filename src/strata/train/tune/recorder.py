"""What TRL logs, written and shown, and a run ended by a signal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from strata.train.metrics import MetricsFile, Terminal
from strata.train.run import StopRequest
from strata.train.tune.recipe import TuneRecipe

_SHOWN = (
    "loss",
    "eval_loss",
    "rewards/margins",
    "rewards/accuracies",
    "eval_rewards/margins",
    "eval_rewards/accuracies",
    "learning_rate",
)


class Recorder(TrainerCallback):
    """Writes what TRL logs, shows it, and ends the run on a signal."""

    def __init__(
        self, recipe: TuneRecipe, *, start_step: int, stop: StopRequest, progress: bool
    ) -> None:
        self._file = MetricsFile(recipe.run_dir, after_step=start_step)
        self._stop = stop
        self._recipe, self._start_step = recipe, start_step
        self._terminal: Terminal | None = None
        self._progress = progress

    def say(self, line: str) -> None:
        """Tell the person at the terminal."""
        if self._progress:
            self._shown(0).say(line)

    def close(self) -> None:
        """Take the bar down and close the file."""
        if self._terminal is not None:
            self._terminal.close()
        self._file.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The number of steps is known from here on."""
        if self._progress:
            self._terminal = None
            self._shown(state.max_steps).start()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        """Write one record."""
        if not logs or "train_runtime" in logs:
            return
        record = {"step": state.global_step, **logs}
        self._file.write(record)
        if self._progress:
            self._shown(state.max_steps).say(_line(record))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Stop after this step if asked to."""
        if self._progress:
            self._shown(state.max_steps).advance(state.global_step)
        if self._stop.signal is not None:
            control.should_save = control.should_training_stop = True
            self.say(
                f"{self._stop.signal}: stopped after step {state.global_step} and saved it, run "
                "the same command to go on"
            )
        return control

    def _shown(self, num_steps: int) -> Terminal:
        if self._terminal is None:
            self._terminal = Terminal(
                self._recipe.name, num_steps=num_steps, start_step=self._start_step
            )
        return self._terminal


def _line(record: Mapping[str, Any]) -> str:
    parts = [f"step {record['step']}"]
    for name in _SHOWN:
        value = record.get(name)
        if value is not None and math.isfinite(float(value)):
            short = name.removeprefix("rewards/").replace("eval_", "held-out ")
            parts.append(f"{short.replace('rewards/', '')} {float(value):.4g}")
    return "  ".join(parts)
