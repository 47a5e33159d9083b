"""The processes of a run: who they are, which of them share what, and what all of them must know.

A run of W processes holds R replicas of the value tables, each split by columns over G processes
that stand side by side: W = R * G. The dense part is spread or repeated over all W. T of them that
stand side by side may read the same tokens, each with its part of the host's layers: G is then a
multiple of T, and the dense part spread or repeated over the W / T that hold the same part. A run
of one process has the same methods, and tells nobody anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, NoReturn, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from strata.config import FrozenConfig
from strata.device import pick_device
from strata.errors import ConfigError, LaunchError, StrataError

REPLICA, MEMORY = "replica", "memory"
TENSOR, DATA = "tensor", "data"
TIMEOUT = timedelta(minutes=30)  # the longest that a process waits for the others
# What gloo and NCCL say in the processes that are left when one is gone.
_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")


class DistributedConfig(FrozenConfig):
    """How several processes share a run; nothing to a run of one. They change no result.

    Attributes:
        memory_group: processes that share one copy of the value tables by columns, a divisor of
            all; None takes those of a machine.
        dense: "fsdp" spreads the weights, gradients and optimizer state of the dense part over all
            processes (torch's FSDP2); "replicated" repeats them, and adds up gradients.
        tensor_group: processes that share the host's layers by heads and features and read the same
            tokens (tensor parallelism), a divisor of the memory group.
    """

    memory_group: int | None = Field(default=None, ge=1)
    dense: Literal["fsdp", "replicated"] = "fsdp"
    tensor_group: int = Field(default=1, ge=1)


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them.

    Attributes:
        device: of this process.
        mesh: (replica, memory); None for one process.
        group: over which all processes tell each other what they know; None is torch's default.
        tensor_mesh: (tensor, data): those that read the same tokens, and those that hold the same
            part of the layers; None where every process reads its own.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    tensor_mesh: DeviceMesh | None = None

    @property
    def rank(self) -> int:
        """This process, counted from 0."""
        return 0 if self.mesh is None else dist.get_rank()

    @property
    def size(self) -> int:
        """All processes."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    @property
    def memory_group(self) -> dist.ProcessGroup | None:
        """Those that hold one copy of the tables with this one; None if it holds them whole."""
        return self._group(MEMORY)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """Those that hold the same columns; None if nobody else does."""
        return self._group(REPLICA)

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """Those that read the same tokens as this one; None if it reads its own."""
        return None if self.tensor_mesh is None else self.tensor_mesh.get_group(TENSOR)

    @property
    def data_mesh(self) -> DeviceMesh:
        """Those that hold the same part of the host's layers and read other tokens."""
        assert self.mesh is not None
        return self.mesh._flatten("dense") if self.tensor_mesh is None else self.tensor_mesh[DATA]

    @property
    def data_group(self) -> dist.ProcessGroup | None:
        """The same as a group; None is torch's default."""
        return self.group if self.tensor_mesh is None else self.tensor_mesh.get_group(DATA)

    @property
    def data_rank(self) -> int:
        """Which tokens this process reads, counted from 0."""
        return self.rank // self._tensor_size

    @property
    def data_size(self) -> int:
        """Parts that a batch is split into."""
        return self.size // self._tensor_size

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Each number summed over all tokens."""
        if self.mesh is None:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        return cast(list[float], self.sum_tensor(total).tolist())

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """The same for a tensor, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.data_group)
        return tensor

    def sum_everywhere(self, tensor: Tensor) -> Tensor:
        """A tensor summed over all processes, in place."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        total = torch.tensor([flag], dtype=torch.float64, device=self.device)
        return float(self.sum_everywhere(total)) > 0

    def gather(self, value: Any) -> list[Any]:
        """What each process has, by rank; any small picklable value."""
        if self.mesh is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        if self.mesh is not None:
            dist.barrier(self.group)

    def beside(self) -> World:
        """The same processes for a second thread, on CPUs; every process calls it."""
        if self.mesh is None:
            return self
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        return replace(self, device=torch.device("cpu"), group=group, tensor_mesh=None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within, what one process cannot do none does: its error is raised in all of them.

        For blocks that all processes enter, so that none waits for ever for one that failed.
        """
        error: StrataError | OSError | None = None
        try:
            yield
        except (StrataError, OSError) as caught:
            error = caught
        for failure in self.gather(None if error is None else (type(error), error.args)):
            if failure is not None:
                kind, arguments = failure
                shared = kind(*arguments)
                if isinstance(shared, StrataError):
                    shared.told_by = "main"
                raise shared from error

    def refuse(self, error: StrataError) -> NoReturn:
        """Raise what every process finds at the same point."""
        error.told_by = None if self.mesh is None else "main"
        raise error

    def share_of(self, batch_size: int, *, name: str) -> int:
        """Rows of a batch that this process takes.

        Raises:
            ConfigError: they cannot be split evenly.
        """
        return share_of(batch_size, self.data_size, name=name)

    @property
    def _tensor_size(self) -> int:
        return 1 if self.tensor_mesh is None else self.tensor_mesh[TENSOR].size()

    def _group(self, name: str) -> dist.ProcessGroup | None:
        if self.mesh is None or self.mesh[name].size() == 1:
            return None
        return self.mesh.get_group(name)


@contextmanager
def open_world(config: DistributedConfig, *, device: str) -> Iterator[World]:
    """The processes that torchrun started, joined while the context is open.

    A process group that is there already is used, and left.

    Args:
        config: how they share the tables.
        device: as `run.device`; several processes of a machine take a GPU each.

    Raises:
        ConfigError: no such device, fewer GPUs than processes, or groups that do not fit.
        LaunchError: another process has gone; its launcher says which.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(pick_device(device))
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(size)))
    group = memory_group_size(config, world_size=size, local_world_size=here)
    mine = _device(device, local=local, here=here)
    if mine.type == "cuda":
        torch.cuda.set_device(mine)
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("nccl" if mine.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        shape = (size // group, group)
        mesh = init_device_mesh(mine.type, shape, mesh_dim_names=(REPLICA, MEMORY))
        yield World(mine, mesh, tensor_mesh=_tensor_mesh(mine.type, size, config.tensor_group))
    except StrataError as error:
        error.told_by = error.told_by or "all"
        raise
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _GONE):
            raise
        lost = LaunchError("another process of this run is gone: start it again, and it goes on")
        lost.told_by = "launcher"
        raise lost from None
    finally:
        if not joined:
            dist.destroy_process_group()


def memory_group_size(
    config: DistributedConfig, *, world_size: int, local_world_size: int | None = None
) -> int:
    """G of a number of processes.

    Raises:
        ConfigError: it does not divide them, or the tensor group not it.
    """
    group = config.memory_group or min(world_size, local_world_size or world_size)
    if world_size % group:
        allowed = [str(g) for g in range(1, world_size + 1) if world_size % g == 0]
        raise ConfigError(
            f"distributed.memory_group {group} does not divide {world_size} processes: give one of "
            f"{', '.join(allowed)}"
        )
    if group % config.tensor_group:
        raise ConfigError(
            f"distributed.tensor_group {config.tensor_group} does not divide the {group} processes "
            "of a memory group: give a divisor, or a larger distributed.memory_group"
        )
    return group


def share_of(batch_size: int, processes: int, *, name: str) -> int:
    """Rows of a batch that each of so many processes takes.

    Raises:
        ConfigError: they cannot be split evenly.
    """
    if batch_size % processes:
        raise ConfigError(
            f"{name} {batch_size} cannot be split over {processes} processes: give a multiple "
            "of that, or another number of processes"
        )
    return batch_size // processes


def _tensor_mesh(device_type: str, size: int, tensor: int) -> DeviceMesh | None:
    """Layers are split first and what FSDP2 spreads of them second: tensor comes before data."""
    if tensor == 1:
        return None
    ranks = torch.arange(size).view(size // tensor, tensor).t().contiguous()
    return DeviceMesh(device_type, ranks, mesh_dim_names=(TENSOR, DATA))


def _device(name: str, *, local: int, here: int) -> torch.device:
    device = pick_device(name)
    if device.type != "cuda":
        return device
    gpus = torch.cuda.device_count()
    if here > gpus:
        raise ConfigError(
            f"{here} processes on a machine with {gpus} GPUs: start {gpus}, or set run.device=cpu"
        )
    return torch.device("cuda", local)
