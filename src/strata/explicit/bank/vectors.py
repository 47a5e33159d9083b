"""The vectors of one version of a bank in RAM: exact search without reading the disk.

Lance reads and converts a column of vectors anew for every exact search: 42 ms over 20,000 rows of
width 384, where one matrix product takes 2. So a bank without a vector index keeps its vectors,
from the first search of a version on.

Shapes: n rows with a vector, d width.
"""

from __future__ import annotations

import copy
import threading

import numpy as np
import torch
from numpy.typing import NDArray

from strata.explicit.bank.store import Store

# Of a cosine in fp16: two roundings of 2**-11 of each product, whose sizes sum up to 1 at most, and
# one of the sum.
_ROUGH = 2**-10 + 2**-11
MAX_BYTES = 512 * 2**20  # 50,000 rows of the widest embedder that we know (1,024) are 293 MiB


class VectorTable:
    """Unit vectors of a version, in the order of its rows; made by `VectorTables`.

    Args:
        store: at the version that is read, which nobody moves on.

    Attributes:
        store: as given.
        addresses_n: of each row in the dataset, as in `Store.take`, uint64.
        unit_nd: its vector at length 1, fp32.
        half_nd: the same in fp16, which all rows are looked through in.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        width = store.columns.field("vector").type.list_size
        addresses, blocks = [np.zeros(0, np.uint64)], [np.zeros((0, width), np.float32)]
        for batch in store.scan(["vector"], rows_at_once=8192, with_row_id=True):
            column = batch["vector"]
            # Nulls included, so that what is missing keeps its place; its numbers are anything.
            block = np.asarray(column.values, np.float32)[column.offset * width :]
            block = block[: len(column) * width].reshape(-1, width)
            lengths = np.linalg.norm(block, axis=1)
            there = np.asarray(column.is_valid()) & (lengths > 0)
            addresses.append(batch["_rowid"].to_numpy()[there])
            blocks.append(block[there] / lengths[there, None])
        self.addresses_n = np.concatenate(addresses)
        self.unit_nd = torch.from_numpy(np.concatenate(blocks))
        self.half_nd = self.unit_nd.half()

    def nearest(
        self, query: NDArray[np.float32], k: int, among: NDArray[np.uint64] | None
    ) -> tuple[list[int], list[float]]:
        """Addresses of the rows with the largest cosines, and these; largest first.

        Args:
            query: (d,), not zero.
            k: at least 1; fewer come where there are fewer rows.
            among: addresses of the rows that may be found; None for all.
        """
        unit_d = torch.from_numpy(query / np.linalg.norm(query))
        # By torch: numpy's product brings threads of its own, which spin for tens of milliseconds
        # afterwards, while an embedder or a decoder waits for the core. Half the bytes first, then
        # those rows exactly that rounding may have kept from the best k.
        rough = (self.half_nd @ unit_d.half()).float().numpy()
        near = np.arange(len(rough))
        if among is not None:
            near = np.flatnonzero(np.isin(self.addresses_n, among))
        if len(near) > k:
            kth = np.partition(rough[near], len(near) - k)[len(near) - k]
            near = near[rough[near] >= kth - 2 * _ROUGH]
        cosines = (self.unit_nd[near] @ unit_d).numpy()
        addresses = self.addresses_n[near]
        if len(addresses) > k:
            picks = np.argpartition(-cosines, k - 1)[:k]
            cosines, addresses = cosines[picks], addresses[picks]
        order = np.lexsort((addresses, -cosines))  # equal ones in the bank's order
        return addresses[order].tolist(), cosines[order].tolist()


class VectorTables:
    """The table of the version that is searched; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: Store | None = None
        self._table: VectorTable | None = None

    def of(self, store: Store) -> VectorTable | None:
        """The vectors of the store's version; None where Lance is to search them.

        That is where they have an index, or are more than `MAX_BYTES`.
        """
        with self._lock:
            if self._seen is None or self._seen.dataset is not store.dataset:
                self._table = None  # the old ones go before the new come
                self._seen = copy.copy(store)  # stays at its version while others write
                width = store.columns.field("vector").type.list_size
                num_bytes = (4 + 2) * width * self._seen.seal.rows
                if num_bytes <= MAX_BYTES and not has_vector_index(self._seen):
                    self._table = VectorTable(self._seen)
            return self._table


def has_vector_index(store: Store) -> bool:
    """Whether vectors are searched through an index."""
    with store.guarded("cannot be read"):
        return any(index.name == "vector_idx" for index in store.dataset.describe_indices())
