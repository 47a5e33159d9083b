"""`strata bench train`, made tiny: three contestants, and ratios of what was measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch

from strata.bench.report import train_table
from strata.bench.train import TrainResult, bare_loop
from strata.cli import main as command_line
from strata.train.recipe import Recipe


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["strata", "bench", "train", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    return int(end.value.code or 0)


def test_json_has_rates_and_their_ratios(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_quickstart: tuple[str, ...],
) -> None:
    assert run([*tiny_quickstart, "--rounds", "2", "--json"], monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        "tokens_per_s",
        "flops_per_token",
        "memory_over_dense",
        "strata_over_bare",
    }
    rates = result["tokens_per_s"]
    assert set(rates) == {"memory", "dense", "bare"} and all(rate > 0 for rate in rates.values())
    assert result["memory_over_dense"] == rates["memory"] / rates["dense"]
    assert result["strata_over_bare"] == rates["memory"] / rates["bare"]
    assert set(result["flops_per_token"]) == {"memory", "dense"}


def test_the_table_says_what_each_ratio_is(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_quickstart: tuple[str, ...],
) -> None:
    assert run([*tiny_quickstart, "--rounds", "1"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for words in ("tokens/s", "of dense", "of the bare loop", "logits at every position"):
        assert words in " ".join(shown.split())


def test_ratios_stand_in_the_column_they_belong_to() -> None:
    rates = {"memory": 3000.0, "dense": 4000.0, "bare": 2000.0}
    result = TrainResult(rates, {"memory": 1, "dense": 1})
    table = train_table(result, device=torch.device("cpu")).renderables[0]
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["tokens/s"] == ["3,000", "4,000", "2,000"]
    assert cells["of dense"] == ["0.75", "1.00", ""]
    assert cells["of the bare loop"] == ["1.50", "", "1.00"]


def test_the_bare_loop_learns(tiny_recipe: Callable[..., Recipe]) -> None:
    """It is a training loop that works, not a strawman: the loss falls."""
    losses = bare_loop(tiny_recipe("run.precision=fp32"), torch.device("cpu"))
    found = [next(losses) for _ in range(30)]
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rounds", "0"], "--rounds 0 is not allowed: give 1 or more"),
        (["memory.top_q=3"], "memory.top_q"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(arguments, monkeypatch) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and error.startswith("strata: error: ") and "\n" not in error
