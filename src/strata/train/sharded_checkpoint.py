"""Checkpoints that many processes write and any number of processes read, by torch's DCP.

A step's folder is what `checkpoint.py` describes, with `__RANK_N.distcp` and DCP's `.metadata` in
place of safetensors files. It is complete or absent and checked when opened like the other kind,
and each kind goes on as the other: a run may go from one process to eight and back. DCP's
`.metadata` is a pickle: open checkpoints of your own only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from strata.errors import CheckpointError
from strata.layers import ShardedTable, value_tables
from strata.train.checkpoint import (
    SHARDED_NAME,
    Checkpoint,
    CheckpointFolder,
    TensorGroups,
    describe,
)
from strata.train.optim import RowOptimizer
from strata.train.state import (
    DENSE,
    MODEL,
    RNG,
    Optimizers,
    named_weights,
    parameters,
    rng_state,
    set_rng_state,
    weight_names,
)
from strata.train.tensor_parallel import split_weights
from strata.train.world import World

Groups = dict[str, dict[str, Tensor]]


def save(
    checkpoints: CheckpointFolder,
    step: int,
    groups: TensorGroups,
    state: Mapping[str, Any],
    world: World,
) -> None:
    """Write one checkpoint from all processes, each its own part.

    Raises:
        StorageError: in every process, if one could not write; nothing of it is left.
    """
    tree = _flat(groups)
    unfinished = checkpoints.unfinished(step)
    with checkpoints.writing(step):
        with world.together():
            if world.is_main:
                checkpoints.begin(step)
        with world.together():
            _quietly(
                lambda: dcp.save(tree, checkpoint_id=unfinished, process_group=world.group),
                alone=world.mesh is None,
            )
            mine = [path.name for path in unfinished.glob(f"__{world.rank}_*.distcp")]
            mine += [SHARDED_NAME] * world.is_main
            files = describe(unfinished, mine)
        with world.together():
            all_files = {
                name: entry for part in world.gather(files) for name, entry in part.items()
            }
            if world.is_main:
                checkpoints.finish(step, state=state, files=all_files)


def spread_groups(model: PreTrainedModel, optimizers: Optimizers, world: World) -> Groups:
    """All tensors of a run as the parts of whole ones that this process holds."""
    wrapped = _wrapper(model, world)
    names = weight_names(model)
    groups: Groups = {MODEL: {n: wrapped(w, w) for n, w in named_weights(model).items()}}
    for group, optimizer in optimizers.items():
        groups[group] = {
            f"{names[id(weight)]}/{key}": wrapped(weight, torch.as_tensor(tensor))
            for weight in parameters(optimizer)
            for key, tensor in optimizer.state.get(weight, {}).items()
        }
    groups[RNG] = {f"{name}.{world.data_rank}": t for name, t in rng_state(world.device).items()}
    return groups


def restore(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    optimizers: Optimizers,
    *,
    world: World,
    seed: int,
) -> None:
    """Copy a checkpoint of either kind into the parts of a run that this process holds.

    Args:
        checkpoint: of one process or of any number.
        model: as this run spreads it.
        optimizers: of it, fresh.
        world: the processes now.
        seed: of the run; names the random numbers of processes that the checkpoint does not know.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    source = open_tensors(checkpoint)
    _make_state(source, model, optimizers)
    groups = spread_groups(model, optimizers, world)
    random = groups.pop(RNG)
    for group, targets in groups.items():
        source.check(group, targets)
    source.fill(groups)
    for group, optimizer in optimizers.items():
        if isinstance(optimizer, RowOptimizer):
            optimizer.go_on_after(int(checkpoint.state["optimizers"][group]["steps"]))
    if source.shapes(RNG).keys() >= random.keys() and world.data_size == source.num_processes:
        source.fill({RNG: random})
        set_rng_state({name.split(".")[0]: t for name, t in random.items()}, world.device)
    else:
        step = int(checkpoint.state["progress"]["step"])
        torch.manual_seed(seed_after(seed, step=step, rank=world.data_rank))


def seed_after(seed: int, *, step: int, rank: int) -> int:
    """What names the random numbers of a process that a checkpoint does not know."""
    return (seed * 1_000_003 + step) * 1_009 + rank


def open_tensors(checkpoint: Checkpoint) -> _Sharded | _Single:
    """What reads the tensors of a checkpoint, of whichever kind."""
    return _Sharded(checkpoint) if checkpoint.is_sharded else _Single(checkpoint)


def read_model(folder: Path, model: nn.Module) -> None:
    """Put a sharded checkpoint's weights into a whole model, in this process alone."""
    tree = {f"{MODEL}/{name}": weight.detach() for name, weight in named_weights(model).items()}
    _load(tree, folder, alone=True)


class _Sharded:
    """Reads what many processes wrote."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        try:
            metadata = dcp.FileSystemReader(checkpoint.path).read_metadata()
        except Exception as error:  # whatever unpickling raises
            raise checkpoint.mismatch(".metadata", f"not DCP's ({type(error).__name__})") from None
        self._entries = {
            name: entry
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    @property
    def num_processes(self) -> int:
        """How many read tokens of their own."""
        return len(self.shapes(RNG).keys() & {f"cpu.{n}" for n in range(len(self._entries))})

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(entry.size) for name, entry in self._of(group).items()}

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All of a group, each whole, on the CPU."""
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in self._of(group).items()
        }
        self.fill({group: tensors})
        return tensors

    def check(self, group: str, targets: Mapping[str, Tensor]) -> None:
        _check(self._checkpoint, group, self.shapes(group), targets)

    def fill(self, groups: Groups) -> None:
        _load(_flat(groups), self._checkpoint.path, alone=not dist.is_initialized())

    def _of(self, group: str) -> dict[str, TensorStorageMetadata]:
        start = f"{group}/"
        return {n.removeprefix(start): e for n, e in self._entries.items() if n.startswith(start)}


class _Single:
    """Reads what one process wrote; every process takes its part."""

    num_processes = 1

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._checkpoint.tensors(group)}

    def tensors(self, group: str) -> dict[str, Tensor]:
        """All of a group."""
        return dict(self._checkpoint.tensors(group))

    def check(self, group: str, targets: Mapping[str, Tensor]) -> None:
        _check(self._checkpoint, group, self.shapes(group), targets)

    @torch.no_grad()
    def fill(self, groups: Groups) -> None:
        for group, targets in groups.items():
            for name, tensor in self._checkpoint.tensors(group):
                _put(targets[name], tensor)


def _flat(groups: TensorGroups) -> dict[str, Tensor]:
    return {f"{group}/{n}": t.detach() for group, of in groups.items() for n, t in of.items()}


def _check(
    checkpoint: Checkpoint,
    group: str,
    shapes: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, Tensor],
) -> None:
    for name, tensor in targets.items():
        if name not in shapes:
            raise checkpoint.mismatch(group, f"it lacks {name}")
        if shapes[name] != tuple(tensor.shape):
            raise checkpoint.mismatch(
                group, f"{name} is {shapes[name]}, the recipe's is {tuple(tensor.shape)}"
            )
    unknown = shapes.keys() - targets.keys()
    if unknown:
        raise checkpoint.mismatch(group, f"the recipe's model has no {min(unknown)}")


def _put(target: Tensor, whole: Tensor) -> None:
    if isinstance(target, DTensor):
        part = distribute_tensor(
            whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
        target.to_local().copy_(part.to_local())
    else:
        target.copy_(whole)


def _wrapper(model: PreTrainedModel, world: World) -> Callable[[Tensor, Tensor], Tensor]:
    """What says of a weight, or of state shaped like it, which part of a whole it is."""
    sharded = {
        id(table.weight)
        for table in value_tables(model).values()
        if isinstance(table, ShardedTable)
    }

    split = {} if world.tensor_mesh is None else split_weights(model)

    def wrapped(weight: Tensor, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.shape != weight.shape:
            return tensor
        if id(weight) in split:
            return _of_whole(tensor, split[id(weight)], world.tensor_mesh)
        if id(weight) not in sharded:
            return tensor
        placements = [Replicate(), Shard(1)]
        return DTensor.from_local(tensor, world.mesh, placements, run_check=False)

    return wrapped


def _of_whole(tensor: Tensor, dim: int, mesh: DeviceMesh | None) -> DTensor:
    """A part of a layer, or FSDP2's part of that, as a part of the whole."""
    assert mesh is not None
    shape = list(tensor.shape)
    shape[dim] *= mesh.size(0)
    return DTensor.from_local(
        tensor.to_local() if isinstance(tensor, DTensor) else tensor,
        mesh,
        [Shard(dim), tensor.placements[0] if isinstance(tensor, DTensor) else Replicate()],
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def _make_state(source: _Sharded | _Single, model: nn.Module, optimizers: Optimizers) -> None:
    """Give AdamW the state that its first step would make, for those weights that have one."""
    names = weight_names(model)
    saved = source.shapes(DENSE)
    dense = optimizers[DENSE]
    for weight in parameters(dense):
        start = f"{names[id(weight)]}/"
        for name, shape in saved.items():
            if name.startswith(start) and "/" not in name[len(start) :]:
                key = name.removeprefix(start)
                like = torch.zeros_like(weight) if shape else torch.zeros(())
                dense.state[weight][key] = like.detach()


def _load(tree: dict[str, Tensor], folder: Path, *, alone: bool) -> None:
    _quietly(lambda: dcp.load(tree, checkpoint_id=folder, no_dist=alone), alone=alone)


def _quietly(call: Callable[[], Any], *, alone: bool) -> None:
    """Run a DCP call; its exception names every rank's, of which one says enough."""
    try:
        with ExitStack() as stack:
            if alone:  # never while another thread saves: filters are the whole process's
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            call()
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, OSError):
            raise cause from None
        raise CheckpointError(f"torch's checkpoint cannot be used: {cause}") from None
