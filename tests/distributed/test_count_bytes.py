"""What `--dry-run` counts is what processes hold and send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from strata.models import build
from strata.train import Recipe
from strata.train.footprint import footprint
from strata.train.shares import Shares, shares_of
from strata.train.traffic import exchanges

MakeRecipe = Callable[..., Recipe]
WORKER = Path(__file__).parent / "count_worker.py"
PEER = ["memory.kind=peer", "memory.gate=none"]

VARIANTS: dict[str, list[str]] = {
    "memory": [],
    "replicated": ["distributed.dense=replicated"],
    "replicas": ["distributed.memory_group=1"],
    "accumulated": ["run.accumulate=2", "data.batch_size=4"],
    "own_tables": ["memory.share_values=false"],
    "adam": ["optim.value_algorithm=adam"],
    "peer": PEER,
    "peer_frozen_base": [*PEER, "memory.freeze_base=true"],
    "peer_replicas": [*PEER, "distributed.memory_group=1"],
    "beside": ["memory.placement=beside", "memory.scalar_gate=sigmoid", "memory.gate=none"],
    "frozen_base": ["memory.freeze_base=true"],
    "computed_twice": ["model.gradient_checkpointing=true"],
    "peer_computed_twice": [*PEER, "model.gradient_checkpointing=true"],
    "narrow": ["memory.value_dim=16"],
    "bfloat16": ["model.dtype=bfloat16"],
    "peer_bfloat16": [*PEER, "model.dtype=bfloat16"],
    "autocast": ["run.precision=bf16"],
    "uneven": ["model.host.vocab_size=321"],
    "health": ["run.health_every=1"],
    "dense": ["memory=null"],
    "experts": ["memory=null", "model.experts={num_experts: 2}"],
}
# Those that two processes show every time; four are asked for all.
SOME = (
    "memory", "replicated", "replicas", "accumulated", "peer_frozen_base", "peer_computed_twice",
    "computed_twice", "bfloat16", "health", "experts",
)  # fmt: skip


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.distributed)])
def test_bytes_are_those_of_the_formulas(
    tiny_recipe: MakeRecipe, tiny_recipe_file: Path, tmp_path: Path, processes: int
) -> None:
    variants = {name: VARIANTS[name] for name in SOME}
    if processes == 4:
        variants = VARIANTS | {"groups_of_two": ["distributed.memory_group=2"]}
    jobs = []
    for name, overrides in variants.items():
        options = ["run.health_every=null", *overrides, f"run.dir={tmp_path / name}"]
        jobs.append([str(tmp_path / f"{name}.json"), options])
    assert launch(tiny_recipe_file, jobs, processes=processes) == 0
    wrong = {}
    for file, options in jobs:
        found = json.loads(Path(file).read_text())
        recipe = tiny_recipe(*options)
        shares = shares_of(recipe, processes=processes, rows_read=tuple(found["rows_read"]))
        ours = {"sent": sent(recipe, shares), "held": held(recipe, shares)}
        real = {"sent": summed(found["exchanges"]), "held": positive(found["held"])}
        if ours != real:
            wrong[Path(file).stem] = (ours, real)
    assert not wrong


def sent(recipe: Recipe, shares: Shares) -> dict[str, int]:
    """Whole bytes by operation and processes."""
    model = build(recipe.model, recipe.memory, device="meta")
    return summed(
        (x.operation, x.per_step * x.whole_bytes, x.processes) for x in exchanges(model, shares)
    )


def summed(calls: Any) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for operation, num_bytes, processes in calls:
        if processes > 1:
            sums[f"{operation} of {processes}"] += num_bytes
    return {name: round(num_bytes) for name, num_bytes in sums.items()}


def held(recipe: Recipe, shares: Shares) -> dict[str, int]:
    """What is kept from step to step."""
    model = build(recipe.model, recipe.memory, device="meta")
    parts = footprint(model, recipe, shares).held
    return positive({part.kind: part.num_bytes for part in parts if part.when == "always"})


def positive(parts: dict[str, int]) -> dict[str, int]:
    return {kind: num_bytes for kind, num_bytes in parts.items() if num_bytes}


def launch(recipe_file: Path, jobs: list[Any], *, processes: int) -> int:
    """Run the worker in so many processes; the exit status."""
    file = recipe_file.parent / "jobs.json"
    file.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--standalone", str(WORKER), str(recipe_file), str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ}, check=False
    )
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-8000:])
    return done.returncode
