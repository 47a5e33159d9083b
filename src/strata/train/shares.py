"""How the processes of a run share a model, as numbers: before anything is built or started."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from strata.errors import ConfigError
from strata.layers import ValueTable, memory_layers, value_tables
from strata.layers.sharded import check_columns
from strata.train.recipe import Recipe
from strata.train.sharding import split_dim
from strata.train.world import memory_group_size, share_of

MACHINE = 8  # processes of a machine, where nobody says otherwise


@dataclass(frozen=True)
class Shares:
    """What one process takes of a run.

    Attributes:
        processes: W, all of them.
        memory_group: G, those that share one copy of the value tables.
        dense: "fsdp" or "replicated".
        tokens: n, tokens of one process in a micro-batch.
        accumulate: micro-batches of a step.
        computed_twice: whether the backward pass computes layers again (gradient checkpointing).
        health_every: steps between records of memory health; None never.
        rows_read: distinct rows of a table that one memory group reads in a step, and that all
            groups read; None estimates both.
    """

    processes: int
    memory_group: int
    dense: Literal["fsdp", "replicated"]
    tokens: int
    accumulate: int
    computed_twice: bool = False
    health_every: int | None = None
    rows_read: tuple[float, float] | None = None

    @property
    def replicas(self) -> int:
        """R, copies of the value tables."""
        return self.processes // self.memory_group

    def fsdp_groups(
        self, model: PreTrainedModel
    ) -> tuple[list[list[nn.Parameter]], list[nn.Parameter]]:
        """The dense weights that FSDP2 gathers together: of each layer, and all others."""
        values = {id(p) for table in value_tables(model).values() for p in table.parameters()}
        layers = [
            [p for p in layer.parameters() if id(p) not in values]
            for layer in model.get_decoder().layers
        ]
        inside = values | {id(p) for layer in layers for p in layer}
        return layers, [p for p in model.parameters() if id(p) not in inside]

    def padded_bytes(self, weight: nn.Parameter) -> int:
        """Of all parts of a weight together, filled up so that they are equally long."""
        return self.part_bytes(weight) * self.processes

    def part_bytes(self, weight: nn.Parameter) -> int:
        """Of the part of a weight that a process holds under FSDP2."""
        dim = split_dim(weight.shape, self.processes)
        length = weight.shape[dim]
        part = weight.numel() // length * math.ceil(length / self.processes) if length else 0
        return part * weight.element_size()

    def distinct_rows(self, model: nn.Module, table: ValueTable) -> tuple[float, float]:
        """Rows of a table that one memory group reads in a step, and that all groups read.

        Where nobody counted them they are taken as picked evenly, which is the most that so many
        picks read on average.
        """
        readers = [layer for _, layer in memory_layers(model) if table in layer.tables]
        picks = sum(layer.keys.num_heads * layer.keys.top_k for layer in readers)
        tokens = self.tokens * self.accumulate * self.memory_group
        if self.rows_read is not None:
            return self.rows_read
        rows = table.num_rows
        return _even(rows, picks * tokens), _even(rows, picks * tokens * self.replicas)


def shares_of(
    recipe: Recipe,
    *,
    processes: int,
    memory_group: int | None = None,
    machine: int = MACHINE,
    rows_read: tuple[float, float] | None = None,
) -> Shares:
    """What one of so many processes takes of a recipe's run.

    Args:
        recipe: the run.
        processes: W.
        memory_group: G instead of the recipe's.
        machine: processes of a machine, which decide G where neither says it.
        rows_read: see `Shares`.

    Raises:
        ConfigError: groups, batch or rows cannot be split evenly.
    """
    config = recipe.distributed
    if memory_group is not None:
        config = config.model_copy(update={"memory_group": memory_group})
    if config.tensor_group > 1:
        raise ConfigError(
            "a dry run does not count tensor parallelism: give distributed.tensor_group=1 too"
        )
    group = memory_group_size(config, world_size=processes, local_world_size=machine)
    batch_size = share_of(recipe.data.batch_size, processes, name="data.batch_size")
    return Shares(
        processes=processes,
        memory_group=group,
        dense=config.dense if processes > 1 else "replicated",
        tokens=batch_size * recipe.data.sequence_tokens,
        accumulate=recipe.run.accumulate,
        computed_twice=recipe.model.gradient_checkpointing,
        health_every=recipe.run.health_every,
        rows_read=rows_read,
    )


def check_columns_of(model: nn.Module, shares: Shares) -> None:
    """Refuse a memory group that cannot hold equal shares of every row.

    Raises:
        ConfigError: it cannot.
    """
    for table in value_tables(model).values():
        check_columns(table.width, shares.memory_group)


def _even(num_rows: int, picks: int) -> int:
    """Distinct rows of so many picks that fall evenly, on average."""
    return round(-num_rows * math.expm1(picks * math.log1p(-1 / num_rows))) if num_rows > 1 else 1
