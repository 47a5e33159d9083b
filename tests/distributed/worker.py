"""One process of a run in these tests: trains a list of recipes, one after the other.

    torchrun --nproc-per-node W worker.py RECIPE.yaml JOBS.json

A job is [run.dir, overrides, kill]: kill is null, or [rank, step] of the process that dies there;
[rank, step, held] if it has not written its part of the checkpoint of step `held` by then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from strata.config import load_config
from strata.train import Recipe, StepEvent, sharded_checkpoint, train


def main() -> None:
    recipe, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    dist.init_process_group("gloo")
    for run_dir, overrides, kill in jobs:

        def on_step(event: StepEvent, kill: list[int] | None = kill) -> None:
            if kill is not None and kill[:2] == [dist.get_rank(), event.step]:
                os.kill(os.getpid(), signal.SIGKILL)

        if kill is not None and len(kill) == 3 and kill[0] == dist.get_rank():
            hold(step=kill[2])

        options = [*overrides, f"run.dir={run_dir}", "run.threads=1"]
        train(load_config(Recipe, recipe, options), on_step=on_step, progress=False)
    dist.destroy_process_group()


def hold(*, step: int) -> None:
    """Never get done with the checkpoint of a step."""
    describe = sharded_checkpoint.describe

    def held(folder: Path, names: list[str]) -> dict[str, Any]:
        if folder.name.endswith(f"{step:08d}"):
            threading.Event().wait()
        return describe(folder, names)

    sharded_checkpoint.describe = held


if __name__ == "__main__":
    main()
