"""What processes send and hold, measured beside the formulas of `strata train --dry-run`.

    python benchmarks/wire_bytes.py wire --processes 2 4
    python benchmarks/wire_bytes.py memory
    python benchmarks/wire_bytes.py far

wire    trains a small decoder for some steps in gloo processes of this machine, which talk over the
        loopback of a network namespace that is theirs alone (`unshare --net`; as root, or with user
        namespaces). Bytes are those that the kernel counted there between two barriers, less the
        headers of TCP and IP; first for single collectives, then for steps.
memory  the peak of the resident set of each process over some steps, above what it was before the
        model was built, for tables that dominate.
far     arithmetic alone: what `--dry-run` says for 8, 64 and 512 processes and up to 2**26 rows.

Linux. Needs no data: token ids are random, which costs the same bytes as text does; only how many
distinct rows are read follows the text, and that is counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from strata.config import load_config, validate
from strata.layers.collectives import all_gather, reduce_scatter
from strata.models import build
from strata.train import Recipe, loop, sharded_rows
from strata.train.activations import Activations, activations
from strata.train.footprint import footprint
from strata.train.run import RunFolder
from strata.train.shares import shares_of
from strata.train.state import VALUES
from strata.train.traffic import BACKENDS, Exchange, Operation, exchanges, sent_bytes
from strata.train.world import World, open_world

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
HEADERS = 52  # IPv4 and TCP with timestamps; lo counts no Ethernet header
STEPS_BEFORE, STEPS = 2, 4

RECIPE: dict[str, Any] = {
    "name": "wire_bytes",
    "model": {
        "host": {
            "model_type": "llama",
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 704,
            "vocab_size": 4096,
            "max_position_embeddings": 256,
        }
    },
    "memory": {"layers": [1, 2], "num_half_keys": 256, "num_heads": 4, "top_k": 16},
    "data": {"dir": "nothing", "batch_size": 4, "sequence_tokens": 256},
    "run": {"steps": 100, "device": "cpu", "threads": 1, "health_every": None},
}
# Of each number of processes: what is spread, and how.
WIRE: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "fsdp, one group": {},
        "fsdp, one group, 2 micro-batches": {"run.accumulate": 2},
        "fsdp, 2 replicas": {"distributed.memory_group": 1},
        "replicated, one group": {"distributed.dense": "replicated"},
        "PEER, one group": {"memory.kind": "peer", "memory.gate": "none"},
    },
    4: {
        "fsdp, 2 groups of 2": {"distributed.memory_group": 2},
        "fsdp, 4 replicas": {"distributed.memory_group": 1},
        "replicated, one group": {"distributed.dense": "replicated"},
    },
}
LARGE = {
    "model.host.num_hidden_layers": 2,
    "model.host.intermediate_size": 256,
    "model.host.vocab_size": 256,
    "memory.num_half_keys": 768,
    "memory.layers": [1],
    "data.batch_size": 2,
    "data.sequence_tokens": 128,
}
MEMORY: dict[str, dict[str, Any]] = {
    "Adagrad, shared by 2": LARGE,
    "Adam, shared by 2": LARGE | {"optim.value_algorithm": "adam"},
    "Adagrad, 2 replicas": LARGE | {"distributed.memory_group": 1},
    "PEER, Adagrad, shared by 2": LARGE | {"memory.kind": "peer", "memory.gate": "none"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("wire", "memory", "far", "worker"))
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], choices=(2, 4))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part == "worker":
        work(options.job)
    elif options.part == "wire":
        for processes in options.processes:
            print_wire(processes, launch("wire", processes))
    elif options.part == "memory":
        print_memory(launch("memory", 2))
    else:
        print_far()


def launch(job: str, processes: int) -> dict[str, Any]:
    """Run workers in a network namespace of their own; what the first of them found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        inside = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        inside += ["--nproc-per-node", str(processes), __file__, "worker", "--job", f"{job}:{out}"]
        user = [] if os.geteuid() == 0 else ["--map-root-user"]
        command = ["unshare", *user, "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        # Large blocks go back to the system when they are freed, so that a peak is a peak.
        alone = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        alone |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 18), "MALLOC_TRIM_THRESHOLD_": "0"}
        done = subprocess.run([*command, *inside], env={**os.environ, **alone}, check=False)
        if done.returncode:
            sys.exit(f"the processes ended with {done.returncode}")
        return json.loads(out.read_text())


def work(job: str) -> None:
    """One process of either measurement."""
    kind, out = job.split(":", 1)
    dist.init_process_group("gloo")
    measure = measure_wire if kind == "wire" else measure_memory
    found = measure()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


# What is on the wire.


def measure_wire() -> dict[str, Any]:
    """Bytes that all processes together sent: for collectives, and for a step of each recipe."""
    size = dist.get_world_size()
    return {
        "collectives": {name: collective_bytes(name) for name in COLLECTIVES},
        "steps": {name: step_bytes(name, overrides) for name, overrides in WIRE[size].items()},
    }


NUM_BYTES = 8 << 20
COLLECTIVES: tuple[Operation, ...] = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def collective_bytes(name: Operation) -> dict[str, float]:
    """Sent by all processes for a tensor of `NUM_BYTES`, as measured and by the formulas."""
    size = dist.get_world_size()
    whole = torch.ones(NUM_BYTES // 4)
    part = torch.ones(NUM_BYTES // 4 // size)
    calls = {
        "all_gather": lambda: all_gather(whole, part),
        "reduce_scatter": lambda: reduce_scatter(part, whole),
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole),
    }
    calls[name]()
    with wire() as sent:
        for _ in range(STEPS):
            calls[name]()
    exchange = Exchange(name, name, NUM_BYTES, size)
    row = {
        "measured": sent["bytes"] / STEPS,
        **{backend: size * exchange.sent_bytes(backend) for backend in BACKENDS},
    }
    say(f"{name}: {json.dumps(row)}")
    return row


def step_bytes(name: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """Sent by all processes in a step, as measured and by the formulas."""
    recipe, size = make_recipe(overrides), dist.get_world_size()
    with started(recipe) as (training, world):
        for _ in range(STEPS_BEFORE):
            loop.take_step(training)
        with count_rows(training) as rows, wire() as sent:
            for _ in range(STEPS):
                world.any(False)  # as between the steps of a run
                loop.take_step(training)
    shares = shares_of(recipe, processes=size, rows_read=(rows[0], rows[1]))
    calls = exchanges(build(recipe.model, recipe.memory, device="meta"), shares)
    row = {
        "measured": sent["bytes"] / STEPS,
        "packets": sent["packets"] / STEPS,
        **{backend: size * sum(sent_bytes(calls, backend).values()) for backend in BACKENDS},
        "kinds": sent_bytes(calls, "gloo"),
    }
    say(f"{name}: {json.dumps(row)}")
    return row


@contextmanager
def wire() -> Iterator[dict[str, int]]:
    """What all processes put on the loopback within: bytes without headers, and packets."""
    found: dict[str, int] = {}
    dist.barrier()
    before = counters()
    dist.barrier()
    yield found
    dist.barrier()
    num_bytes, packets = (now - was for now, was in zip(counters(), before, strict=True))
    dist.barrier()
    found |= {"bytes": num_bytes - HEADERS * packets, "packets": packets}


def counters() -> tuple[int, int]:
    """Bytes and packets that the kernel sent over lo in this network namespace."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            fields = numbers.split()
            return int(fields[8]), int(fields[9])
    raise RuntimeError("this network namespace has no loopback")


OPERATIONS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}


class Watch(TorchDispatchMode):
    """Within, every collective of this process is noted: operation, whole bytes, processes."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own collectives come by once it has taken itself apart
        result = func(*args, **(kwargs or {}))
        space, _, name = func._schema.name.partition("::")
        if "c10d" in space and name in OPERATIONS:
            tensors = [x for x in _flat([*args, result]) if isinstance(x, torch.Tensor)]
            whole = max(x.numel() * x.element_size() for x in tensors)
            self.exchanges.append((OPERATIONS[name], whole, _group_size(args)))
        return result


def _group_size(args: Any) -> int:
    for value in args:
        if isinstance(value, torch.ScriptObject):
            with suppress(RuntimeError, TypeError):  # it may be a reduction
                return dist.ProcessGroup.unbox(value).size()
        elif isinstance(value, str) and value not in ("sum", "avg"):
            return _resolve_process_group(value).size()
    return dist.get_world_size()


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


@contextmanager
def count_rows(training: loop.Training) -> Iterator[list[float]]:
    """Filled in when it ends: distinct rows a table and step, of a replica and of all of them.

    Of replicas the one that read most counts, for the others fill up to it.
    """
    found: list[float] = []
    gathered: list[tuple[int, int]] = []
    together, step = sharded_rows.together, sharded_rows.ShardedRowOptimizer.step
    steps: list[int] = []

    def counted_together(own: Any, group: Any, **options: Any) -> Any:
        total = together(own, group, **options)
        gathered.append((len(own.rows_u), len(total.rows_u)))
        return total

    def counted_step(optimizer: Any, closure: Any = None) -> None:
        step(optimizer, closure)
        steps.append(optimizer.rows_updated)

    sharded_rows.together = counted_together
    sharded_rows.ShardedRowOptimizer.step = counted_step  # type: ignore[method-assign]
    try:
        yield found
    finally:
        sharded_rows.together = together
        sharded_rows.ShardedRowOptimizer.step = step  # type: ignore[method-assign]
    if VALUES not in training.optimizers:
        found += [0.0, 0.0]
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [own for own, _ in gathered])
    calls = len(steps) * len(training.optimizers[VALUES].tables)  # type: ignore[attr-defined]
    total = sum(steps) / calls
    longest = [max(of) for of in zip(*everyone, strict=True)]
    found += [sum(longest) / calls if longest else total, total]


# What is held.


def measure_memory() -> dict[str, Any]:
    """The peak of the resident set of every process, over what it was before the model came."""
    with started(make_recipe({})) as (training, _):  # all code that is needed is there
        loop.take_step(training)
    del training
    found = {}
    for name, overrides in MEMORY.items():
        found[name] = peak_bytes(overrides)
        say(f"{name}: {json.dumps(found[name])}")
    return found


def say(line: str) -> None:
    """On stderr, by the first process."""
    if dist.get_rank() == 0:
        print(line, file=sys.stderr, flush=True)


def peak_bytes(overrides: dict[str, Any]) -> dict[str, Any]:
    recipe = make_recipe(overrides)
    give_back()
    before = status("VmRSS")
    with started(recipe) as (training, _):
        loop.take_step(training)
        give_back()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        with count_rows(training) as rows:
            for _ in range(STEPS):
                loop.take_step(training)
    peak = status("VmHWM") - before
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, peak)
    model = build(recipe.model, recipe.memory, device="meta")
    shares = shares_of(recipe, processes=dist.get_world_size(), rows_read=(rows[0], rows[1]))
    found = footprint(model, recipe, shares)
    return {
        "measured": everyone,
        "formula": found.peak_bytes,
        "held": {part.kind: part.num_bytes for part in found.held},
    }


def give_back() -> None:
    """Freed memory to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def status(field: str) -> int:
    """A size of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


# A run without data.


class RandomFeed:
    """Random token ids where a run's data would come from."""

    references = None
    validation: tuple[()] = ()

    def __init__(self, recipe: Recipe, world: World) -> None:
        batch_size = world.share_of(recipe.data.batch_size, name="data.batch_size")
        self._shape = (batch_size, recipe.data.sequence_tokens)
        self._vocab = (recipe.model.host or {})["vocab_size"]
        self._generator = torch.Generator().manual_seed(world.rank)

    def check_model(self, model: Any) -> None:
        """Any model will do."""

    def next_batch(self) -> dict[str, torch.Tensor]:
        ids_bt = torch.randint(self._vocab, self._shape, generator=self._generator)
        return {"input_ids": ids_bt, "labels": ids_bt.clone()}


@contextmanager
def started(recipe: Recipe) -> Iterator[tuple[loop.Training, World]]:
    """A run before its first step."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        place = recipe.run.model_copy(update={"dir": Path(parent) / "run"})
        recipe = recipe.model_copy(update={"run": place})
        with open_world(recipe.distributed, device="cpu") as world:
            folder = RunFolder(recipe, is_main=world.is_main)
            feed: Any = RandomFeed(recipe, world)
            with folder:
                yield loop.start_or_resume(recipe, folder=folder, feed=feed, world=world), world


def make_recipe(overrides: dict[str, Any]) -> Recipe:
    tree = json.loads(json.dumps(RECIPE))
    for key, value in overrides.items():
        *parents, leaf = key.split(".")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return validate(Recipe, tree, origin="benchmarks/wire_bytes.py")


# What is printed.


def print_wire(processes: int, found: dict[str, Any]) -> None:
    print(f"\n{processes} processes, MB (10**6 bytes) that all of them send\n")
    print("| collective of 8 MiB | on the wire | gloo's formula | rings | wire / formula |")
    print("|---|---:|---:|---:|---:|")
    for name, row in found["collectives"].items():
        print(_row(name, row))
    print("\n| a step of | on the wire | gloo's formula | rings | wire / formula |")
    print("|---|---:|---:|---:|---:|")
    for name, row in found["steps"].items():
        print(_row(name, row))
    for name, row in found["steps"].items():
        kinds = ", ".join(f"{kind} {num / 1e6:.3f}" for kind, num in row["kinds"].items())
        print(f"\n{name}, one process by gloo's formula: {kinds}")


def _row(name: str, row: dict[str, float]) -> str:
    numbers = " | ".join(f"{row[key] / 1e6:.3f}" for key in ("measured", "gloo", "rings"))
    return f"| {name} | {numbers} | {row['measured'] / row['gloo']:.4f} |"


def print_memory(found: dict[str, Any]) -> None:
    print("\nMiB of one process of two\n")
    print("| table of 589,824 x 256 | peak above the start | formula | peak / formula |")
    print("|---|---:|---:|---:|")
    for name, row in found.items():
        peaks = ", ".join(f"{peak / 2**20:.0f}" for peak in row["measured"])
        ratio = max(row["measured"]) / row["formula"]
        print(f"| {name} | {peaks} | {row['formula'] / 2**20:.0f} | {ratio:.3f} |")
    for name, row in found.items():
        kinds = ", ".join(f"{kind} {num / 2**20:.1f}" for kind, num in row["held"].items())
        print(f"\n{name}: {kinds}")


FAR = (
    ("pkplus_373m_1024k", (8, 64, 512), (8, 64)),
    ("pkplus_1p3b_1m", (8, 64, 512), (8, 64)),
    ("pkplus_1p3b_4m", (8, 64, 512), (8, 64)),
    ("pkplus_1p3b_16m", (8, 64, 512), (8, 64, 512)),
    ("pkplus_1p3b_64m", (64, 512), (64, 512)),
)


def print_far() -> None:
    names = ("dense", "tables", "queue", "activations", "rows", "most at once")
    sent = ("dense", "group", "replicas", "together")
    print("GiB of a process; one sequence of 4,096 tokens each, gradient checkpointing\n")
    print(f"| recipe | processes | group | {' | '.join(names)} | {' | '.join(sent)} |")
    print(f"|---|---:|---:|{'---:|' * (len(names) + len(sent))}")
    for name, sizes, groups in FAR:
        waiting = activations(far_recipe(name, 1), sequences=1)
        for size in sizes:
            for group in groups:
                if group <= size:
                    print(far_row(name, size, group, waiting), flush=True)


def far_recipe(name: str, processes: int) -> Recipe:
    """With a sequence for each process."""
    options = [f"data.batch_size={processes}", "model.gradient_checkpointing=true"]
    return load_config(Recipe, RECIPES / f"{name}.yaml", options)


def far_row(name: str, processes: int, group: int, waiting: Activations) -> str:
    recipe = far_recipe(name, processes)
    shares = shares_of(recipe, processes=processes, memory_group=group)
    model = build(recipe.model, recipe.memory, device="meta")
    found = footprint(model, recipe, shares, waiting=waiting)
    held = {part.kind: part.num_bytes for part in found.held}
    rings = found.sent["rings"]
    own = {"dense weights", "dense gradients", "replica rows"}
    dense = ("dense weights", "AdamW state", "dense gradients", "gathered weights and gradients")
    numbers = (
        sum(held[kind] for kind in dense),
        held["value tables"] + held["row optimizer state"],
        held["queued uses of rows"] + held.get("picks of the memory group", 0),
        held["activations"] + held.get("weights copied by autocast", 0),
        held["row gradients"],
        found.peak_bytes,
        rings["dense weights"] + rings["dense gradients"],
        sum(num for kind, num in rings.items() if kind not in own),
        rings.get("replica rows", 0),
        sum(rings.values()),
    )
    return f"| {name} | {processes} | {group} | {' | '.join(f'{n / 2**30:.2f}' for n in numbers)} |"


if __name__ == "__main__":
    main()
