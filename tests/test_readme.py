"""Every command and number in the README, tried."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from strata.cli import main as command_line

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What makes the laptop recipe a matter of seconds; everything else is as the README has it.
SMALLER = (
    "run.steps=2",
    "schedule.warmup_steps=1",
    "run.validate_every=2",
    "run.validate_batches=1",
    "model.host.hidden_size=32",
    "model.host.num_attention_heads=2",
    "memory.num_half_keys=16",
    "data.batch_size=2",
    "data.sequence_tokens=32",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("strata ")]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        command_line.main()
    assert not end.value.code, f"{shlex.join(arguments)} ended with {end.value.code}"


def test_the_commands_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "corpus").mkdir()
    sentences = [f"The capital of country {i} is city {i * 7}." for i in range(400)]
    rows = "".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences)
    (tmp_path / "corpus" / "a.jsonl").write_text(rows, encoding="utf-8")
    question = {"prompt": "The capital of Peru is", "answer": " Lima."}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    fact = question | {"texts": ["The capital of Peru is Lima.", "Lima is the capital of Peru."]}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact) + "\n", encoding="utf-8")

    shown = commands()
    assert [arguments[1] for arguments in shown] == [
        "tokenizer",
        "data",
        "train",
        "generate",
        "eval",
        "report",
        "train",
        "train",
        "quantize",
        "generate",
        "generate",
        "bank",
        "bank",
        "bank",
        "ask",
        "knowledge",
    ]
    for arguments in shown:
        trains = arguments[1] == "train" and "--dry-run" not in arguments
        kept = [a for a in arguments if not a.startswith(("run.steps", "schedule."))]
        run([*kept, *SMALLER] if trains else arguments, monkeypatch)

    names: dict[str, Any] = {}
    exec(blocks("python")[1], names)  # our own README
    (used,) = names["memory"].used
    assert used.injected and all("country" in memory.text for memory in used.memories)


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=21,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "your" / "decoder")
    example = blocks("python")[0]
    small = example.replace("num_half_keys=1024", "num_half_keys=64")
    names = {"input_ids": torch.randint(0, 64, (2, 8))}
    exec(small, names)  # our own README
    assert type(names["model"]).__name__ == "StrataLlamaForCausalLM"
    assert issubclass(type(names["model"]), LlamaForCausalLM)
    assert AutoModelForCausalLM is names["AutoModelForCausalLM"]


@pytest.mark.parametrize(
    "row",
    re.findall(r"^\| `(\w+)` \| (.+) \|$", README, flags=re.MULTILINE),
    ids=lambda row: row[0],
)
def test_the_table_of_sizes_is_what_dry_run_counts(
    row: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, cells = row
    total, values, active, ratio = (cell.strip() for cell in cells.split("|"))
    counts = dry_run(name, monkeypatch, capsys)
    dense = dry_run("dense_373m" if "373m" in name else "dense_1p3b", monkeypatch, capsys)
    assert counts["params_total"] == pytest.approx(number(total), rel=0.005)
    assert counts["params_values"] == pytest.approx(number(values), rel=0.005)
    assert counts["params_active"] == pytest.approx(number(active), rel=0.005)
    measured = counts["flops_per_token"] / dense["flops_per_token"]
    assert measured == pytest.approx(float(ratio), abs=0.0006)


def dry_run(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> dict[str, int]:
    capsys.readouterr()
    recipe = ROOT / "recipes" / f"{name}.yaml"
    run(["strata", "train", str(recipe), "--dry-run", "--json"], monkeypatch)
    return json.loads(capsys.readouterr().out)


def number(text: str) -> float:
    if text == "-":
        return 0.0
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]
