"""Watching a model learn: a live bar on a terminal, plain lines elsewhere, recall now and then."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel

from strata.quickstart.report import Point
from strata.train import StepEvent

NUM_LOOKS = 10  # looks at recall during a run


class Watch:
    """An observer of a training run.

    Args:
        kind: which model it is.
        console: where to show it.
        ask: gives a model's recall, 0..1.
        curve: a JSON-lines file that keeps what was seen, so that an interrupted run loses nothing.
    """

    def __init__(
        self, kind: str, *, console: Console, ask: Callable[[PreTrainedModel], float], curve: Path
    ) -> None:
        self._ask, self._curve = ask, curve
        self._recall = self.points()[-1].recall if self.points() else 0.0
        self._progress = Progress(
            TextColumn(f"{kind:>6}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed}/{task.total}  {task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(kind, total=None, numbers="")
        self._console = console

    def __enter__(self) -> Watch:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def on_step(self, event: StepEvent) -> None:
        """Show a step; ask the questions at every tenth of the run and at its end."""
        loss, rate = event.record["loss"], event.record["tokens_per_s"]
        look = event.step % max(1, event.num_steps // NUM_LOOKS) == 0
        if look or event.step == event.num_steps:
            self._recall = self._ask(event.model)
            self._add(Point(step=event.step, loss=loss, recall=self._recall))
        numbers = f"loss {loss:.2f}  recall {self._recall:5.1%}  {rate:,.0f} tokens/s"
        self._progress.update(
            self._task, total=event.num_steps, completed=event.step, numbers=numbers
        )
        if look and not self._console.is_terminal:
            self._console.print(f"  step {event.step:>4}/{event.num_steps}  {numbers}")

    def points(self) -> list[Point]:
        """All looks so far, by step."""
        if not self._curve.exists():
            return []
        lines = self._curve.read_text(encoding="utf-8").splitlines()
        return [Point(**json.loads(line)) for line in lines]

    def _add(self, point: Point) -> None:
        # A run resumed from a checkpoint passes some steps again: their looks are replaced.
        points = [kept for kept in self.points() if kept.step < point.step]
        lines = [json.dumps(vars(p)) + "\n" for p in [*points, point]]
        self._curve.write_text("".join(lines), encoding="utf-8")
