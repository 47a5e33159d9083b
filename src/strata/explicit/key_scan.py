"""Which memories a model's own queries point at: an exact scan over the means of stored keys.

Shapes: n queries, N memories, s memory heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from strata.errors import ConfigError, ModelError

_BLOCK_BYTES = 32 * 2**20
_RIDGE = 0.003  # of the mean variance: directions that hardly any key varies along are noise

Keys = Iterable[tuple[Sequence[str], NDArray[np.float32]]]


class KeyScan:
    """The mean key of every head of every memory, in RAM, and its dot product with queries.

    Keys of a head lie around a mean of their own, and some heads are many times as loud as others;
    a sum of plain dot products would hear only these. So each head's keys are centred on their mean
    over all memories, which ranks them as before, and scaled to a root mean square length of 1;
    queries are scaled to length 1. A score is the mean over the heads.

    For likeness, of keys to keys, that is not enough: a few directions that all keys of a head vary
    along (how frequent a token is, how long a text) would decide. Then each head's keys are also
    turned so that they vary as much along every direction, and scaled to length 1 each, as is what
    is searched for; a score is the mean over the heads of the cosine.

    Args:
        batches: ids with their keys, each the mean over the tokens that a head kept, before rotary
            positions: (b, s, d).
        max_bytes: of all keys, in fp32.
        likeness: what is searched for are keys themselves, less their own mean, and no queries.

    Raises:
        ConfigError: the keys would take more.
    """

    def __init__(self, batches: Keys, *, max_bytes: int, likeness: bool = False) -> None:
        self.ids: list[str] = []
        self._shape: tuple[int, int] = (0, 0)
        self._blocks: list[NDArray[np.float32]] = []
        self._turns_sdd: NDArray[np.float32] | None = None
        self._fill(batches, max_bytes)
        if self.ids:
            self._even_out(likeness)

    def top(self, queries_nsd: NDArray[np.float32], k: int) -> list[list[tuple[int, float]]]:
        """Places in `ids` of the k best memories of each query, best first, with their scores.

        Args:
            queries_nsd: (n, s, d), finite.
            k: at least 1; fewer come where there are fewer memories.

        Raises:
            ModelError: the queries have another shape than the keys, or are not finite.
        """
        if not self.ids:
            return [[] for _ in queries_nsd]
        if queries_nsd.ndim != 3 or queries_nsd.shape[1:] != self._shape:
            raise ModelError(
                f"queries are {queries_nsd.shape[1:]} (heads, width), the bank's keys "
                f"{self._shape}: the bank belongs to another model"
            )
        if not np.isfinite(queries_nsd).all():
            raise ModelError("the model's queries are not finite")
        if self._turns_sdd is not None:
            queries_nsd = _turned(queries_nsd, self._turns_sdd)
        unit = _unit(queries_nsd) / self._shape[0]
        flat = np.ascontiguousarray(unit.reshape(len(unit), -1), dtype=np.float32)
        best_scores = np.zeros((len(flat), 0), np.float32)
        best_places = np.zeros((len(flat), 0), np.int64)
        start = 0
        for block in self._blocks:
            scores = np.concatenate([best_scores, _product(flat, block.T)], axis=1)
            own = np.broadcast_to(np.arange(start, start + len(block)), (len(flat), len(block)))
            places = np.concatenate([best_places, own], axis=1)
            start += len(block)
            if scores.shape[1] > k:
                picks = np.argpartition(-scores, k - 1, axis=1)[:, :k]
                scores = np.take_along_axis(scores, picks, axis=1)
                places = np.take_along_axis(places, picks, axis=1)
            best_scores, best_places = scores, places
        found = []
        for scores, places in zip(best_scores, best_places, strict=True):
            order = np.lexsort((places, -scores))  # equal scores in the bank's order
            found.append([(int(places[n]), float(scores[n])) for n in order])
        return found

    def _fill(self, batches: Keys, max_bytes: int) -> None:
        waiting: list[NDArray[np.float32]] = []
        num_bytes = waiting_bytes = 0
        for ids, keys_bsd in batches:
            if not len(ids):
                continue
            assert keys_bsd.ndim == 3 and len(keys_bsd) == len(ids)
            self._shape = (keys_bsd.shape[1], keys_bsd.shape[2])
            rows = np.array(keys_bsd, dtype=np.float32).reshape(len(ids), -1)  # a copy
            self.ids.extend(ids)
            num_bytes += rows.nbytes
            if num_bytes > max_bytes:
                raise too_many_keys(rows.nbytes // len(ids), len(self.ids), max_bytes)
            waiting.append(rows)
            waiting_bytes += rows.nbytes
            if waiting_bytes >= _BLOCK_BYTES:
                self._blocks.append(np.concatenate(waiting))
                waiting, waiting_bytes = [], 0
        if waiting:
            self._blocks.append(np.concatenate(waiting))

    def _even_out(self, likeness: bool) -> None:
        """Centre and scale every head, in place."""
        total = sum(block.sum(axis=0, dtype=np.float64) for block in self._blocks)
        mean = (total / len(self.ids)).astype(np.float32)
        for block in self._blocks:
            block -= mean
        if likeness:
            self._turns_sdd = self._turns()
            for block in self._blocks:
                turned = _turned(block.reshape(-1, *self._shape), self._turns_sdd)
                block[:] = _unit(turned).reshape(len(block), -1)
            return
        squares = np.zeros(self._shape[0])
        for block in self._blocks:
            squares += np.square(block.reshape(-1, *self._shape), dtype=np.float64).sum((0, 2))
        lengths = np.sqrt(squares / len(self.ids))
        scale = np.repeat(1 / np.where(lengths == 0, 1, lengths), self._shape[1])
        for block in self._blocks:
            block *= scale.astype(np.float32)

    def _turns(self) -> NDArray[np.float32]:
        """The inverse root of each head's covariance, a little of its trace added: (s, d, d)."""
        heads, width = self._shape
        covariance_sdd = np.zeros((heads, width, width))
        for block in self._blocks:
            by_head = block.reshape(-1, heads, width).transpose(1, 2, 0)
            covariance_sdd += _product(by_head, by_head.transpose(0, 2, 1))
        values_sd, vectors_sdd = np.linalg.eigh(covariance_sdd / len(self.ids))
        values_sd = np.maximum(values_sd, 0) + _RIDGE * values_sd.mean(axis=1, keepdims=True)
        scale_sd = 1 / np.sqrt(np.where(values_sd > 0, values_sd, 1))  # 0 where all keys are equal
        turns_sdd = (vectors_sdd * scale_sd[:, None]) @ vectors_sdd.transpose(0, 2, 1)
        return turns_sdd.astype(np.float32)


def _product(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float32]:
    """By torch: the threads of numpy's product would spin on, beside torch's own."""
    product: NDArray[np.float32] = (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()
    return product


def _turned(states_nsd: NDArray[np.float32], turns_sdd: NDArray[np.float32]) -> NDArray[np.float32]:
    return _product(states_nsd.transpose(1, 0, 2), turns_sdd).transpose(1, 0, 2)


def _unit(states_nsd: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(states_nsd, axis=2, keepdims=True)
    return (states_nsd / np.where(lengths == 0, 1, lengths)).astype(np.float32, copy=False)


def too_many_keys(key_bytes: int, count: int, max_bytes: int) -> ConfigError:
    """What to do about a bank too large to be scanned."""
    return ConfigError(
        f"the mean keys of {count:,} memories or more take {key_bytes * count / 2**30:.2f} GiB of "
        f"RAM, above {max_bytes / 2**30:.2f} GiB: raise max_bytes, or search by vector or text"
    )
