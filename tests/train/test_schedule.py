"""The schedule is a pure function of the step; its values are checked by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from strata.train.schedule import ScheduleConfig, learning_rate_factor


def factors(config: ScheduleConfig, num_steps: int) -> list[float]:
    return [
        learning_rate_factor(config, step=step, num_steps=num_steps)
        for step in range(1, num_steps + 1)
    ]


def test_linear() -> None:
    config = ScheduleConfig(kind="linear", warmup_steps=4, min_ratio=0.0)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(config, 8) == pytest.approx(expected)


def test_linear_falls_towards_min_ratio() -> None:
    config = ScheduleConfig(kind="linear", min_ratio=0.01)
    values = factors(config, 1000)
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.01 + 0.99 / 1000)


def test_cosine() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=1, min_ratio=0.1)
    # cos at 0, 1/4, 1/2, 3/4 of the way: 1, .854, .5, .146 of the distance to the floor.
    expected = [1.0, 1.0, 0.86820, 0.55, 0.23180]
    assert factors(config, 5) == pytest.approx(expected, abs=1e-4)


def test_wsd_holds_then_falls() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.0)
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert factors(config, 10) == pytest.approx(expected)


def test_wsd_fraction_equals_steps() -> None:
    by_steps = ScheduleConfig(kind="wsd", warmup_steps=3, decay_steps=10)
    by_fraction = ScheduleConfig(kind="wsd", warmup_steps=3, decay_fraction=0.2)
    by_default = ScheduleConfig(kind="wsd", warmup_steps=3)
    assert factors(by_steps, 50) == factors(by_fraction, 50) == factors(by_default, 50)


@given(
    kind=st.sampled_from(["linear", "cosine", "wsd"]),
    num_steps=st.integers(1, 200),
    warmup_share=st.floats(0, 0.5),
    min_ratio=st.floats(0, 1),
)
def test_rises_then_never_rises_again(
    kind: str, num_steps: int, warmup_share: float, min_ratio: float
) -> None:
    warmup = int(warmup_share * num_steps)
    config = ScheduleConfig.model_validate(
        {"kind": kind, "warmup_steps": warmup, "min_ratio": min_ratio}
    )
    values = factors(config, num_steps)
    assert all(0 < value <= 1 for value in values[:warmup])
    assert values[:warmup] == sorted(values[:warmup])
    assert all(min_ratio - 1e-9 <= value <= 1 for value in values[warmup:])
    falling = values[warmup:]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(falling))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "linear", "decay_steps": 5}, "belong to kind wsd"),
        ({"kind": "wsd", "decay_steps": 5, "decay_fraction": 0.5}, "not both"),
        ({"kind": "step"}, "kind"),
        ({"min_ratio": 1.5}, "min_ratio"),
        ({"warmup_steps": -1}, "warmup_steps"),
    ],
)
def test_refuses(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig.model_validate(fields)
