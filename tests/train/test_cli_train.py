"""`strata train` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from strata.cli.main import app

RECIPES = Path(__file__).parents[2] / "recipes"
COUNT_KEYS = ["params_total", "params_dense", "params_values", "params_active", "flops_per_token"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_dry_run_json_of_a_published_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(RECIPES / "pkplus_373m_1024k.yaml", "--dry-run", "--json")
    assert result.exit_code == 0
    counts = json.loads(result.stdout)
    assert list(counts)[:5] == COUNT_KEYS
    assert counts["params_values"] == 2**20 * 1024
    assert counts["params_total"] == counts["params_dense"] + counts["params_values"]
    assert list(tmp_path.iterdir()) == []  # no data needed, no run folder made


def test_dry_run_of_the_largest_allocates_nothing() -> None:
    result = run(RECIPES / "pkplus_1p3b_64m.yaml", "--dry-run", "--json")
    assert json.loads(result.stdout)["params_values"] == 2**26 * 2048


def test_dry_run_table_follows_overrides() -> None:
    path = RECIPES / "pkplus_373m_1024k.yaml"
    result = run(path, "run.steps=5000", "run.accumulate=2", "--dry-run")
    assert result.exit_code == 0
    assert "1,440,532,992" in result.stdout and "65,536" in result.stdout


def test_dry_run_of_many_processes() -> None:
    path = RECIPES / "pkplus_373m_1024k.yaml"
    options = (path, "--dry-run", "--world-size", 64, "data.batch_size=64")
    many = json.loads(run(*options, "--memory-group", 16, "--json").stdout)
    assert many["shares"]["memory_group"] == 16 and many["shares"]["replicas"] == 4
    assert many["device_bytes"]["value_tables"] == 2**20 * 1024 * 4 // 16
    assert many["device_bytes"]["dense_weights"] * 64 == 4 * many["params_dense"]
    rings, gloo = (many["sent_bytes_per_step"][name] for name in ("rings", "gloo"))
    assert rings["total"] == sum(n for kind, n in rings.items() if kind != "total")
    assert gloo["dense_gradients"] == 2 * rings["dense_gradients"]
    own = json.loads(run(*options, "distributed.memory_group=4", "--json").stdout)
    assert own["shares"]["memory_group"] == 4
    table = run(*options)
    assert table.exit_code == 0
    assert "each of 64 processes holds" in table.stdout and "replica rows" in table.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [p for p in sorted(RECIPES.glob("*.yaml")) if not p.name.startswith(("sft_", "dpo_"))],
    ids=lambda path: path.stem,
)
def test_dry_run_of_every_recipe(path: Path) -> None:
    result = run(path, "--dry-run", "--world-size", 8, "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["device_bytes"]["peak"] > 16 * found["params_dense"] // 8
    assert found["sent_bytes_per_step"]["rings"]["dense_gradients"] > 0


def test_world_size_belongs_to_dry_runs(tiny_recipe_file: Path) -> None:
    result = run(tiny_recipe_file, "--world-size", 2)
    assert result.exit_code == 1 and "belong to --dry-run" in result.stderr


def test_train_then_find_it_finished(tiny_recipe_file: Path, tmp_path: Path) -> None:
    result = run(tiny_recipe_file, "run.log_every=6")
    assert result.exit_code == 0
    assert result.stdout.startswith("12 steps, loss ")
    assert f"model in {tmp_path / 'run' / 'model'}" in result.stdout
    assert "step 6/12  loss" in result.stderr and "step 12/12  loss" in result.stderr
    as_json = run(tiny_recipe_file, "run.log_every=6", "--json")
    assert json.loads(as_json.stdout)["steps"] == 12
    assert "step 6/12" not in as_json.stderr


def test_fresh(tiny_recipe_file: Path) -> None:
    run(tiny_recipe_file)
    refused = run(tiny_recipe_file, "optim.lr=0.001")
    assert refused.exit_code != 0
    assert run(tiny_recipe_file, "optim.lr=0.001", "--fresh").exit_code == 0


def test_interrupt_exits_with_130(
    tiny_recipe_file: Path, monkeypatch: pytest.MonkeyPatch, tiny_recipe: Callable[..., object]
) -> None:
    import signal

    from strata.train import loop

    real = loop.take_step

    def interrupted(training: loop.Training) -> dict[str, object]:
        signal.raise_signal(signal.SIGINT)
        return real(training)

    monkeypatch.setattr(loop, "take_step", interrupted)
    result = run(tiny_recipe_file)
    assert result.exit_code == 130
    assert (
        "SIGINT: stopped after step 1 and saved it, run the same command to go on" in result.stderr
    )
