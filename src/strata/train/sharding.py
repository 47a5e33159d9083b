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
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers import PreTrainedModel

from strata.errors import ConfigError
from strata.layers import RowTable, ShardedTable, ValueTable, replace_tables, value_tables
from strata.layers.stored import training_error
from strata.train.tensor_parallel import partly_used, split_layers, split_weights
from strata.train.world import DistributedConfig, World

BUCKET_BYTES = 32 << 20


def spread(
    model: PreTrainedModel, config: DistributedConfig, world: World, *, sequence_tokens: int
) -> None:
    """Leave in this process what it holds of a model that all processes built alike, in place.

    Value tables that were built for the memory group are spread already.

    Raises:
        ConfigError: rows cannot be split evenly over the memory group, layers over the tensor
            group, or a weight by FSDP2.
        ModelError: a value table is read-only.
    """
    if world.mesh is None:
        return
    group = world.memory_group
    if group is not None:
        replace_tables(model, lambda table: columns_of(table, group))
    if world.tensor_group is not None:
        split_layers(model, world.tensor_group, sequence_tokens=sequence_tokens)
    if config.dense == "fsdp" and world.data_size > 1:
        check_splits(model)
        mesh = world.data_mesh
        values = {table.weight for table in _trained(model)}
        decoder = model.get_decoder()

        def place(weight: nn.Parameter) -> Shard:
            return Shard(split_dim(weight.shape, world.data_size))

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


def add_up_gradients(model: PreTrainedModel, weights: Sequence[nn.Parameter], world: World) -> None:
    """Sum the gradients that processes owe each other, but for those that FSDP2 has summed."""
    _add_up_tokens(weights, world)
    if world.tensor_group is not None:
        grads = [w.grad for w in partly_used(model) if w.grad is not None]
        _add_up([_local(grad) for grad in grads], world.tensor_group)


@torch.no_grad()
def clip(
    model: PreTrainedModel, weights: Sequence[nn.Parameter], limit: float, world: World
) -> Tensor:
    """Scale gradients so that the norm over all of them is at most `limit`; the norm before."""
    if world.tensor_group is None:
        return whole_norm(clip_grad_norm_(weights, limit))
    parts = split_weights(model)
    grads = [(id(weight) in parts, weight.grad) for weight in weights if weight.grad is not None]
    mine, alike = (
        whole_norm(get_total_norm([grad for split, grad in grads if split is wanted]))
        .to(world.device)
        .square()
        for wanted in (True, False)
    )
    dist.all_reduce(mine, group=world.tensor_group)
    norm = (mine + alike).sqrt()
    for _, grad in grads:
        _local(grad).mul_((limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _add_up_tokens(weights: Sequence[nn.Parameter], world: World) -> None:
    """Sum the gradients of weights that every process holds whole, some at a time.

    A weight without a gradient keeps none where no process has one.
    """
    weights = [weight for weight in weights if not isinstance(weight, DTensor)]
    if world.data_size == 1 or not weights:
        return
    has = torch.tensor([float(weight.grad is not None) for weight in weights], device=world.device)
    dist.all_reduce(has, group=world.data_group)
    used = [weight for weight, count in zip(weights, has.tolist(), strict=True) if count]
    for weight in used:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    _add_up([weight.grad for weight in used if weight.grad is not None], world.data_group)


@torch.no_grad()
def _add_up(grads: Sequence[Tensor], group: dist.ProcessGroup | None) -> None:
    """Sum tensors over a group, in place."""
    for bucket in _buckets(grads):
        flat = torch.cat([grad.flatten() for grad in bucket])
        dist.all_reduce(flat, group=group)
        parts = flat.split([grad.numel() for grad in bucket])
        for grad, part in zip(bucket, parts, strict=True):
            grad.copy_(part.view_as(grad))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_norm(norm: Tensor) -> Tensor:
    """A norm over weights of all processes as a number that each of them has."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _buckets(weights: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype together, up to `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
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
