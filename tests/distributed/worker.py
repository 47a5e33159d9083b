"""One process of a run in these tests: trains a list of recipes, one after the other.

    torchrun --nproc-per-node W worker.py RECIPE.yaml JOBS.json

A job is [run.dir, overrides, kill]: kill is null, or [rank, step] of the process that dies there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from strata.config import load_config
from strata.train import Recipe, StepEvent, train


def main() -> None:
    recipe, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    dist.init_process_group("gloo")
    for run_dir, overrides, kill in jobs:

        def on_step(event: StepEvent, kill: list[int] | None = kill) -> None:
            if kill == [dist.get_rank(), event.step]:
                os.kill(os.getpid(), signal.SIGKILL)

        options = [*overrides, f"run.dir={run_dir}", "run.threads=1"]
        train(load_config(Recipe, recipe, options), on_step=on_step, progress=False)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
