"""Figures as a table and as JSON."""

from __future__ import annotations

import io
import json
import math

import pytest
from rich.console import Console

from strata.evals.report import Measure, Report, mean_and_stderr


def shown(report: Report) -> str:
    text = io.StringIO()
    Console(file=text, width=120).print(report.table())
    return text.getvalue()


def test_table_names_each_source_once_and_shortens_paths() -> None:
    measures = (
        Measure("/far/away/q.jsonl", "exact", 0.5, 0.1, 1200),
        Measure("/far/away/q.jsonl", "nats_per_token", 1.25, None, 1200),
        Measure("piqa", "acc", None, None, 3, num_fewshot=5),
    )
    table = shown(Report("model", measures))
    assert table.count("q.jsonl") == 1 and "/far" not in table
    assert "± 0.1000" in table and "1,200" in table and "n/a" in table


def test_two_files_of_one_name_stay_apart() -> None:
    measures = tuple(Measure(f"{folder}/q.jsonl", "exact", 0.5, None, 1) for folder in "ab")
    assert "a/q.jsonl" in shown(Report("m", measures))


def test_json_has_no_numbers_that_json_cannot_say() -> None:
    report = Report("m", (Measure("s", "perplexity", math.inf, math.nan, 1),), {"s": [{"x": 1}]})
    tree = report.to_json(records=True)
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert tree["measures"][0]["value"] is None and tree["records"] == {"s": [{"x": 1}]}
    assert "records" not in report.to_json(records=False)


def test_standard_error_of_a_mean() -> None:
    assert mean_and_stderr([2.0]) == (2.0, None)
    mean, stderr = mean_and_stderr([1.0, 2.0, 3.0, 6.0])
    assert mean == 3.0
    assert stderr == pytest.approx(math.sqrt(14 / 3 / 4))
