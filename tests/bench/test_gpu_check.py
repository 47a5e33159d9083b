"""The GPU check's report: what it says of whole and of unfinished runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    paths = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = paths
    return module


def result(op: str, **more: Any) -> dict[str, Any]:
    plain = {"op": op, "table": "4 x 2 float32", "ours_ms": 2.0, "rivals": {}, "skipped": {}}
    return {**plain, "floor_ms": 1.0, **more}


REPORT = {
    "device": "cuda",
    "finished": True,
    "machine": {"device": "a GPU"},
    "tests": {"exit_code": 0, "last_line": "7 passed in 1.00s"},
    "operations": {
        "copy_bytes_per_s": 4e12,
        "results": [
            result("bag_forward", bytes_read=6_000_000_000, rivals={"torch embedding_bag": 5.0}),
            result(
                "value_step",
                rivals={
                    "embedding_bag + fused Adam": 20.0,
                    "sparse embedding_bag + SparseAdam": 60.0,
                },
                skipped={"fbgemm row-wise Adagrad": "no module"},
            ),
            {"table": "8 x 2 float32", "not run": "no time left"},
        ],
    },
    "training": {
        "dense, eager": {"tokens_per_s": 1000.0, "peak_gib": 1.0},
        "memory 2^20, eager": {"tokens_per_s": 900.0, "peak_gib": 2.0},
        "memory 2^22, eager": {"not run": "OutOfMemoryError: too much"},
    },
}


def test_markdown_has_bandwidth_and_a_column_for_each_rival(script: ModuleType) -> None:
    shown = script.markdown(REPORT).splitlines()
    assert "Tests: 7 passed in 1.00s" in shown
    # 6 GB in 2 ms is 3 TB/s, three quarters of a copy that moves 4.
    assert "| 4 x 2 float32 | 2.000 | 3,000 | 75% | 50% | 5.000 (2.5x) |" in shown
    assert (
        "| value_step | strata | floor, of strata | embedding_bag + fused Adam | "
        "sparse embedding_bag + SparseAdam |"
    ) in shown
    assert "| 4 x 2 float32 | 2.000 | 50% | 20.000 (10.0x) | 60.000 (30.0x) |" in shown
    assert "| memory 2^20, eager | 900 | 0.90 | 2.0 |" in shown
    assert "| memory 2^22, eager | not run: OutOfMemoryError: too much | | |" in shown
    assert "- value_step, 4 x 2 float32: fbgemm row-wise Adagrad not run: no module" in shown
    assert "- 8 x 2 float32: not run: no time left" in shown
    assert not any("Not measured on a GPU" in line or "Not finished" in line for line in shown)


def test_an_unfinished_or_dry_run_says_so(script: ModuleType, tmp_path: Path) -> None:
    report = {"device": "cpu", "finished": False, "machine": {}, "failures": {"training": "No."}}
    script.write(report, tmp_path)
    shown = (tmp_path / "gpu_check.md").read_text()
    for words in ("Not measured on a GPU", "Not finished", "**training failed**: No."):
        assert words in shown
    assert json.loads((tmp_path / "gpu_check.json").read_text()) == report


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == (
        "gpu_check: error: torch sees no GPU here: give --device cpu for a dry run\n"
    )
