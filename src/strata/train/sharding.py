"""Spreading a model over the processes of a run, and adding up what they found.

Value tables lie outside FSDP2: each process holds its columns (`layers.ShardedTable`) and owes
gradients of them to its replicas only, see `sharded_rows`. Everything else is FSDP2's, a layer at a
time, or repeated in every process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from strata.errors import ConfigError
from strata.layers import RowTable, ShardedTable, ValueTable, replace_tables, value_tables
from strata.layers.stored import training_error
from strata.train.world import DistributedConfig, World

BUCKET_BYTES = 32 << 20


def spread(model: PreTrainedModel, config: DistributedConfig, world: World) -> None:
    """Leave in this process what it holds of a model that all processes built alike, in place.

    Value tables that were built for the memory group are spread already.

    Raises:
        ConfigError: rows cannot be split evenly over the memory group, or a weight by FSDP2.
        ModelError: a value table is read-only.
    """
    if world.mesh is None:
        return
    group = world.memory_group
    if group is not None:
        replace_tables(model, lambda table: columns_of(table, group))
    if config.dense == "fsdp":
        check_splits(model)
        mesh = world.mesh._flatten("dense")
        values = {table.weight for table in _trained(model)}
        decoder = model.get_decoder()

        def place(weight: nn.Parameter) -> Shard:
            return Shard(split_dim(weight.shape, world.size))

        for layer in decoder.layers:
            fully_shard(layer, mesh=mesh, shard_placement_fn=place)
        fully_shard(model, mesh=mesh, shard_placement_fn=place, ignored_params=values)
        for module in (*decoder.layers, model):
            assert isinstance(module, FSDPModule)
            # The loss is a share of the whole batch's already: gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def check_splits(model: nn.Module) -> None:
    """Refuse what FSDP2 cannot split: weights of a single number, without a dimension.

    Raises:
        ConfigError: there is one.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 0:
            raise ConfigError(
                f"distributed.dense=fsdp cannot split {name}, a single number (memory.scalar_gate="
                "zero has one): set distributed.dense=replicated, or another gate"
            )


def split_dim(shape: Sequence[int], processes: int) -> int:
    """The dimension along which a weight is split over so many processes.

    The first that can be split evenly, else the first of all, which FSDP2 fills up: it would gather
    the half-keys of 4 heads, split by heads over 512 processes, as 128 times their bytes.
    """
    even = (dim for dim, length in enumerate(shape) if length and length % processes == 0)
    return next(even, 0)


def columns_of(table: RowTable, group: dist.ProcessGroup) -> ShardedTable:
    """What this process holds of a whole table.

    Raises:
        ModelError: the table cannot be trained.
    """
    if isinstance(table, ShardedTable):
        return table
    if not isinstance(table, ValueTable):
        raise training_error(table.storage)
    weight = table.weight
    part = ShardedTable(
        table.num_rows, table.width, group, device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        part.weight.copy_(weight[:, part.columns])
    part.weight.requires_grad_(weight.requires_grad)
    return part.train(table.training)


def sums_last(model: nn.Module, *, last: bool) -> None:
    """Let FSDP2 add up gradients in the backward pass to come only if it is a step's last."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)


def add_up_gradients(weights: Sequence[nn.Parameter], world: World) -> None:
    """Sum the gradients of weights that every process holds whole, some at a time.

    A weight without a gradient keeps none where no process has one.
    """
    weights = [weight for weight in weights if not isinstance(weight, DTensor)]
    if world.mesh is None or not weights:
        return
    has = torch.tensor([float(weight.grad is not None) for weight in weights], device=world.device)
    dist.all_reduce(has)
    used = [weight for weight, count in zip(weights, has.tolist(), strict=True) if count]
    for bucket in _buckets(used):
        grads = [torch.zeros_like(w) if w.grad is None else w.grad for w in bucket]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        parts = flat.split([grad.numel() for grad in grads])
        for weight, part in zip(bucket, parts, strict=True):
            weight.grad = part.view_as(weight)


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over weights of all processes as a number that each of them has."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _buckets(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Weights of one dtype together, up to `BUCKET_BYTES`."""
    bucket: list[nn.Parameter] = []
    size = 0
    for weight in weights:
        num_bytes = weight.numel() * weight.element_size()
        if bucket and (size + num_bytes > BUCKET_BYTES or weight.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(weight)
        size += num_bytes
    if bucket:
        yield bucket


def _trained(model: nn.Module) -> list[ValueTable]:
    return [table for table in value_tables(model).values() if isinstance(table, ValueTable)]
