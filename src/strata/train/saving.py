"""When checkpoints are written: while training waits, or beside the steps that follow.

Beside them means: what is saved is copied to CPU memory by DCP's stager, training goes on, and a
thread writes the copy. Several processes write together, so the thread has a group of its own
(gloo): collectives of two threads over one group would meet each other's.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from strata.train.checkpoint import TensorGroups
from strata.train.world import World


class Saving:
    """Has checkpoints written, one at a time.

    Args:
        world: the processes of the run; all of them make one of these, and save at the same steps.
        beside: write beside the steps that follow.

    Attributes:
        world: the processes, for who writes.
    """

    def __init__(self, world: World, *, beside: bool) -> None:
        self.world = world.beside() if beside else world
        self._pending: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None
        if beside:
            self._thread = ThreadPoolExecutor(
                1, "checkpoint", initializer=_stay_on, initargs=(world.device,)
            )

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *exception: object) -> None:
        """Let the pending checkpoint be finished, whatever happened since."""
        if self._thread is not None:
            self._thread.shutdown()
        if self.world.group is not None:
            dist.destroy_process_group(self.world.group)

    @property
    def failed(self) -> bool:
        """Whether the pending checkpoint could not be written; `wait` raises why."""
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def wait(self) -> None:
        """Until no checkpoint is pending.

        Raises:
            StorageError: it could not be written, in every process; nothing of it is left.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def start(
        self, write: Callable[[TensorGroups], None], groups: TensorGroups, *, at_once: bool
    ) -> None:
        """Write tensors, beside what follows if that is wanted; no other checkpoint is pending.

        Args:
            write: writes them, in this thread or another.
            groups: what may change as soon as this returns.
            at_once: wait until they are written, which takes no copy.

        Raises:
            StorageError: as `wait`.
        """
        assert self._pending is None
        if at_once or self._thread is None:
            write(groups)
        else:
            self._pending = self._thread.submit(write, copied(groups))


def copied(groups: TensorGroups) -> dict[str, dict[str, Tensor]]:
    """The same tensors or parts of tensors, in CPU memory of their own."""
    tensors = {group: {n: t.detach() for n, t in of.items()} for group, of in groups.items()}
    stager = DefaultStager(
        StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=False,
        )
    )
    try:
        copy = stager.stage(tensors)
    finally:
        stager.close()  # forgets the copy, which would else be kept for the next time
    assert isinstance(copy, dict)
    return copy


def _stay_on(device: torch.device) -> None:
    """A new thread would use the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
