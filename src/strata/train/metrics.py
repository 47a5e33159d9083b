"""Where a run's numbers go: `metrics.jsonl` always, the terminal, TensorBoard and wandb if wanted.

A record is one flat-enough mapping a step: numbers by name, and under `health` a mapping layer ->
numbers. `metrics.jsonl` is the record of the run; the others are views of it.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from strata.errors import ConfigError
from strata.files import replace_text

METRICS_NAME = "metrics.jsonl"
Record = Mapping[str, Any]


class MetricsSink(Protocol):
    """Something that takes a run's records."""

    def write(self, record: Record) -> None:
        """Take the record of one step."""

    def close(self) -> None:
        """Flush and release."""


class MetricsFile:
    """Appends records to `metrics.jsonl`, one JSON object a line.

    Args:
        run_dir: the run folder.
        after_step: the step the run goes on from; later lines, which the steps to come will write
            again, and a line cut short by a kill are dropped.
    """

    def __init__(self, run_dir: Path, *, after_step: int) -> None:
        self.path = run_dir / METRICS_NAME
        _truncate(self.path, after_step=after_step)
        self._file: TextIO = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one line and hand it to the system, so that a kill loses no logged step."""
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run, oldest first; a line cut short by a kill is left out."""
    path = run_dir / METRICS_NAME
    return list(_records(path)) if path.exists() else []


class TensorBoardSink:
    """Scalars for TensorBoard, in RUN/tensorboard."""

    def __init__(self, run_dir: Path, *, after_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError(
                "run.tensorboard is true but tensorboard is not installed: "
                "pip install 'strata-lm[train]' or set run.tensorboard=false"
            ) from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=after_step + 1)

    def write(self, record: Record) -> None:
        """Write every number of the record under its joined name."""
        for name, value in flatten(record).items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """Scalars for Weights & Biases; a resumed run goes on in the same wandb run."""

    def __init__(self, run_dir: Path, *, project: str, name: str, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError(
                f"run.wandb is {project!r} but wandb is not installed: "
                "pip install wandb or set run.wandb=null"
            ) from None
        id_path = run_dir / "wandb_id"
        if not id_path.exists():
            id_path.write_text(wandb.util.generate_id(), encoding="utf-8")
        self._run = wandb.init(
            project=project,
            name=name,
            config=config,
            dir=str(run_dir),
            id=id_path.read_text(encoding="utf-8").strip(),
            resume="allow",
        )

    def write(self, record: Record) -> None:
        """Log every number of the record under its joined name."""
        self._run.log(flatten(record), step=record["step"])

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()


class Terminal:
    """A progress bar with the newest numbers on a terminal, a plain line a record elsewhere.

    Args:
        name: the run's name.
        num_steps: updates in the whole run.
        start_step: updates already made.
        stream: where to print.
    """

    def __init__(
        self, name: str, *, num_steps: int, start_step: int, stream: TextIO | None = None
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._num_steps, self._start_step = num_steps, start_step
        self._start_s = time.perf_counter()
        self._progress: Progress | None = None
        console = Console(file=self._stream)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed}/{task.total} {task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task(
                name, total=num_steps, completed=start_step, numbers=""
            )

    def start(self) -> None:
        """Put the bar up."""
        self._start_s = time.perf_counter()
        if self._progress is not None:
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar; called every step, logged or not."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def write(self, record: Record) -> None:
        """Show one record."""
        if self._progress is not None:
            self._progress.update(self._task, numbers=_numbers(record))
        else:
            step = record["step"]
            line = f"step {step}/{self._num_steps}  {_numbers(record)}  eta {self._eta(step)}"
            self.say(line)

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._progress is not None:
            self._progress.stop()

    def _eta(self, step: int) -> str:
        steps_here = max(1, step - self._start_step)
        per_step_s = (time.perf_counter() - self._start_s) / steps_here
        return duration(per_step_s * (self._num_steps - step))


class Report:
    """All places a run's records go.

    Args:
        sinks: what takes the records that are logged.
        terminal: what shows progress, or None.
    """

    def __init__(self, sinks: Sequence[MetricsSink], *, terminal: Terminal | None) -> None:
        self._sinks = list(sinks)
        self._terminal = terminal

    def __enter__(self) -> Report:
        if self._terminal is not None:
            self._terminal.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._terminal is not None:
            self._terminal.close()
        for sink in self._sinks:
            sink.close()

    def advance(self, step: int) -> None:
        """Show that a step is done, logged or not."""
        if self._terminal is not None:
            self._terminal.advance(step)

    def write(self, record: Record) -> None:
        """Log one record everywhere."""
        for sink in self._sinks:
            sink.write(record)
        if self._terminal is not None:
            self._terminal.write(record)

    def say(self, line: str) -> None:
        """Tell the person at the terminal."""
        if self._terminal is not None:
            self._terminal.say(line)


def duration(seconds: float) -> str:
    """`h:mm:ss` of a number of seconds."""
    minutes, whole_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{whole_s:02d}"


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as one mapping whose names are joined by slashes."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            for inner, leaf in flatten(value).items():
                flat[f"{name}/{inner}"] = leaf
        else:
            flat[name] = value
    return flat


def _numbers(record: Record) -> str:
    parts = [f"loss {record['loss']:.4f}"]
    if "validation_loss" in record:
        parts.append(f"validation {record['validation_loss']:.4f}")
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    used: Sequence[float] = [layer["rows_used"] for layer in record.get("health", {}).values()]
    if used:
        parts.append(f"rows used {min(used):.1%}")
    return "  ".join(parts)


def _finite(record: Record) -> dict[str, Any]:
    """JSON has no NaN; a number that is not finite becomes null."""
    return {
        name: _finite(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for name, value in record.items()
    }


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # cut short by a kill; the step is written again after resumption
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


def _truncate(path: Path, *, after_step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in _records(path) if record["step"] <= after_step]
    replace_text(path, "".join(json.dumps(record) + "\n" for record in kept))
