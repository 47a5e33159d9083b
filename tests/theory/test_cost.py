"""The paper's constants, and what any shape and memory costs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from strata.errors import ConfigError
from strata.theory.cost import FORMATS, Costs, flops, operations
from strata.theory.setting import CostSetting, make_setting

PAPER = make_setting()


def costs(write: tuple[float, ...], read: tuple[float, ...]) -> Costs:
    return Costs("TFLOPs", np.array(write), np.array(read))


def test_the_papers_constants() -> None:
    """2.24, 0.308, 1.44e-4 and 0.624 TFLOPs; 0.494 and, unrounded, 13,388 uses."""
    tree = flops(PAPER).to_json()
    assert tree["write"]["parameters"] == pytest.approx(2.24, abs=0.005)
    assert tree["write"]["explicit"] == pytest.approx(0.308, abs=0.0005)
    assert tree["read"]["explicit"] == pytest.approx(1.44e-4, abs=0.005e-4)
    assert tree["read"]["text"] == pytest.approx(0.624, abs=0.0005)
    assert tree["write"]["text"] == tree["read"]["parameters"] == 0
    low, high = tree["crossovers"]
    assert f"{low:.3f}" == "0.494" and round(high) == 13_388
    # The paper's 13,400 has three figures; 13,400 is what its rounded constants give, too.
    assert f"{high:.3g}" == "1.34e+04" and f"{(2.24 - 0.308) / 1.44e-4:.3g}" == "1.34e+04"


def test_the_formulas_as_they_are_printed() -> None:
    """Written down again, with the paper's letters and its d for the attention's width."""
    L, H_kv, d_h, d, W, V, L_mem, r, m, c, T = 44, 8, 80, 3200, 3200, 60416, 22, 128, 8, 64, 2048
    done = operations(PAPER)
    project = 2 * d**2 + 2 * d * d_h * H_kv
    assert done.train == 6 * (L * (r * (project + 3 * d * W) + 2 * r * (T / 2) * d) + r * V * d)
    assert done.encode == 2 * (
        L_mem * (r * project + 2 * (r**2 / 2) * d) + (L_mem - 1) * (r * 3 * d * W)
        + L_mem * r**2 * d
    )  # fmt: skip
    assert done.read_explicit == 2 * L_mem * 2 * c * m * d
    assert done.prefill + done.read_text == 2 * (
        L * (r * project + 2 * r * (r / 2 + c) * d) + (L - 1) * r * 3 * d * W
    )


def test_lengths_are_taken_one_by_one() -> None:
    lengths = [16, 100, 128]
    together = flops(PAPER, lengths)
    assert together.write_m.shape == (3, 3)
    for at, length in enumerate(lengths):
        alone = flops(make_setting(overrides=[f"memory.reference_tokens={length}"]))
        np.testing.assert_allclose(together.write_m[:, at], alone.write_m)
        np.testing.assert_allclose(together.read_m[:, at], alone.read_m)
    # A reference of fewer tokens than a head keeps is read in full, and no more.
    assert flops(PAPER, 4).read_m[1] == flops(PAPER, 8).read_m[1] / 2


def test_other_memory_costs_other() -> None:
    def read(*overrides: str) -> float:
        return float(operations(make_setting(overrides=overrides)).read_explicit)

    whole = read()
    assert read("memory.tokens=16") == 2 * whole
    assert read("memory.num_layers=11") == whole / 2
    assert read("memory.num_heads=44") == pytest.approx(whole / 4)
    # One memory layer, the sixth of six: five layers below it are passed to encode.
    deep = make_setting(overrides=["memory.num_layers=1", "memory.depth=6"])
    flat = make_setting(overrides=["memory.num_layers=6"])
    gap = operations(flat).encode - operations(deep).encode
    assert gap == 2 * 5 * 128**2 * 3200  # the scores of five layers
    assert operations(deep).read_explicit == operations(flat).read_explicit / 6


def test_the_lower_envelope_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    uses = np.geomspace(1e-3, 1e6, 400)
    for _ in range(200):
        lines = costs(tuple(rng.exponential(1, 3)), tuple(rng.exponential(1, 3)))
        total = lines.total(uses)
        for at, count in enumerate(uses):
            cheapest = total[FORMATS.index(lines.cheapest(count)), at]
            assert cheapest == pytest.approx(total[:, at].min(), rel=1e-12)


@pytest.mark.parametrize(
    ("write", "read", "expected"),
    [
        ((2.0, 1.0, 0.0), (0.0, 0.1, 1.0), (1 / 0.9, 10.0)),
        ((2.0, 9.0, 0.0), (0.0, 0.1, 1.0), (2.0, 2.0)),  # explicit never
        ((2.0, 1.0, 0.0), (0.5, 0.1, 1.0), (1 / 0.9, math.inf)),  # parameters never
        ((2.0, 1.0, 0.0), (3.0, 2.0, 1.0), (math.inf, math.inf)),  # text always
        ((0.0, 1.0, 1.0), (0.0, 1.0, 1.0), (0.0, 0.0)),  # parameters always
    ],
)
def test_crossovers(
    write: tuple[float, ...], read: tuple[float, ...], expected: tuple[float, float]
) -> None:
    lines = costs(write, read)
    assert lines.crossovers == pytest.approx(expected)
    for at, number in zip(expected, lines.to_json()["crossovers"], strict=True):
        assert number == (None if at == math.inf else pytest.approx(at))


def test_no_uses_below_zero() -> None:
    with pytest.raises(ConfigError, match="-1 uses: give 0 or more"):
        flops(PAPER).cheapest(-1)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    from strata.theory.plot import save_plot

    lines = {
        "paper": flops(PAPER),
        "one format": costs((2.0, 1.0, 0.0), (3.0, 2.0, 1.0)),
        "free": costs((1.0, 0.5, 0.0), (0.0, 0.0, 0.0)),
    }
    for name, line in lines.items():
        save_plot(line, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_setting_is_immutable_and_round_trips() -> None:
    assert CostSetting.model_validate(PAPER.model_dump()) == PAPER
