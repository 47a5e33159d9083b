"""A tiny bank that workers of Ray fill; and a script that does it.

python tests/ray_engine/ray_bank.py BANK COUNT PAUSE_S    adds documents(COUNT) with two workers
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from strata.explicit.bank import Bank
from strata.explicit.bank.partition import WorkerMeans
from tiny_bank import TinyEmbedder, TinyEncoder, cut, documents, fingerprint, reopen


def means(pids: Path | None, pause_s: float, given: Any) -> WorkerMeans:
    """A worker's; its process id becomes the name of a file."""
    if pids is not None:
        pids.mkdir(exist_ok=True)
        (pids / str(os.getpid())).touch()
    return WorkerMeans(cut, TinyEncoder(pause_s), TinyEmbedder(), fingerprint())


def add(
    bank: Bank, given: Any, *, pids: Path | None = None, pause_s: float = 0.0, **settings: Any
) -> Any:
    """Two workers, small partitions, a commit after some forty references."""
    small = {"batch_references": 40, "batch_size": 16, "partition_characters": 500}
    settings = {"open_means": partial(means, pids, pause_s), "num_workers": 2, **small, **settings}
    return bank.add_with_ray(given, device="cpu", **settings)


if __name__ == "__main__":
    path, count, pause_s = sys.argv[1:]
    add(reopen(Path(path)), documents(int(count)), pause_s=float(pause_s))
