"""Metrics: one line a step whatever happens, and three views of it."""

from __future__ import annotations

import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strata.errors import ConfigError
from strata.train import Recipe, train
from strata.train.metrics import (
    MetricsFile,
    TensorBoardSink,
    Terminal,
    WandbSink,
    duration,
    flatten,
    read_metrics,
)

MakeRecipe = Callable[..., Recipe]
RECORD = {"step": 5, "loss": 2.5, "lr": 1e-3, "tokens_per_s": 1234.5, "tokens": 640}
HEALTH = {"layers.1.mlp": {"rows_used": 0.25, "entropy": 0.5}}


def write_steps(run_dir: Path, *steps: int, after_step: int = 0) -> None:
    file = MetricsFile(run_dir, after_step=after_step)
    for step in steps:
        file.write({**RECORD, "step": step})
    file.close()


def steps(run_dir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run_dir)]


def test_resumption_drops_later_lines(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    write_steps(tmp_path, 3, 4, 5, after_step=2)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tail", [b'{"step": 5, "lo', b"\xff\xfe\n", b"[]\n", b"\n", b"{}\n"])
def test_a_damaged_tail_is_dropped(tmp_path: Path, tail: bytes) -> None:
    write_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert steps(tmp_path) == [1, 2]
    write_steps(tmp_path, 3, after_step=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path, after_step=0)
    file.write({"step": 1, "loss": float("nan"), "health": {"a": {"entropy": float("inf")}}})
    file.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "health": {"a": {"entropy": None}},
    }


def test_no_run_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    terminal = Terminal("tiny", num_steps=10, start_step=0, stream=stream)
    terminal.start()
    terminal.write({**RECORD, "validation_loss": 2.75, "health": HEALTH})
    terminal.say("SIGTERM: saved")
    terminal.close()
    first, second = stream.getvalue().splitlines()
    assert first.startswith(
        "step 5/10  loss 2.5000  validation 2.7500  lr 1.00e-03  1,234 tokens/s"
    )
    assert "rows used 25.0%" in first and "eta 0:00:00" in first
    assert second == "SIGTERM: saved"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    stream = io.StringIO()
    terminal = Terminal("tiny", num_steps=10, start_step=2, stream=stream)
    terminal.start()
    terminal.advance(5)
    terminal.write(RECORD)
    terminal.say("hello [there]")
    terminal.close()
    assert "5/10" in stream.getvalue() and "loss 2.5000" in stream.getvalue()
    assert "hello [there]" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_flatten() -> None:
    assert flatten({"a": 1, "b": {"c": {"d": 2}}}) == {"a": 1, "b/c/d": 2}


def test_tensorboard_holds_the_numbers(tiny_recipe: MakeRecipe) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    recipe = tiny_recipe("run.tensorboard=true")
    train(recipe, progress=False)
    events = event_accumulator.EventAccumulator(str(recipe.run_dir / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(record["step"], record["loss"]) for record in read_metrics(recipe.run_dir)]
    assert losses == [(step, pytest.approx(loss)) for step, loss in expected]
    assert any(tag.startswith("health/") for tag in events.Tags()["scalars"])


def test_tensorboard_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard is not installed: pip install"):
        TensorBoardSink(tmp_path, after_step=0)


def test_wandb_missing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb is not installed: pip install wandb"):
        WandbSink(tmp_path, project="p", name="n", config={})


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[dict[str, Any]] = []
    logged: list[tuple[dict[str, Any], int]] = []

    class FakeRun:
        def log(self, numbers: dict[str, Any], step: int) -> None:
            logged.append((numbers, step))

        def finish(self) -> None:
            pass

    fake: Any = types.ModuleType("wandb")
    fake.util = types.SimpleNamespace(generate_id=lambda: "abc123")

    def init(**fields: Any) -> FakeRun:
        opened.append(fields)
        return FakeRun()

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        sink = WandbSink(tmp_path, project="p", name="n", config={"seed": 1})
        sink.write({**RECORD, "health": HEALTH})
        sink.close()
    assert [fields["id"] for fields in opened] == ["abc123", "abc123"]
    assert logged[0][1] == 5 and logged[0][0]["health/layers.1.mlp/rows_used"] == 0.25
