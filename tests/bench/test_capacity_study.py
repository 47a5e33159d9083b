"""The study of capacity: arms that may be compared, runs that go on, and what is made of them."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strata.data.facts.biographies import NUM_TOLD, Biographies, vocabulary
from strata.errors import ConfigError, DivergenceError

FOLDER = Path(__file__).parents[2] / "benchmarks"
# Six people, who are told in two steps ten times and in a few thirty times.
SMALL = ("people=6", "name_words=[6, 6, 6]", "asked=4", "precision=fp32", "batch_size=4")
VOCAB_SIZE = 1600

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def modules() -> Any:
    """The scripts, by their names."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        import capacity_arms
        import capacity_study
        import capacity_tables
    finally:
        sys.path[:] = before
    return SimpleNamespace(arms=capacity_arms, study=capacity_study, tables=capacity_tables)


@pytest.fixture
def main(modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    monkeypatch.setattr(modules.study, "keep_freed_memory", lambda: True)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["capacity_study.py", *map(str, arguments)])
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as caught:
            modules.study.main()
        torch.set_num_threads(threads)
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


# The arms


def test_arms_have_the_flops_and_parameters_that_they_are_compared_by(modules: Any) -> None:
    arms = modules.arms.ARMS
    shape = modules.arms.Shape()
    sized = {name: arm.sized(shape, VOCAB_SIZE) for name, arm in arms.items()}
    dense, plus = sized["dense"][1], sized["memory_plus"][1]
    for name, (model, counts) in sized.items():
        flops = counts.flops_per_token / dense.flops_per_token
        if name == "dense_params":
            assert counts.params_total == pytest.approx(plus.params_total, rel=0.005)
            assert flops > 4
        else:
            times = 4 if name == "dense_4x" else 1
            assert flops == pytest.approx(times, rel=0.005), name
        assert counts.params_active == pytest.approx(counts.flops_per_token / 2, rel=0.1), (
            name
        )  # nothing is hidden in what a token does not use
        assert model.host is not None and model.host["intermediate_size"] >= 16
    assert sized["dense"][0].host["intermediate_size"] == shape.intermediate
    for name in ("moe", "peer", "memory", "own_small_tables", "peer_layers"):
        total = sized[name][1].params_total
        assert total == pytest.approx(plus.params_total, rel=0.05), name


def test_arms_are_what_they_are_called(modules: Any) -> None:
    arms, studies, shape = modules.arms.ARMS, modules.arms.STUDIES, modules.arms.Shape()
    rows = [arms[name].memory_config(shape).num_rows for name in studies["rows"].values()]
    assert [round(math.log2(n), 1) for n in rows] == [12, 13, 14, 15, 16, 17, 18]
    assert [label.replace(",", "") for label in studies["rows"]] == [str(n) for n in rows]
    told = {label: arms[name].exposures for label, name in studies["exposures"].items()}
    assert all(label.endswith(f", {times}") for label, times in told.items()) and len(told) == 15
    plus, memory = (arms[name].memory_config(shape) for name in ("memory_plus", "memory"))
    assert plus.gate == "silu" and plus.query_norm == plus.key_norm == "rms"
    assert memory.gate == memory.query_norm == "none" and len(memory.layers) == 1
    assert not arms["own_tables"].memory_config(shape).share_values
    assert len({repr(arm) for arm in arms.values()}) == len(arms)
    assert {name for study in studies.values() for name in study.values()} == set(arms)
    assert set(modules.arms.QUICK) <= set(arms)
    for study, order in modules.tables.PUBLISHED.items():
        assert set(order) <= set(studies[study])


def test_what_cannot_be_sized_is_refused(modules: Any) -> None:
    huge = modules.arms.Arm("huge", memory={"num_half_keys": 4096})
    with pytest.raises(ConfigError, match=r"flops_per_token .* is less than the rest"):
        huge.sized(modules.arms.Shape(), VOCAB_SIZE)


# Runs


def test_from_people_to_pictures(
    main: Main, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--out", tmp_path, "--workers", 1, "--only", "dense_10,memory_plus_10", *SMALL)
    code, printed, err = main(*command, "--seeds", "0,1")
    assert code == 0, err
    assert "memory_plus_10, seed 1: " in printed and f"wrote {tmp_path / 'results.md'}" in printed
    tree = json.loads((tmp_path / "arms/memory_plus_10/seed1/result.json").read_text())
    assert tree["num_rows"] == 65_536 and tree["exposures"] == 10 and tree["asked"] == 4
    assert tree["bits"] == pytest.approx(6 * sum(tree["bits_a_person"].values()))
    # Each fact is told ten times: the padding of rows and of the last step is on top.
    people = Biographies(6, seed=1, name_words=(6, 6, 6))
    words = [len(re.sub("[?:]", " ?", s.prompt + s.completion).split())
             for s in people.statements()]  # fmt: skip
    told = 10 / NUM_TOLD * sum(1 + count for count in words)
    assert told <= tree["tokens"] <= 1.2 * told + 4 * 64
    assert tree["settings"]["model.host.vocab_size"] == 4 + len(vocabulary((6, 6, 6)))
    assert not list(tmp_path.glob("arms/*/*/run/model")) and not list(
        tmp_path.glob("arms/*/*/run/checkpoints")
    )
    report = json.loads((tmp_path / "results.json").read_text())
    assert len(report["runs"]) == 4 and "memory_plus, 10" in report["tables"]["exposures"]
    assert report["settings"]["people"] == "6" and len(report["commands"]) == 1
    assert (tmp_path / "exposures.png").read_bytes().startswith(b"\x89PNG")

    # What is done is skipped, and other settings are refused.
    monkeypatch.setattr(modules.study, "train", None)
    code, printed, err = main(*command, "--seeds", "0,1")
    assert code == 0, err
    assert json.loads((tmp_path / "results.json").read_text()) == report
    code, _, err = main(*command, "--seeds", "0", "lr=0.5")
    assert code == 2 and "was begun with settings.optim.lr 0.003, now it is 0.5" in err
    assert err.count("\n") == 1


def test_interrupted_it_ends_with_the_same_numbers(
    main: Main, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--workers", 1, "--only", "memory_plus_10", "--seeds", "3", "--no-tables",
               "checkpoint_every=1", *SMALL)  # fmt: skip
    assert main("--out", tmp_path / "whole", *command)[0] == 0
    code, printed, _ = main("--out", tmp_path / "cut", *command, "--for-minutes", "1e-9")
    assert code == 75 and "time: stopped, run the same command to go on" in printed
    whole_train = modules.study.train

    def one_step(recipe: Any, **given: Any) -> Any:
        stop = lambda event: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
        return whole_train(recipe, progress=False, on_step=stop)

    monkeypatch.setattr(modules.study, "train", one_step)
    for _ in range(2):
        code, printed, _ = main("--out", tmp_path / "cut", *command)
        assert code == 75 and "SIGTERM: stopped" in printed
    monkeypatch.setattr(modules.study, "train", whole_train)
    assert list(tmp_path.glob("cut/arms/*/*/run/checkpoints/*"))
    assert main("--out", tmp_path / "cut", *command)[0] == 0
    found = [json.loads((tmp_path / name / "arms/memory_plus_10/seed3/result.json").read_text())
             for name in ("whole", "cut")]  # fmt: skip
    for key in ("bits", "bits_a_person", "loss", "steps", "settings", "data_sha256"):
        assert found[0][key] == found[1][key], key


def pretend(modules: Any, monkeypatch: pytest.MonkeyPatch, code: Callable[[str], str]) -> list[str]:
    """Children that run a line of Python each; the arms and seeds that were begun."""
    begun: list[str] = []

    def command(arm: Any, seed: int, options: Any) -> list[str]:
        begun.append(f"{arm.name} {seed}")
        return [sys.executable, "-S", "-c", code(f"{arm.name} {seed}")]

    monkeypatch.setattr(modules.study, "child_command", command)
    return begun


def test_two_workers_go_through_all_runs_and_say_what_failed(
    main: Main, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = pretend(
        modules, monkeypatch, lambda name: f"import sys; sys.exit({int(name == 'moe_10 1')})"
    )
    arms = ("dense_10", "moe_10", "memory_plus_10")
    code, _, err = main("--out", tmp_path, "--only", ",".join(arms), "--seeds", "1,0", *SMALL)
    assert code == 1 and "moe_10, seed 1 failed, its error stands above" in err
    assert set(begun[:3]) == {f"{name} 1" for name in arms} and len(begun) == 6


def test_a_signal_ends_the_runs_under_way(
    main: Main, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child asks the study to stop: it and the other end, and no third begins."""
    stop = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    begun = pretend(modules, monkeypatch, lambda name: stop)
    begin_s = time.monotonic()
    names = "dense_10,moe_10,memory_plus_10,peer_10"
    code, printed, _ = main("--out", tmp_path, "--only", names, "--seeds", "0", *SMALL)
    assert code == 75 and "SIGTERM: stopped, run the same command to go on" in printed
    assert 1 <= len(begun) <= 2 and time.monotonic() - begin_s < 30


def test_a_run_that_diverges_does_not_keep_others_from_running(
    main: Main, modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run_arm(arm: Any, *given: Any, **more: Any) -> None:
        ran.append(arm.name)
        raise DivergenceError("loss is nan at step 3")

    monkeypatch.setattr(modules.study, "run_arm", run_arm)
    code, _, err = main("--out", tmp_path, "--workers", 1, "--only", "gate", "--seeds", "0", *SMALL)
    assert code == 1 and len(ran) == 4 and err.count("error: loss is nan at step 3") == 4


def test_wrong_input_is_one_line(main: Main, tmp_path: Path) -> None:
    for given, said in (
        (("--only", "smell"), "--only smell: give some of architectures, exposures, rows"),
        (("--seeds", "a"), "--seeds a: give numbers with commas"),
        (("--workers", "0"), "--workers 0: give 1 or more"),
        (("--for-minutes", "nan"), "--for-minutes nan: give more than 0"),
        (("people=0",), "people"),
        (("peeple=3",), "peeple"),
        (("people=10", "name_words=[2, 2, 2]", "--only", "dense"), "10 people with 2 x 2 x 2"),
    ):
        code, printed, err = main("--out", tmp_path, "--workers", 1, *given)
        assert code == 2 and not printed
        assert said in err and err.count("\n") == 1, err


# What is made of the numbers


def result(modules: Any, arm: str, seed: int, bits: float) -> Any:
    counts = {"params_total": 1000, "flops_per_token": 200, "params_active": 50}
    found = modules.arms.ARMS[arm]
    memory = found.memory_config(modules.arms.Shape())
    return modules.tables.Result.of({
        "arm": arm, "seed": seed, "exposures": found.exposures, "bits": bits, "share": bits / 9000,
        "num_rows": 0 if memory is None else memory.num_rows, "tokens": 1, "train_s": 2.0,
        "counts": counts,
    })  # fmt: skip


def runs_of(modules: Any, **bits: list[float]) -> dict[str, list[Any]]:
    return {
        arm: [result(modules, arm, seed, x) for seed, x in enumerate(values)]
        for arm, values in bits.items()
    }


def test_intervals_are_student_s(modules: Any) -> None:
    found = modules.tables.Interval.of([1.0, 2.0, 3.0])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert modules.tables.Interval.of([5.0]).as_dict() == {
        "mean": 5.0, "low": None, "high": None, "seeds": 1,
    }  # fmt: skip
    ratios = modules.tables.Interval.of_ratios([2.0, 4.0, 8.0])
    assert ratios.mean == pytest.approx(4.0)
    assert ratios.low * ratios.high == pytest.approx(16.0)


@pytest.mark.parametrize(
    ("plus", "verdict"),
    [
        ([400.0, 410.0, 390.0], "shown"),
        ([310.0, 500.0, 280.0], "on average, the interval reaches below"),
        ([290.0, 310.0, 250.0], "not shown, the interval reaches it"),
        ([110.0, 111.0, 112.0], "refuted"),
        ([400.0, 400.0], "so far (2 of 3 seeds)"),
        ([200.0], "not so far (1 of 3 seeds)"),
        ([], "not measured"),
    ],
)
def test_claims_are_judged_by_their_intervals(
    modules: Any, plus: list[float], verdict: str
) -> None:
    runs = runs_of(modules, dense=[100.0, 102.0, 98.0], memory_plus=plus)
    assert modules.tables.claims(runs)[0]["verdict"] == verdict


def test_ratios_are_of_the_same_seed(modules: Any) -> None:
    runs = runs_of(modules, dense=[100.0, 10.0, 0.0], memory_plus=[300.0, 30.0, 40.0])
    found = modules.tables.ratio(runs, "memory_plus", "dense")
    assert (found.mean, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))
    assert found.count == 2  # who learned nothing is no measure


def test_who_wins_is_said(modules: Any) -> None:
    runs = runs_of(
        modules, memory_plus=[100.0, 101.0, 99.0], peer=[150.0, 149.0, 151.0],
        moe=[60.0, 61.0, 60.0], memory=[90.0, 130.0, 95.0],
    )  # fmt: skip
    moe, peer, memory = modules.tables.rivals(runs)
    assert moe.startswith("30 exposures: **Memory+**; MoE learns 0.60")
    assert peer.startswith("30 exposures: **PEER**; PEER learns 1.50")
    assert memory.startswith("30 exposures: **Memory, not surely**")


def test_published_orders_are_compared_pair_by_pair(modules: Any) -> None:
    runs = runs_of(
        modules, one_layer=[10.0, 11.0, 10.0], spread_layers=[30.0, 31.0, 30.0],
        memory_plus=[50.0, 51.0, 50.0], one_layer_no_gate=[9.0, 10.0, 11.0],
    )  # fmt: skip
    found = {row["published"]: row["verdict"] for row in modules.tables.orders(runs)}
    assert found == {
        "spread > all but the first": "disagrees",
        "spread > one layer": "agrees",
        "all but the first > one layer": "agrees",
        "one layer, gate > one layer, none": "agrees, not surely",
    }


def test_curves_are_found_again(modules: Any) -> None:
    rows = [n * n for n in modules.arms.ROW_STEPS]
    fits = modules.tables.fit_rows(rows, [3.0 * n**0.25 for n in rows])
    assert fits[0].law == "power" and fits[0].num_sizes == 7
    assert (fits[0].scale, fits[0].slope, fits[0].r2) == pytest.approx((3.0, 0.25, 1.0))
    assert fits[0].at(2**20) == pytest.approx(96.0)
    fits = modules.tables.fit_rows(rows, [100.0 + 7 * math.log2(n) for n in rows])
    assert fits[0].law == "log" and (fits[0].scale, fits[0].slope) == pytest.approx((100.0, 7.0))
    assert "bits = 100 + 7 * log2(rows)" in str(fits[0])
    assert [fit.law for fit in modules.tables.fit_rows(rows, [0.0, 1, 2, 3, 4, 5, 6])] == ["log"]
    assert modules.tables.fit_rows(rows[:4], [1.0, 2.0, 3.0, 4.0]) == []


def test_everything_is_written(modules: Any, tmp_path: Path) -> None:
    found = [
        result(modules, arm, seed, 1000.0 + 10 * number + seed)
        for number, arm in enumerate(modules.arms.ARMS)
        for seed in range(3)
    ]
    header = {"commands": ["a command"], "settings": {"people": "5"}, "torch": "2"}
    written = modules.tables.write_results(tmp_path, header, found)
    assert {path.name for path in written} == {
        "results.md", "results.json", "architectures.png", "exposures.png", "rows.png",
        "placement.png", "gate.png", "sharing.png", "row_optimizer.png", "peer.png",
    }  # fmt: skip
    text = (tmp_path / "results.md").read_text()
    assert "| dense | 3 | 0.00 | 0.00 | 1,001 ± 2 | 11.1 ± 0.0 | 1.0010 ± 0.0025 | 5.0050" in text
    assert "law: bits = " in text and "- people: 5" in text
    report = json.loads((tmp_path / "results.json").read_text())
    assert len(report["runs"]) == len(found) and report["fits"][0]["num_sizes"] == 7
    byte = report["tables"]["architectures"]["dense"]["a byte read"]
    assert byte["mean"] == pytest.approx(1001 / 200)


@pytest.mark.slow
def test_the_quick_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of an hour on two cores: the whole path, with two workers."""
    command = [sys.executable, str(FOLDER / "capacity_study.py"), "--quick", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "results.json").read_text())
    assert {run["arm"] for run in report["runs"]} >= {"dense", "moe", "peer", "memory_plus"}
    assert report["fits"] and all(row["ratio"] for row in report["claims"][:2])
