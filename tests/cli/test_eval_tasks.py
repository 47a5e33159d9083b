"""`strata eval tasks` through the command line, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import strata
import tiny_benchmarks
from strata.explicit.settings import ExplicitMemoryConfig

pytest.importorskip("lm_eval")
pytest.importorskip("lance")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tiny_benchmarks.write(tmp_path / "data")


@pytest.fixture
def folder(tmp_path: Path, model: Any, tokenizer: Any) -> Path:
    """A decoder with room for the prompts, and its two banks."""
    model.config.max_position_embeddings = 1024
    model.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    config = ExplicitMemoryConfig(reference_tokens=128, tokens_per_head=4)
    for name, text in (("general", "Aral is known for salt."), ("law", "Carts of Aral pay toll.")):
        bank = strata.Bank.create(tmp_path / name, model=model, tokenizer=tokenizer, config=config)
        bank.add([strata.Document(text, name)])
    return tmp_path


def test_one_table_with_and_without_memory(run: Run, folder: Path, data: Path) -> None:
    dense = {
        "small": {"name": "S", "scores": {"arc_easy": 20, "jecqa": 20}},
        "large": {"name": "L", "scores": {"arc_easy": 30, "jecqa": 20}},
    }
    (folder / "dense.json").write_text(json.dumps(dense))
    arguments = (
        "eval", "tasks", "--tasks", "arc_easy,law", "--data", data, "--model", folder / "wide",
        "--memory", "none", "--memory", "text", "--memory", "explicit", "--limit", 2,
        "--bank", folder / "general", "--bank", f"law={folder / 'law'}", "--out", folder / "out",
        "--baselines", folder / "dense.json",
    )  # fmt: skip
    code, shown, told = run(*arguments)
    assert code == 0, told
    assert "leak filter: a reference of which more than 0.667 stands in the question" in shown
    assert "leak filter" in told
    table = (folder / "out" / "table.md").read_text()
    assert "| group | task | metric | shots | questions | none | text | explicit |" in table
    rows = [line for line in table.splitlines() if line.startswith(("| general |", "| law |"))]
    assert [row.split(" | ")[1] for row in rows] == ["arc_easy", "jecqa", "jecqa_all"]
    assert all(row.count("±") == 3 for row in rows)
    assert "more than 0.667 stands in the question" in table
    tree = json.loads((folder / "out" / "table.json").read_text())
    assert tree["leak_filter"]["threshold"] == pytest.approx(2 / 3)
    banks = {(one["task"], one["settings"].get("bank")) for one in tree["results"]}
    assert len({bank for task, bank in banks if bank}) == 2
    sizes = tree["effective_size"]["explicit"]
    assert sizes["left_out"] == ["jecqa_all"] and sizes["per_task"]["jecqa"]["share"] is None
    assert sizes["all_tasks"]["tasks"] == ["arc_easy", "jecqa"]
    code, again, _ = run(*arguments, "--json")
    assert code == 0 and json.loads(again)["results"] == tree["results"]
    code, _, told = run(*arguments, "--leak-threshold", 1)
    assert code == 2 and "holds for another leak_threshold than now" in told


def test_the_list(run: Run) -> None:
    code, shown, _ = run("eval", "tasks", "--list", "--json")
    rows = {row["task"]: row for row in json.loads(shown)}
    assert code == 0 and len(rows) == 29
    assert rows["medqa"]["data"] == "medqa_us.jsonl.gz" and rows["medqa"]["group"] == "medicine"
    assert rows["ceval"]["data"] == "hub: ceval-valid"
    assert run("eval", "tasks", "--list")[0] == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--tasks", "piqa"), "give --model"),
        (("--model", "m"), "give --out"),
        (("--memory", "dreams"), "--memory 'dreams': give none, text or explicit"),
        (("--memory", "text"), "--memory text needs a bank: give --bank"),
        (("--top-k", 0), "--top-k 0: give 1 or more"),
        (("--limit", 0), "--limit 0: give 1 or more"),
        (("--num-fewshot", -1), "--num-fewshot -1: give 0 or more"),
        (("--leak-threshold", 1.5), "--leak-threshold 1.5: give 0 to 1"),
        (("--tasks", "piqa"), "piqa.jsonl.gz, which is not in --data"),
        (("--baselines", "nowhere.json"), "nowhere.json cannot be read"),
    ],
)
def test_wrong_options_are_one_line(
    run: Run, tmp_path: Path, options: tuple[Any, ...], line: str
) -> None:
    given: dict[str, Any] = {"--model": "m", "--out": tmp_path / "out", "--data": tmp_path}
    if line == "give --model":
        del given["--model"]
    if line == "give --out":
        del given["--out"]
    if "--tasks" not in options:
        given["--tasks"] = "gsm8k"  # of the hub: no file is looked for
    rest = [part for pair in given.items() for part in pair]
    code, _, told = run("eval", "tasks", *rest, *options)
    assert code == 2 and line in told and len(told.strip().splitlines()) == 1


def test_a_group_has_one_bank(run: Run, folder: Path, data: Path) -> None:
    code, _, told = run(
        "eval", "tasks", "--tasks", "law", "--data", data, "--model", folder / "wide", "--out",
        folder / "out", "--memory", "text", "--bank", f"law={folder / 'law'}", "--bank",
        f"law={folder / 'general'}",
    )  # fmt: skip
    assert code == 2 and "law has a bank already" in told
