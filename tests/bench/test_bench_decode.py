"""`strata bench decode` times every storage at every batch, and its cold contestant is cold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from strata.bench import decode as bench
from strata.bench.decode import COLD, IN_MEMORY, SIZES, WARM
from strata.bench.timing import race
from strata.cli import main as command_line
from strata.layers import MappedTable, memory_layers

CPU = torch.device("cpu")


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["strata", "bench", "decode", *arguments])
    with pytest.raises(SystemExit) as end:
        command_line.main()
    return int(end.value.code or 0)


def test_json_has_every_storage_at_every_batch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--size", "small", "--rounds", "2", "--json"], monkeypatch) == 0
    results = json.loads(capsys.readouterr().out)
    contestants = [*IN_MEMORY, WARM, COLD]
    assert [(r["batch"], r["storage"]) for r in results] == [
        (batch, name) for batch in SIZES["small"].batches for name in contestants
    ]
    for result in results:
        assert 0 < result["memory_ms"] < result["step_ms"]
        assert result["memory_share"] == result["memory_ms"] / result["step_ms"]
        assert (result["memory_over_float32"] == 1) == (result["storage"] == "float32")


def test_the_table_names_every_storage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["--size", "small", "--rounds", "1"], monkeypatch) == 0
    shown = capsys.readouterr().out
    for name in (*IN_MEMORY, WARM, COLD):
        assert name in shown


def test_contestants_answer_alike_and_differ_in_what_they_read(tmp_path: Path) -> None:
    size = SIZES["small"]
    model = bench._decoder(size).eval()
    tables = bench._tables(model, tmp_path, size, lambda text: None)
    ids = torch.randint(0, size.vocab_size, (2, 12))
    hidden = torch.randn(50, size.width)  # one layer: in the next, other rows would be picked
    answers, logits = {}, {}
    for name, table in tables.items():
        for _, layer in memory_layers(model):
            layer.use_tables([table])
        with torch.no_grad():
            answers[name], logits[name] = layer(hidden), model(ids).logits
    largest = answers["float32"].abs().max()
    allowed = {"bfloat16": 0.005, "int8": 0.01, "fp8": 0.05}  # mantissas of 8, 7 and 4 bits
    for name, limit in allowed.items():
        assert 0 < float((answers[name] - answers["float32"]).abs().max() / largest) < limit
    for name in (WARM, COLD):
        assert torch.equal(logits[name], logits["float32"])
    warm, cold = tables[WARM], tables[COLD]
    assert isinstance(warm, MappedTable) and isinstance(cold, MappedTable)
    misses = cold.counts.misses
    cold.forget()
    with torch.no_grad():
        layer(hidden)
        model(ids)
    assert cold.counts.misses == 2 * misses == 2 * warm.counts.misses > 0


def test_preparing_is_not_timed() -> None:
    import time

    contestants = {"idle": lambda: None, "prepared": lambda: None}
    times_ms = race(
        contestants, rounds=3, device=CPU, prepare={"prepared": lambda: time.sleep(0.02)}
    )
    assert times_ms["prepared"] < 10


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--size", "huge"], "no size 'huge': give one of small, full"),
        (["--rounds", "0"], "--rounds 0 is not allowed: give 1 or more"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: list[str],
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(arguments, monkeypatch) == 2
    assert capsys.readouterr().err.strip() == f"strata: error: {wanted}"
