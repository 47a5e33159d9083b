"""One process of a run in these tests: makes steps, and writes down what it holds and sends.

    torchrun --nproc-per-node W count_worker.py RECIPE.yaml JOBS.json

A job is [file, overrides]; the process of rank 0 writes what it found there, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from wire_bytes import Watch, count_rows

from strata.config import load_config
from strata.layers import ValueTable, value_tables
from strata.ops.row_update import RowGradients
from strata.train import Recipe, loop
from strata.train.feed import Feed
from strata.train.run import RunFolder
from strata.train.sharded_rows import add_up_all, add_up_read
from strata.train.state import DENSE, VALUES
from strata.train.world import open_world


def main() -> None:
    recipe, jobs = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    dist.init_process_group("gloo")
    both_ways_add_up_alike()
    for file, overrides in jobs:
        found = run(load_config(Recipe, recipe, [*overrides, "run.threads=1"]))
        if dist.get_rank() == 0:
            Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()


def run(recipe: Recipe) -> dict[str, Any]:
    """Make two steps, the second one watched."""
    with open_world(recipe.distributed, device="cpu") as world:
        feed = Feed(recipe, world)
        with RunFolder(recipe, is_main=world.is_main) as folder:
            training = loop.start_or_resume(recipe, folder=folder, feed=feed, world=world)
            loop.take_step(training)
            with count_rows(training) as rows, Watch() as watch:
                world.any(False)  # as between two steps
                loop.take_step(training)
            return {"exchanges": watch.exchanges, "rows_read": rows, "held": held(training)}


def both_ways_add_up_alike() -> None:
    """What replicas read, handed to all of them, or added up over all rows: the same sums."""
    group, num_rows = dist.group.WORLD, 200_000
    for count in (0, 3, 100_000):
        draw = torch.Generator().manual_seed(dist.get_rank() + count)
        rows_u = torch.randperm(num_rows, generator=draw)[: count * dist.get_rank()].sort().values
        own = RowGradients(rows_u, torch.randn(len(rows_u), 3, generator=draw))
        lengths: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lengths, len(rows_u))
        if not max(lengths):
            continue
        one, other = add_up_read(own, group, lengths), add_up_all(own, group, num_rows=num_rows)
        assert torch.equal(one.rows_u, other.rows_u)
        torch.testing.assert_close(one.grad_uv, other.grad_uv)


def held(training: loop.Training) -> dict[str, int]:
    """Bytes of the storages behind what this process keeps."""
    tables = [t for t in value_tables(training.model).values() if isinstance(t, ValueTable)]
    values = {table.weight for table in tables}
    dense = [p for p in training.model.parameters() if p not in values]
    adam = training.optimizers[DENSE].state.values()
    rows = training.optimizers[VALUES].state.values() if VALUES in training.optimizers else ()
    return {
        "dense weights": stored(dense),
        "AdamW state": sum(numbers(x) for state in adam for x in state.values()),
        "value tables": stored(values),
        "row optimizer state": sum(numbers(x) for state in rows for x in state.values()),
        "queued uses of rows": sum(queued(table) for table in tables),
    }


def queued(table: ValueTable) -> int:
    """The room for uses that stays from step to step."""
    room = table.queue._room
    return 0 if room is None else sum(map(numbers, vars(room).values()))


def stored(tensors: Any) -> int:
    """Of whole storages, what fills them up included."""
    storages = {local(x).untyped_storage() for x in tensors}
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def numbers(tensor: torch.Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    main()
