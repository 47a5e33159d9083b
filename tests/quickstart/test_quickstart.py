"""The quickstart, made tiny: every stage runs, and its report says what was measured."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from strata.data.facts.factbook import held_out_countries, load_articles, load_facts
from strata.quickstart import run
from strata.quickstart.bank import FORMATS, answer_from_bank
from strata.quickstart.report import Outcome


def capitals() -> dict[str, str]:
    """Of each article, the paragraph on the capital."""
    told = {country: text.split("\n\n") for country, text in load_articles().items()}
    said = {c: [p for p in parts if p.startswith(f"{c}, capital:")] for c, parts in told.items()}
    return {country: "\n\n".join(parts) for country, parts in said.items() if parts}


@pytest.fixture(scope="module", autouse=True)
def _short_articles() -> Iterator[None]:
    """What is embedded in seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("strata.quickstart.bank.load_articles", capitals)
        patch.setattr("strata.quickstart.bank.NUM_QUESTIONS", 12)
        yield


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_quickstart: tuple[str, ...]
) -> tuple[Path, Outcome, str]:
    out = tmp_path_factory.mktemp("quickstart") / "run"
    printed = io.StringIO()
    outcome = run.quickstart(
        out, overrides=tiny_quickstart, console=Console(file=printed, width=120)
    )
    return out, outcome, printed.getvalue()


def test_the_report_has_what_was_measured(finished: tuple[Path, Outcome, str]) -> None:
    out, outcome, _ = finished
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["closed_book"]["num_questions"] == len(load_facts())
    assert report["closed_book"]["memory"] == outcome.memory.recall.exact
    assert report["closed_book"]["dense"] == outcome.dense.recall.exact
    for key in ("tokens_per_s", "flops_per_token", "params_total", "params_active"):
        assert report[key]["memory"] > 0
        assert report[key]["dense"] > 0
    assert report["params_values"] == {"memory": 8 * 8 * 16, "dense": 0}
    assert report["wall_s"] > 0
    assert [point["step"] for point in report["curve"]["memory"]] == [1, 2]


def test_the_reader_of_strata_is_asked(finished: tuple[Path, Outcome, str]) -> None:
    out, outcome, printed = finished
    bank = outcome.bank
    assert bank is not None and bank.learned
    assert bank.reader == str(out / "reader") and (out / "reader" / "config.json").exists()
    assert bank.documents == len(held_out_countries() & set(capitals()))
    assert bank.top_k == 5
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))["explicit"]
    assert set(report["accuracy"]) == set(report["ttft_ms"]) == set(FORMATS)
    said = printed.replace("\n", " ")
    assert "strata ask" in said and "it was never taught about" in said


def test_without_the_banks_packages_it_says_what_to_install(
    finished: tuple[Path, Outcome, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _, _ = finished
    monkeypatch.setitem(sys.modules, "lance", None)
    said = io.StringIO()
    console = Console(file=said, width=200)
    assert answer_from_bank(out, out / "memory" / "model", console) is None
    assert "needs lance" in said.getvalue() and 'pip install "strata-lm[bank]"' in said.getvalue()


def test_it_prints_both_models_answers_and_draws_the_plot(
    finished: tuple[Path, Outcome, str],
) -> None:
    out, outcome, printed = finished
    assert "facts recalled" in printed
    assert outcome.examples[0].question in printed.replace("\n", " ") or len(outcome.examples) == 8
    assert "What next" in printed
    assert (out / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_both_models_are_ordinary_folders(finished: tuple[Path, Outcome, str]) -> None:
    out, _, _ = finished
    names = {
        kind: type(AutoModelForCausalLM.from_pretrained(out / kind / "model")).__name__
        for kind in run.KINDS
    }
    assert names == {"dense": "LlamaForCausalLM", "memory": "StrataLlamaForCausalLM"}


def test_an_interrupted_quickstart_goes_on_and_ends_the_same(
    finished: tuple[Path, Outcome, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_quickstart: tuple[str, ...],
) -> None:
    """Stopped after the first model, then run again: the first is not trained twice."""
    _, whole, _ = finished
    original = run.compete
    trained: list[str] = []

    def compete_once(kind: str, *args: object) -> object:
        if kind == "memory" and not trained:
            trained.append("stopped")
            raise KeyboardInterrupt
        return original(kind, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(run, "compete", compete_once)
    console = Console(file=io.StringIO())
    with pytest.raises(KeyboardInterrupt):
        run.quickstart(tmp_path / "run", overrides=tiny_quickstart, console=console)
    dense = tmp_path / "run" / "dense" / "model" / "model.safetensors"
    written = dense.stat().st_mtime_ns
    outcome = run.quickstart(tmp_path / "run", console=console)
    assert dense.stat().st_mtime_ns == written
    assert outcome.memory.recall == whole.memory.recall


def test_a_finished_quickstart_starts_over(
    tmp_path: Path, tiny_quickstart: tuple[str, ...]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "report.json").write_text("{}", encoding="utf-8")
    (out / "stale").touch()
    recipe = run.read_recipe(run.fresh_folder(out), tiny_quickstart)
    assert not (out / "stale").exists()
    assert recipe.run.steps == 2


def test_precision_is_one_of_the_two() -> None:
    assert run.faster_precision() in ("fp32", "bf16")
