"""The rule of effective size, on made-up scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from strata.errors import ConfigError, DataError
from strata.evals.effective_size import Baselines, effective_sizes, read_baselines

SMALL = {"arc": 40.0, "piqa": 60.0, "hella": 50.0, "flat": 30.0}
LARGE = {"arc": 44.0, "piqa": 64.0, "hella": 60.0, "flat": 30.0}
TREE: dict[str, Any] = {
    "small": {"name": "S", "scores": SMALL},
    "large": {"name": "L", "scores": LARGE},
}


@pytest.fixture
def baselines() -> Baselines:
    return Baselines.model_validate(TREE)


def test_one_task_can_carry_the_average(baselines: Baselines) -> None:
    without = {"arc": 41.0, "piqa": 61.0, "hella": 52.0, "unknown": 1.0}
    with_memory = {"arc": 42.0, "piqa": 60.0, "hella": 61.0, "unknown": 2.0}
    found = effective_sizes(without, with_memory, baselines)
    assert {name: one.share for name, one in found.per_task.items()} == {
        "arc": 0.25, "piqa": -0.25, "hella": 0.9,
    }  # fmt: skip
    assert found.all_tasks.gain == pytest.approx(3.0)
    assert found.all_tasks.share == pytest.approx(3.0 / 6.0)
    assert found.best == "hella" and found.left_out == ("unknown",)
    assert found.without_best is not None
    assert found.without_best.tasks == ("arc", "piqa")
    assert found.without_best.share == pytest.approx(0.0)
    assert json.loads(json.dumps(found.to_json()))["all_tasks"]["share"] == pytest.approx(0.5)


def test_the_published_average_gives_the_published_share() -> None:
    """2.51 points of memory, 4.91 from the smaller to the larger model: 51.1%."""
    tree = {
        "small": {"name": "S", "scores": {"a": 50}},
        "large": {"name": "L", "scores": {"a": 54.91}},
    }
    found = effective_sizes({"a": 60.80}, {"a": 63.31}, Baselines.model_validate(tree))
    assert found.all_tasks.share == pytest.approx(0.511, abs=5e-4)
    assert found.without_best is None


def test_no_step_between_the_dense_models_is_no_share(baselines: Baselines) -> None:
    found = effective_sizes({"flat": 30.0}, {"flat": 31.0}, baselines)
    assert found.all_tasks.share is None and found.all_tasks.gain == 1.0


def test_refused(baselines: Baselines, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task was measured and has a score of both S and L"):
        effective_sizes({"other": 1.0}, {"other": 2.0}, baselines)
    path = tmp_path / "baselines.json"
    with pytest.raises(DataError, match="cannot be read"):
        read_baselines(path)
    for text, error, message in (
        ("{", DataError, "is not JSON"),
        ("[]", ConfigError, "must be an object"),
        ('{"small": {"name": "S", "scores": {"a": 1}}}', ConfigError, "large is required"),
        (json.dumps(TREE | {"medium": 1}), ConfigError, "unknown key medium"),
        (json.dumps(TREE | {"small": {"name": "S", "scores": {}}}), ConfigError, "scores"),
        (json.dumps(TREE | {"small": {"name": "S", "scores": {"a": 0.4}}}), ConfigError, "percent"),
        (json.dumps(TREE | {"large": {"name": "L", "scores": {"a": 101}}}), ConfigError, "percent"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=message):
            read_baselines(path)
    path.write_text(json.dumps(TREE))
    assert read_baselines(path) == baselines
