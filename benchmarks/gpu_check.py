"""One command for a machine with a GPU: tests, operations against rivals, and training steps.

    python benchmarks/gpu_check.py --out DIR

writes DIR/gpu_check.md and DIR/gpu_check.json in less than nine minutes, and again after each
result, so that a run that is cut short leaves what it measured. It needs torch, triton,
transformers, numpy and pytest, and nothing that has to be installed. `--device cpu` runs the same
code at toy sizes, the tests in Triton's interpreter and the operations on the CPU's kernels, to see
that it works; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUR_PATHS = [str(ROOT / "src")]
STAND_INS = []
if importlib.util.find_spec("pydantic") is None:
    STAND_INS = [str(Path(__file__).resolve().parent / "without_pydantic")]
sys.path[:0] = OUR_PATHS
sys.path += STAND_INS

BUDGET_S = 8.25 * 60  # nothing new is begun that would not end by then
HARD_STOP_S = 8.8 * 60  # whatever hangs

Part = Callable[[str, float, Callable[[Any], None]], None]


def main() -> int:
    """Run everything that fits the time; what did not fit is named in the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    faulthandler.dump_traceback_later(HARD_STOP_S, exit=True)
    start_s = time.perf_counter()
    if arguments.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: error: torch sees no GPU here: give --device cpu for a dry run")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": arguments.device,
        "finished": False,
        "machine": machine(arguments.device),
    }
    parts: tuple[tuple[str, Part], ...] = (
        ("tests", run_tests),
        ("operations", run_operations),
        ("training", run_training),
    )
    for name, part in parts:
        left_s = BUDGET_S - (time.perf_counter() - start_s)
        print(f"== {name} ({left_s:.0f} s left)", flush=True)

        def keep(found: Any, name: str = name) -> None:
            report[name] = found
            report["wall_s"] = time.perf_counter() - start_s
            write(report, arguments.out)

        if left_s < 20:
            keep({"not run": "no time left"})
            continue
        try:
            part(arguments.device, left_s, keep)
        except Exception as error:  # told in the report; the other parts still run
            traceback.print_exc()
            report.setdefault("failures", {})[name] = one_line(error)
            keep(report.get(name, {}))
    failed = report["tests"].get("exit_code") != 0 or "failures" in report
    report["finished"] = True
    write(report, arguments.out)
    print(f"written to {arguments.out}, {report['wall_s']:.0f} s")
    return 1 if failed else 0


def one_line(error: Exception) -> str:
    """An error for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def machine(device: str) -> dict[str, str]:
    """What the numbers were measured on."""
    import torch
    import transformers

    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
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


def run_tests(device: str, left_s: float, keep: Callable[[Any], None]) -> None:
    """The kernels against the reference, on this device."""
    # The project's own addopts are quiet to the point of no summary.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-x"]
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*OUR_PATHS, *inherited, *STAND_INS]),
    }
    try:
        done = subprocess.run(
            [*command, "tests/ops/test_triton.py"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
            timeout=left_s * 0.5,
            check=False,
        )
    except subprocess.TimeoutExpired:
        keep({"exit_code": 124, "last_line": "ran past its time"})
        return
    print(done.stdout[-2000:])
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    keep({"exit_code": done.returncode, "last_line": last})


def run_operations(device: str, left_s: float, keep: Callable[[Any], None]) -> None:
    """Each operation beside its rivals, with the bandwidth reached."""
    import torch

    from strata.bench.ops import bench_ops
    from strata.bench.sizes import SIZES
    from strata.bench.timing import copy_bytes_per_s

    target = torch.device(device)
    stop_s = time.perf_counter() + left_s * 0.5
    found: dict[str, Any] = {"copy_bytes_per_s": copy_bytes_per_s(target), "results": []}
    for size in SIZES["large" if device == "cuda" else "small"]:
        if time.perf_counter() > stop_s:
            found["results"].append({"table": size.name, "not run": "no time left"})
            keep(found)
            continue
        rounds = 11 if device == "cuda" else 1
        try:
            for result in bench_ops((size,), device=target, rounds=rounds):
                line = {"table": size.name, **vars(result)}
                if result.op == "bag_forward":
                    # Rows, and for each pick its number and weight.
                    line["bytes_read"] = size.tokens * size.picks * (size.row_bytes + 12)
                found["results"].append(line)
                keep(found)
                print(line, flush=True)
        except Exception as error:  # out of memory at this size, or a wrong result: told
            traceback.print_exc()
            found["results"].append({"table": size.name, "not run": one_line(error)})
            keep(found)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def run_training(device: str, left_s: float, keep: Callable[[Any], None]) -> None:
    """Training steps of the 373M recipe: the dense control, Memory+ with 2^20 and 2^22 rows."""
    stop_s = time.perf_counter() + left_s
    found: dict[str, Any] = {}
    for compiled in (False, True) if device == "cuda" else (False,):
        for name, half_keys in (("dense", None), ("memory 2^20", 1024), ("memory 2^22", 2048)):
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            if time.perf_counter() + (90 if compiled else 20) > stop_s and device == "cuda":
                found[key] = {"not run": "no time left"}
            else:
                try:
                    found[key] = training_step(device, half_keys, compiled=compiled)
                except Exception as error:  # told; the others still run
                    traceback.print_exc()
                    found[key] = {"not run": one_line(error)}
            keep(found)
            print(key, found[key], flush=True)


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
    (out / "gpu_check.md").write_text(markdown(report))


def markdown(report: dict[str, Any]) -> str:
    """The report for readers, whatever of it is there yet."""
    lines = ["# GPU check", "", "Command: `python benchmarks/gpu_check.py --out DIR`", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    if report["device"] == "cpu":
        lines += ["", "**Not measured on a GPU**: a dry run on a CPU, sizes are toys."]
    if not report["finished"]:
        lines += ["", "**Not finished**: what stands here was measured before it was cut short."]
    for name, failure in report.get("failures", {}).items():
        lines += ["", f"**{name} failed**: {failure}"]
    if "tests" in report:
        lines += ["", f"Tests: {report['tests'].get('last_line', report['tests'])}"]
    if "results" in report.get("operations", {}):
        lines += operations_markdown(**report["operations"])
    training = report.get("training", {})
    if training:
        lines += ["", "| 373M training step | tokens/s | of dense | peak GiB |"]
        lines += ["|---|---:|---:|---:|"]
        for name, result in training.items():
            if not isinstance(result, dict) or "tokens_per_s" not in result:
                why = result["not run"] if isinstance(result, dict) else result
                lines.append(f"| {name} | not run: {why} | | |")
                continue
            rate, peak = result["tokens_per_s"], result["peak_gib"]
            dense = training.get(f"dense, {name.split(', ')[1]}", {}).get("tokens_per_s")
            share = "" if dense is None else f"{rate / dense:.2f}"
            lines.append(f"| {name} | {rate:,.0f} | {share} | {peak:.1f} |")
    return "\n".join(lines) + "\n"


def operations_markdown(copy_bytes_per_s: float, results: list[dict[str, Any]]) -> list[str]:
    """A table for each operation, with a column for each rival."""
    speed = copy_bytes_per_s / 1e9
    lines = ["", f"Copy bandwidth {speed:,.0f} GB/s (bytes read + bytes written). Medians in ms;"]
    lines += ["rivals with their time over strata's."]
    measured = [result for result in results if "op" in result]
    for op in dict.fromkeys(result["op"] for result in measured):
        of_op = [result for result in measured if result["op"] == op]
        rivals = list(dict.fromkeys(name for result in of_op for name in result["rivals"]))
        reads, has_floor = "bytes_read" in of_op[0], of_op[0]["floor_ms"] is not None
        columns = [op, "strata"]
        columns += ["GB/s read", "read, of copy bandwidth"] if reads else []
        columns += ["floor, of strata"] if has_floor else []
        lines += ["", f"| {' | '.join(columns + rivals)} |"]
        lines += ["|---|" + "---:|" * (len(columns) + len(rivals) - 1)]
        for result in of_op:
            ours_ms = result["ours_ms"]
            cells = [result["table"], f"{ours_ms:.3f}"]
            if reads:
                read_per_s = result["bytes_read"] / (ours_ms * 1e-3)
                cells += [f"{read_per_s / 1e9:,.0f}", f"{read_per_s / copy_bytes_per_s:.0%}"]
            cells += [f"{result['floor_ms'] / ours_ms:.0%}"] if has_floor else []
            for name in rivals:
                ms = result["rivals"].get(name)
                cells.append("not run" if ms is None else f"{ms:.3f} ({ms / ours_ms:.1f}x)")
            lines.append(f"| {' | '.join(cells)} |")
    notes = [
        f"- {result['op']}, {result['table']}: {name} not run: {why}"
        for result in measured
        for name, why in result["skipped"].items()
    ]
    notes += [
        f"- {result['table']}: not run: {result['not run']}"
        for result in results
        if "not run" in result
    ]
    return [*lines, *([""] if notes else []), *notes]


if __name__ == "__main__":
    sys.exit(main())
