"""A progress bar on stderr; where stderr is no terminal, a plain line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

_QUIET_S = 1.0
_LINE_EVERY_S = 15.0


class ProgressBar:
    """Shows how far one long piece of work has come, once it has taken more than a second.

    Args:
        description: what is being done, a few words.
        total: the amount of work, in any unit; None where it is not known.
        enabled: False shows nothing at all.
    """

    def __init__(self, description: str, *, total: float | None, enabled: bool) -> None:
        self._description = description
        self._total = total
        self._enabled = enabled
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._started_s = time.monotonic()
        self._last_line_s = self._started_s

    def __enter__(self) -> ProgressBar:
        return self

    def update(self, done: float, *, note: str = "") -> None:
        """Tell how much of `total` is done."""
        now_s = time.monotonic()
        if not self._enabled or now_s - self._started_s < _QUIET_S:
            return
        if sys.stderr.isatty():
            self._draw(done, note)
        elif now_s - self._last_line_s >= _LINE_EVERY_S:
            self._last_line_s = now_s
            share = f"{done / self._total:.0%} " if self._total else ""
            print(f"{self._description}: {share}{note}".rstrip(), file=sys.stderr, flush=True)

    def _draw(self, done: float, note: str) -> None:
        if self._bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(self._description, total=self._total, note=note)
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, note=note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
