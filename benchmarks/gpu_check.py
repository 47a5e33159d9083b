"""One command for a machine with a GPU: tests, operations against rivals, and training steps.

    python benchmarks/gpu_check.py --out DIR

writes DIR/gpu_check.md and DIR/gpu_check.json in less than nine minutes. It needs torch, triton,
transformers, numpy and pytest, and nothing that has to be installed. `--device cpu` runs the same
code at toy sizes in Triton's interpreter, to see that it works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
if importlib.util.find_spec("pydantic") is None:
    sys.path.append(str(Path(__file__).parent / "without_pydantic"))

BUDGET_S = 8.5 * 60


def main() -> int:
    """Run everything that fits the time; what did not fit is named in the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: error: torch sees no GPU here: give --device cpu for a dry run")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    start_s = time.perf_counter()
    report: dict[str, Any] = {"machine": machine(arguments.device)}
    parts = (("tests", run_tests), ("operations", run_operations), ("training", run_training))
    for name, part in parts:
        left_s = BUDGET_S - (time.perf_counter() - start_s)
        print(f"== {name} ({left_s:.0f} s left)", flush=True)
        report[name] = (
            part(arguments.device, left_s) if left_s > 20 else {"not run": "no time left"}
        )
        report["wall_s"] = time.perf_counter() - start_s
        write(report, arguments.out)
    failed = report["tests"].get("exit_code") != 0
    print(f"written to {arguments.out}, {report['wall_s']:.0f} s")
    return 1 if failed else 0


def machine(device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    import torch
    import transformers

    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found["commit"] = commit.stdout.strip() or "unknown"
    return found


def run_tests(device: str, left_s: float) -> dict[str, Any]:
    """The kernels against the reference, on this device."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/ops/test_triton.py"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:1] + sys.path[-1:])}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
            timeout=left_s * 0.5,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"exit_code": 124, "last_line": "ran past its time"}
    print(done.stdout[-2000:])
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    return {"exit_code": done.returncode, "last_line": last}


def run_operations(device: str, left_s: float) -> dict[str, Any]:
    """Each operation beside its rivals, with the bandwidth reached."""
    import torch

    from strata.bench.ops import bench_ops
    from strata.bench.sizes import SIZES
    from strata.bench.timing import copy_bytes_per_s

    target = torch.device(device)
    stop_s = time.perf_counter() + left_s * 0.5
    results: list[dict[str, Any]] = []
    for size in SIZES["large" if device == "cuda" else "small"]:
        if time.perf_counter() > stop_s:
            results.append({"not run": size.name})
            continue
        rounds = 11 if device == "cuda" else 1
        for result in bench_ops((size,), device=target, rounds=rounds):
            line = dict(vars(result))
            results.append(line)
            print(line, flush=True)
    return {"copy_bytes_per_s": copy_bytes_per_s(target), "results": results}


def run_training(device: str, left_s: float) -> dict[str, Any]:
    """Training steps of the 373M recipe: the dense control, Memory+ with 2^20 and 2^22 rows."""
    stop_s = time.perf_counter() + left_s - 10
    found: dict[str, Any] = {}
    for compiled in (False, True):
        for name, half_keys in (("dense", None), ("memory 2^20", 1024), ("memory 2^22", 2048)):
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            if time.perf_counter() + (90 if compiled else 20) > stop_s and device == "cuda":
                found[key] = {"not run": "no time left"}
                continue
            found[key] = training_step(device, half_keys, compiled=compiled)
            print(key, found[key], flush=True)
        if device == "cpu":
            break
    return found


def training_step(device: str, half_keys: int | None, *, compiled: bool) -> dict[str, float]:
    """Tokens a second and peak memory of one model, steps of 8 x 4,096 tokens in bf16 autocast."""
    import torch
    import yaml

    import strata  # noqa: F401  (registers the models)
    from strata.layers import MemoryLayerConfig
    from strata.models import ModelConfig, build
    from strata.train.optim import OptimConfig, optimizers

    recipe = yaml.safe_load((ROOT / "recipes" / "pkplus_373m_1024k.yaml").read_text())
    host, memory = recipe["model"]["host"], recipe["memory"]
    batch, tokens, steps = 8, 4096, 10
    if device == "cpu":
        host = {**host, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        host = {**host, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 100}
        memory = {**memory, "layers": [1], "key_dim": 8, "top_k": 4}
        half_keys = half_keys and 16
        batch, tokens, steps = 2, 16, 2
    config = None
    if half_keys is not None:
        layers = tuple(memory["layers"])
        config = MemoryLayerConfig(**{**memory, "layers": layers, "num_half_keys": half_keys})
    torch.manual_seed(0)
    model = build(ModelConfig(host=host), config, device=device).train()
    dense, values = optimizers(model, OptimConfig(), max_norm_values=1.0)
    forward = torch.compile(model) if compiled else model
    ids = torch.randint(0, host["vocab_size"], (batch, tokens), device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times_s = []
    for step in range(3 + steps):
        if device == "cuda":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for g in dense.param_groups for p in g["params"]], 1.0)
        dense.step()
        dense.zero_grad()
        if values is not None:
            values.step()
        if device == "cuda":
            torch.cuda.synchronize()
        if step >= 3:
            times_s.append(time.perf_counter() - start_s)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    result = {
        "tokens_per_s": batch * tokens / statistics.median(times_s),
        "peak_gib": peak,
        "loss": float(loss.detach()),
    }
    del model, dense, values, forward, loss
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return result


def write(report: dict[str, Any], out: Path) -> None:
    """JSON for scripts, markdown for readers."""
    (out / "gpu_check.json").write_text(json.dumps(report, indent=1, default=str))
    lines = ["# GPU check", "", "Command: `python benchmarks/gpu_check.py --out DIR`", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    if report["machine"]["device"] == platform.processor():
        lines += ["", "**Not measured on a GPU**: a dry run on a CPU, sizes are toys."]
    lines += ["", f"Tests: {report['tests'].get('last_line', report['tests'])}", ""]
    operations = report.get("operations", {})
    if "results" in operations:
        speed = operations["copy_bytes_per_s"] / 1e9
        lines += [f"Copy bandwidth {speed:,.0f} GB/s (read + written). Medians in ms.", ""]
        lines += ["| operation | table | strata | share of copy bandwidth | rivals |"]
        lines += ["|---|---|---:|---:|---|"]
        for result in operations["results"]:
            if "op" not in result:
                lines.append(f"| not run | {result['not run']} | | | |")
                continue
            table = f"{result['rows']:,} x {result['width']} {result['dtype']}"
            rivals = ", ".join(
                f"{name} {ms:.2f} ({ms / result['ours_ms']:.1f}x)"
                for name, ms in result["rivals"].items()
            )
            floor = result["floor_ms"]
            share = "" if floor is None else f"{floor / result['ours_ms']:.0%}"
            cells = (result["op"], table, f"{result['ours_ms']:.2f}", share, rivals)
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    training = report.get("training", {})
    if training:
        lines += ["| 373M training step | tokens/s | peak GiB |", "|---|---:|---:|"]
        for name, result in training.items():
            if not isinstance(result, dict) or "tokens_per_s" not in result:
                lines.append(f"| {name} | not run | |")
                continue
            peak = result["peak_gib"]
            lines.append(f"| {name} | {result['tokens_per_s']:,.0f} | {peak:.1f} |")
    (out / "gpu_check.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
