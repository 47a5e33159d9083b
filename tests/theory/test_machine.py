"""Seconds, bytes and money from a profile whose numbers can be followed by hand."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from made_profile import profile

from strata.config import dump_yaml, load_config
from strata.errors import ConfigError, StorageError
from strata.theory.calibrate import calibrate, measure_disk
from strata.theory.cost import FORMATS, flops, operations
from strata.theory.machine import HardwareProfile, money, room, seconds, weights
from strata.theory.setting import make_setting

PAPER = make_setting()
EXPLICIT, TEXT = FORMATS.index("explicit"), FORMATS.index("text")


def test_bytes_of_the_papers_memory() -> None:
    """440 KiB in bf16 and 38.5 KiB in its code."""
    weigh = weights(PAPER)
    assert weigh.memory == 38.5 * 1024 and weigh.memory_open == 440 * 1024
    assert weigh.context == 128 * 2 * 44 * 8 * 80 * 2
    assert weigh.text == 128 * 4.5 and weigh.parameters == 128 * 3 / 2 * 2


def test_a_disk_and_memory_of_infinite_speed_leave_the_papers_costs() -> None:
    """At a TFLOP a second, TFLOPs are seconds."""
    time, count = seconds(PAPER, profile()), flops(PAPER)
    np.testing.assert_allclose(time.write_m, count.write_m, rtol=1e-6)
    np.testing.assert_allclose(time.read_m, count.read_m, rtol=1e-6)
    assert time.crossovers == pytest.approx(count.crossovers, rel=1e-6)


def test_what_each_rate_adds() -> None:
    base = seconds(PAPER, profile()).read_m
    stored, opened = 38.5 * 1024, 440 * 1024

    def more(**changes: float) -> list[float]:
        cached = changes.pop("cached", 0.0)
        return (seconds(PAPER, profile(**changes), cached=cached).read_m - base).tolist()

    assert more(disk_read_latency_s=1e-3) == pytest.approx([0, 1e-3, 1e-3])
    assert more(disk_read_latency_s=1e-3, cached=0.75) == pytest.approx([0, 2.5e-4, 2.5e-4])
    assert more(disk_read_bytes_per_s=1e6) == pytest.approx([0, stored / 1e6, 576 / 1e6])
    assert more(search_s=0.5) == pytest.approx([0, 0.1, 0.1])  # five found at once
    # From memory: opened once, then streamed for each of 64 tokens, beside what computing takes.
    computing = float(operations(PAPER).read_explicit) / 1e12
    streaming = 64 * opened / 1e9
    assert streaming > computing
    added = more(memory_bytes_per_s=1e9)[EXPLICIT]
    assert added == pytest.approx((stored + opened) / 1e9 + streaming - computing)


def test_writing_waits_for_the_disk() -> None:
    slow = seconds(PAPER, profile(disk_write_bytes_per_s=1e6)).write_m
    extra = slow - seconds(PAPER, profile()).write_m
    assert extra.tolist() == pytest.approx([0, 38.5 * 1024 / 1e6, 0])


def test_a_slow_disk_moves_the_crossovers() -> None:
    """Text is read from the disk too, but its read costs far more: only the upper one moves."""
    fast, slow = (seconds(PAPER, profile(disk_read_latency_s=at)).crossovers for at in (0.0, 10e-3))
    assert slow[0] == pytest.approx(fast[0], rel=1e-3)
    assert slow[1] == pytest.approx((2.2385000448 - 0.3081764864) / (1.441792e-4 + 10e-3))


def test_money_is_time_and_place() -> None:
    rates = profile(price_per_hour=3600.0, disk_price_per_gb_month=1e9, ram_price_per_gb_month=2e9)
    paid, time, weigh = money(PAPER, rates, months=2), seconds(PAPER, rates), weights(PAPER)
    assert paid.unit == "USD"
    np.testing.assert_allclose(paid.read_m, time.read_m)
    stored = [
        2 * weigh.text + 4 * weigh.parameters,
        2 * (weigh.text + weigh.memory),
        2 * weigh.text,
    ]
    np.testing.assert_allclose(paid.write_m, time.write_m + np.stack(stored))
    # Storing alone: explicit memory is dearer to keep than text, so text is cheapest for longer.
    assert paid.crossovers[0] > time.crossovers[0]
    with pytest.raises(ConfigError, match="no prices"):
        money(PAPER, profile(), months=1)
    with pytest.raises(ConfigError, match="months: give 0 or more"):
        money(PAPER, rates, months=math.nan)


def test_how_much_a_machine_holds() -> None:
    holds = room(PAPER, profile())
    assert holds["parameters"] == pytest.approx(1e9 / 384)
    assert holds["explicit"] == pytest.approx(1e12 / (38.5 * 1024 + 576))
    assert holds["text"] == pytest.approx(1e12 / 576)


def test_a_share_is_between_0_and_1() -> None:
    with pytest.raises(ConfigError, match="give a share between 0 and 1"):
        seconds(PAPER, profile(), cached=1.5)


def test_calibrating_gives_a_profile_that_round_trips(tmp_path: Path) -> None:
    said: list[str] = []
    made = calibrate(
        tmp_path, device=torch.device("cpu"), rounds=1, file_bytes=4 * 2**20, say=said.append
    )
    assert 1e8 < made.matmul_flops_per_s < 1e15 and 1e8 < made.memory_bytes_per_s < 1e13
    assert 0 <= made.disk_read_latency_s < 1 and made.disk_read_bytes_per_s > 1e5
    assert made.disk_write_bytes_per_s > 1e5 and made.disk_bytes > 0 and made.ram_bytes > 0
    assert said == ["matrix products", "memory", "disk"]
    assert os.listdir(tmp_path) == []  # the measured file is gone
    (tmp_path / "profile.yaml").write_text(dump_yaml(made))
    assert load_config(HardwareProfile, tmp_path / "profile.yaml") == made


def test_a_disk_without_direct_reads_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    assert measure_disk(tmp_path, file_bytes=2 * 2**20).cached


def test_calibrating_refuses(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match="rounds 0: give 1 or more"):
        calibrate(tmp_path, device=cpu, rounds=0)
    with pytest.raises(ConfigError, match="a file of 5 bytes"):
        calibrate(tmp_path, device=cpu, file_bytes=5)
    with pytest.raises(StorageError, match="no folder"):
        measure_disk(tmp_path / "missing")
    with pytest.raises(StorageError, match="MiB free"):
        measure_disk(tmp_path, file_bytes=2**60)
