"""`strata eval` through the command line, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from strata.cli.main import main
from strata.evals.questions import read_questions
from strata.evals.recall import open_recall, recall
from strata.models import load

ROWS = [
    {"id": "fr", "question": "what is the capital of France?", "answers": ["Paris", "Rome"]},
    {"id": "td", "question": "what is the capital of Chad?", "answer": "N'Djamena"},
    {"id": "it", "prompt": "It lies on the", "answer": " river"},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["strata", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None)


def test_everything_at_once(
    tiny_memory_model: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea.")
    out = tmp_path / "found.json"
    asked = ("--recall", questions, "--open-recall", questions, "--loss", text, "--out", out)
    run(monkeypatch, tiny_memory_model, *asked, "--template", r"Q: {question}\nA:", "--json")
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads(out.read_text())
    assert printed["measures"] == kept["measures"]
    value = {(row["source"], row["metric"]): row["value"] for row in kept["measures"]}

    model, tokenizer = load(tiny_memory_model)
    asked_questions = read_questions(questions, template="Q: {question}\nA:")
    scored = recall(model, asked_questions, tokenizer=tokenizer)
    written = open_recall(model, asked_questions, tokenizer=tokenizer)
    assert value[str(questions), "exact"] == scored.exact
    assert value[str(questions), "nats_per_answer"] == pytest.approx(scored.nats_per_answer)
    assert value[str(questions), "written_contains"] == written.contains
    assert value[str(text), "bits_per_byte"] > 0
    assert [row["id"] for row in kept["records"][f"recall {questions}"]] == ["fr", "td", "it"]
    assert kept["records"][f"open recall {questions}"][2]["text"] == written.answers[2].text
    assert "records" not in printed


def test_table_and_limit(
    tiny_model: Path,
    questions: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    run(monkeypatch, tiny_model, "--recall", questions, "--limit", 2, "--end", r"\n")
    table = capsys.readouterr().out
    assert "│ exact " in table and "nats_per_answer" in table and "±" in table
    assert "│       2 │" in table


def test_local_task(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"q": f"which of {i}?", "choices": ["sea", "river"], "answer": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "waters",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": "rows.jsonl"},
            "cache_dir": str(tmp_path / "cache"),
        },
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
    }
    (tmp_path / "waters.yaml").write_text(json.dumps(task))  # JSON is YAML
    run(monkeypatch, tiny_model, "--tasks", f"{tmp_path / 'waters.yaml'},", "--json")
    measures = json.loads(capsys.readouterr().out)["measures"]
    assert {row["metric"] for row in measures} == {"acc", "acc_norm"}
    assert all(row["num_samples"] == 6 and 0 <= row["value"] <= 1 for row in measures)


def test_out_file_is_whole_or_absent(
    tiny_model: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    out.write_text("before")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupt)
    arguments = (tiny_model, "--recall", questions, "--out", out)
    monkeypatch.setattr(sys, "argv", ["strata", "eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 130
    assert out.read_text() == "before"
