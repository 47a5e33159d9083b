"""What an evaluation found: figures with their standard errors, as a table and as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Measure:
    """One figure.

    Attributes:
        source: the task, question file or text it was measured on.
        metric: its name, with its unit where it has one.
        value: the figure, or None where the evaluation gave none.
        stderr: standard error of the mean, or None where it is not known.
        num_samples: questions, documents or tokens it was taken over.
        num_fewshot: worked examples in front of each question, or None where there is no such
            thing.
    """

    source: str
    metric: str
    value: float | None
    stderr: float | None
    num_samples: int
    num_fewshot: int | None = None


@dataclass(frozen=True)
class Report:
    """All figures of one model.

    Attributes:
        model: the folder or name that was evaluated.
        measures: the figures, in the order asked for.
        records: question by question, for each source that keeps them.
    """

    model: str
    measures: tuple[Measure, ...]
    records: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    def to_json(self, *, records: bool) -> dict[str, Any]:
        """A mapping that the json module can write; numbers JSON cannot say become null."""
        measures = [
            {name: _finite(value) for name, value in asdict(measure).items()}
            for measure in self.measures
        ]
        tree: dict[str, Any] = {"model": self.model, "measures": measures}
        if records:
            tree["records"] = {
                source: [{name: _finite(value) for name, value in row.items()} for row in rows]
                for source, rows in self.records.items()
            }
        return tree

    def table(self) -> Table:
        """The figures for a terminal."""
        table = Table(title=self.model, title_justify="left")
        table.add_column("source", overflow="fold")
        table.add_column("metric", no_wrap=True)
        for name in ("value", "stderr", "samples", "shots"):
            table.add_column(name, justify="right", no_wrap=True)
        labels = _labels([measure.source for measure in self.measures])
        previous = None
        for measure in self.measures:
            table.add_row(
                "" if measure.source == previous else labels[measure.source],
                measure.metric,
                _shown(measure.value),
                f"± {_shown(measure.stderr)}" if measure.stderr is not None else "",
                f"{measure.num_samples:,}",
                "" if measure.num_fewshot is None else str(measure.num_fewshot),
            )
            previous = measure.source
        return table


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of at least one value and its standard error, None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def _labels(sources: Sequence[str]) -> dict[str, str]:
    """Sources by their last part, which fits a table, where no two share it."""
    names = {source: Path(source).name or source for source in sources}
    counts = Counter(names.values())
    return {source: name if counts[name] == 1 else source for source, name in names.items()}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"
