"""How much larger a model without memory would have to be: the rule of "Memory3".

Its authors divide what memory gains by what a larger dense model gains over a smaller one:
(with - without) / (large - small), 1 being the whole step from the one to the other. One task can
carry such an average, so each task is given too, and the average without the one that gained most.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from strata.config import FrozenConfig, validate
from strata.errors import ConfigError, DataError

_MAX_BYTES = 1 << 20


class Dense(FrozenConfig):
    """A dense model's published scores.

    Attributes:
        name: of the model.
        scores: in percent, by the names of our tasks.
    """

    name: str
    scores: dict[str, float] = Field(min_length=1)


class Baselines(FrozenConfig):
    """Two dense models of one family.

    Attributes:
        small, large: the smaller and the larger one.
        source: where the scores were published.
    """

    small: Dense
    large: Dense
    source: str = ""


@dataclass(frozen=True)
class EffectiveSize:
    """The rule, applied to some tasks.

    Attributes:
        tasks: averaged over.
        without, with_memory: the model's scores, percent.
        small, large: the dense models' scores, percent.
        gain: with_memory - without.
        share: gain / (large - small); None where the larger model is not better.
    """

    tasks: tuple[str, ...]
    without: float
    with_memory: float
    small: float
    large: float

    @property
    def gain(self) -> float:
        return self.with_memory - self.without

    @property
    def share(self) -> float | None:
        step = self.large - self.small
        return self.gain / step if step > 0 else None

    def to_json(self) -> dict[str, Any]:
        """A mapping that the json module can write."""
        return {
            "tasks": list(self.tasks), "without": self.without, "with": self.with_memory,
            "small": self.small, "large": self.large, "gain": self.gain, "share": self.share,
        }  # fmt: skip


@dataclass(frozen=True)
class EffectiveSizes:
    """The rule, task by task and averaged.

    Attributes:
        per_task: by task.
        all_tasks: over all of them.
        best: the task that memory gains most on.
        without_best: over the others; None where there is no other.
        left_out: tasks that were measured and have no score of both dense models.
    """

    per_task: Mapping[str, EffectiveSize]
    all_tasks: EffectiveSize
    best: str
    without_best: EffectiveSize | None
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A mapping that the json module can write."""
        others = self.without_best
        return {
            "per_task": {name: one.to_json() for name, one in self.per_task.items()},
            "all_tasks": self.all_tasks.to_json(),
            "best": self.best,
            "without_best": None if others is None else others.to_json(),
            "left_out": list(self.left_out),
        }


def effective_sizes(
    without: Mapping[str, float], with_memory: Mapping[str, float], baselines: Baselines
) -> EffectiveSizes:
    """Apply the rule to tasks that were measured with and without memory.

    Args:
        without: scores in percent by task, no memory.
        with_memory: of the same model with memory.
        baselines: of two dense models, measured the same way.

    Raises:
        ConfigError: no task has all four scores.

    Source: "Memory3" (arXiv 2407.01178), section 7: 2.51 points over the 4.91 from Llama 2 7B to
    13B, "51.1%".
    """
    measured = [name for name in without if name in with_memory]
    small, large = baselines.small.scores, baselines.large.scores
    tasks = [name for name in measured if name in small and name in large]
    if not tasks:
        raise ConfigError(
            f"no task was measured and has a score of both {baselines.small.name} and "
            f"{baselines.large.name}: measured are {', '.join(measured) or 'none'}"
        )

    def over(names: Sequence[str]) -> EffectiveSize:
        means = [
            sum(scores[name] for name in names) / len(names)
            for scores in (without, with_memory, small, large)
        ]
        return EffectiveSize(tuple(names), *means)

    per_task = {name: over([name]) for name in tasks}
    best = max(tasks, key=lambda name: per_task[name].gain)
    others = [name for name in tasks if name != best]
    return EffectiveSizes(
        per_task=per_task,
        all_tasks=over(tasks),
        best=best,
        without_best=over(others) if others else None,
        left_out=tuple(name for name in measured if name not in per_task),
    )


def read_baselines(path: Path) -> Baselines:
    """Two dense models' scores from a JSON file.

    Raises:
        DataError: no such file, or not JSON.
        ConfigError: a key is missing or unknown, or scores are not in percent.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than 1 MiB: give two models' scores")
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be an object with small and large")
    found = validate(Baselines, tree, origin=str(path))
    for one in (found.small, found.large):
        values = one.scores.values()
        if not all(0 <= value <= 100 for value in values) or max(values) <= 1:
            raise ConfigError(f"{path}: scores of {one.name} must be in percent, 0 to 100")
    return found
