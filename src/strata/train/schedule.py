"""The learning-rate schedule: one pure function of the step, for dense part and values alike.

A schedule gives a factor; each optimizer multiplies its own peak rate by it, so that the value
tables (1e-3 in the published recipe) and the dense part (1e-4) rise and fall together.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from strata.config import FrozenConfig

DEFAULT_DECAY_FRACTION = 0.2


class ScheduleConfig(FrozenConfig):
    """How the learning rate moves over a run.

    Attributes:
        kind: `linear` and `cosine` fall from the end of the warmup to the end of the run; `wsd`
            (warmup, stable, decay) stays at the peak and falls linearly over its last steps.
        warmup_steps: updates over which the rate rises linearly to its peak.
        min_ratio: the factor the rate falls to at the end of the run, 0..1.
        decay_steps: `wsd` only: length of the fall in updates.
        decay_fraction: `wsd` only: the same as a share of the run, 0..1; 0.2 if neither is given.
    """

    kind: Literal["linear", "cosine", "wsd"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    min_ratio: float = Field(default=0.01, ge=0.0, le=1.0)
    decay_steps: int | None = Field(default=None, ge=1)
    decay_fraction: float | None = Field(default=None, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _decay_belongs_to_wsd(self) -> ScheduleConfig:
        if self.kind != "wsd" and (self.decay_steps or self.decay_fraction):
            raise ValueError(
                f"decay_steps and decay_fraction belong to kind wsd, not to {self.kind}: "
                "drop them or set kind=wsd"
            )
        if self.decay_steps is not None and self.decay_fraction is not None:
            raise ValueError("give decay_steps or decay_fraction, not both")
        return self

    def num_decay_steps(self, num_steps: int) -> int:
        """Length of the fall in updates, in a run of `num_steps` updates."""
        if self.kind != "wsd":
            return num_steps - self.warmup_steps
        if self.decay_steps is not None:
            return self.decay_steps
        return max(1, round((self.decay_fraction or DEFAULT_DECAY_FRACTION) * num_steps))


def learning_rate_factor(config: ScheduleConfig, *, step: int, num_steps: int) -> float:
    """The factor on the peak learning rate for one update.

    Args:
        config: the schedule.
        step: the update about to be made, 1..num_steps.
        num_steps: updates in the whole run.

    Returns:
        A factor in 0..1. The first update of a warmup is above 0 and the last update of the run
        just above `min_ratio`, so that no update is wasted on a rate of 0.

    Source: linear and cosine as everywhere; wsd is MiniCPM (arXiv 2404.06395), section 4.
    """
    updates_done = step - 1
    if updates_done < config.warmup_steps:
        return step / config.warmup_steps
    num_decay_steps = config.num_decay_steps(num_steps)
    progress = (updates_done - (num_steps - num_decay_steps)) / num_decay_steps
    if progress <= 0.0:
        return 1.0
    if config.kind == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        remaining = 1.0 - progress
    return config.min_ratio + (1.0 - config.min_ratio) * remaining
