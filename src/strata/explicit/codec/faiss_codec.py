"""Codecs that are trained: a FAISS quantizer for all keys, and one for all values.

Heads differ in where their vectors lie and how far they spread, so what the quantizers see is
standardized: less its head's mean, over its head's deviation.

Shapes: n references, s memory heads, t tokens, q vectors, d head width, b bytes of a vector's code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.errors import BankError
from strata.explicit.codec.base import KINDS, Codec
from strata.explicit.codec.faiss_index import (
    VECTORS_AT_ONCE,
    codebook_sizes,
    faiss_says,
    residual_books,
    rotates,
    train_quietly,
)
from strata.explicit.codec.numbers import PLAIN
from strata.explicit.extras import require
from strata.explicit.memories import Memories, MemoryShape
from strata.ops.codec import ResidualBooks, decode_residual, encode_residual

_FACTORY = re.compile(r"[A-Za-z0-9_,()]{1,100}")
_LARGEST_NUMBER = 2**20


@dataclass(frozen=True)
class Spread:
    """Where the vectors of each head lie.

    Attributes:
        mean_sd: fp32.
        deviation_sd: fp32, above 0.
    """

    mean_sd: Tensor
    deviation_sd: Tensor

    @classmethod
    def of(cls, vectors_nstd: Tensor, filled_nt: Tensor, *, each_width: bool) -> Spread:
        """That of a sample.

        Args:
            vectors_nstd: fp32.
            filled_nt: which tokens count, at least one.
            each_width: a deviation for each of the d numbers; else one a head.
        """
        vectors_qsd = vectors_nstd.transpose(1, 2)[filled_nt]
        mean_sd = vectors_qsd.mean(0)
        variance_sd = (vectors_qsd - mean_sd).square().mean(0)
        if not each_width:
            variance_sd = variance_sd.mean(1, keepdim=True).expand_as(variance_sd)
        # What never changes is coded in a unit so small that its code says nothing.
        least = 1e-12 * float((mean_sd.square() + variance_sd).mean()) or 1.0
        return cls(mean_sd, variance_sd.clamp(min=least).sqrt())

    def standardized(self, vectors_nstd: Tensor) -> Tensor:
        """(n, s, t, d), fp32."""
        return (vectors_nstd - self.mean_sd[:, None]) / self.deviation_sd[:, None]

    def restored(self, vectors_nstd: Tensor) -> Tensor:
        """The inverse, in place."""
        return vectors_nstd.mul_(self.deviation_sd[:, None]).add_(self.mean_sd[:, None])


class FaissCodec(Codec):
    """Vectors, standardized, as the standalone codes of a FAISS index.

    Codes of the form `[OPQ..,]ResidualMxN,PQMxB` are written and read by our own loops, others by
    FAISS.

    Attributes:
        factory: FAISS' string for it.
        own_decoder: whether our own loops do; known once it is trained.
    """

    def __init__(self, name: str, shape: MemoryShape) -> None:
        super().__init__(name, shape)
        known = ", ".join((*PLAIN, "faiss"))
        if not _FACTORY.fullmatch(name) or any(
            int(number) > _LARGEST_NUMBER for number in re.findall("[0-9]+", name)
        ):
            raise BankError(f"no codec {name!r}: use {known}, or a FAISS factory string")
        self.factory = faiss_factory(shape.head_dim) if name == "faiss" else name
        try:
            self.vector_bytes = int(self._new_index().sa_code_size())
        except RuntimeError as error:
            raise BankError(
                f"no codec {name!r}: use {known}, or a FAISS factory string for width "
                f"{shape.head_dim} that codes vectors alone ({faiss_says(error)})"
            ) from None
        self._indexes: dict[str, Any] = {}
        self._spreads: dict[str, Spread] = {}
        self._books: dict[str, ResidualBooks] = {}

    @property
    def trained(self) -> bool:  # type: ignore[override]
        """Whether both quantizers are there."""
        return len(self._indexes) == len(KINDS)

    @property
    def own_decoder(self) -> bool:
        """Whether our own loops write and read the codes."""
        return bool(self._books)

    @property
    def vectors_needed(self) -> int:
        """Vectors of each kind that training takes at least: one for each codebook entry."""
        return max([1, *(codebook_sizes(self._new_index()))])

    def train(self, sample: Memories, *, iterations: int = 10, seed: int = 0) -> None:
        """Fit one quantizer to the keys of a sample and one to its values.

        At most 16 vectors for each entry of the largest codebook are used, drawn by `seed`. For
        the paper's quantizer that is 262,144 of each kind: some 190 memories of its model, and
        minutes on a few cores.

        Args:
            sample: memories of this shape.
            iterations: of k-means, for each codebook.
            seed: of the draw and of k-means.

        Raises:
            BankError: the sample holds too few vectors.
        """
        s, t = len(self.shape.heads), self.shape.tokens
        filled_nt = torch.arange(t) < sample.kept_n.cpu()[:, None]
        filled_nst = filled_nt[:, None].expand(-1, s, t)
        have, need = int(filled_nst.sum()), self.vectors_needed
        if have < need:
            raise BankError(
                f"codec {self.name!r} needs at least {need:,} keys to be trained, the "
                f"{len(sample):,} memories given hold {have:,}: add more documents, or use int8"
            )
        drawn = torch.randperm(have, generator=torch.Generator().manual_seed(seed))[: 16 * need]
        indexes, spreads = {}, {}
        for kind, part in zip(KINDS, (sample.keys_nstd, sample.values_nstd), strict=True):
            vectors_nstd = part.detach().cpu().float()
            indexes[kind] = index = self._new_index()
            # One that rotates vectors needs one unit for all their numbers.
            spreads[kind] = spread = Spread.of(
                vectors_nstd, filled_nt, each_width=not rotates(index)
            )
            vectors_qd = spread.standardized(vectors_nstd)[filled_nst][drawn].numpy()
            try:
                train_quietly(index, vectors_qd, iterations=iterations, seed=seed)
            except RuntimeError as error:
                raise BankError(
                    f"FAISS cannot train {self.factory!r} on {len(vectors_qd):,} {kind}: "
                    f"{faiss_says(error)}: add more documents, or use int8"
                ) from None
        self._take(indexes, spreads)

    def state_dict(self) -> dict[str, Tensor]:
        """The two FAISS indexes, as their bytes, and the spreads of keys and values."""
        faiss = require("faiss", extra="bank", purpose="this codec")
        state = {}
        for kind, index in self._indexes.items():
            state[kind] = torch.from_numpy(faiss.serialize_index(index).copy())
            state[f"{kind}_mean"] = self._spreads[kind].mean_sd
            state[f"{kind}_deviation"] = self._spreads[kind].deviation_sd
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Codec.load_state_dict`."""
        faiss = require("faiss", extra="bank", purpose="this codec")
        wanted = [f"{kind}{part}" for kind in KINDS for part in ("", "_deviation", "_mean")]
        if sorted(state) != wanted:
            raise BankError(
                f"not a state of codec {self.name!r}: holds {sorted(state)}, wants {wanted}; if "
                "an older strata trained it, make the bank again from its documents"
            )
        try:
            indexes = {kind: faiss.deserialize_index(state[kind].numpy()) for kind in KINDS}
        except RuntimeError as error:
            raise BankError(f"FAISS cannot read the codec's state: {faiss_says(error)}") from None
        for kind, index in indexes.items():
            fits = index.d == self.shape.head_dim and index.sa_code_size() == self.vector_bytes
            if not fits or not index.is_trained:
                raise BankError(
                    f"the {kind} of the codec's state are for width {index.d}, not for "
                    f"{self.factory!r} at width {self.shape.head_dim}"
                )
        spreads = {}
        for kind in KINDS:
            spreads[kind] = spread = Spread(state[f"{kind}_mean"], state[f"{kind}_deviation"])
            for part in (spread.mean_sd, spread.deviation_sd):
                if part.shape != (len(self.shape.heads), self.shape.head_dim):
                    raise BankError(
                        f"the spread of the {kind} is {tuple(part.shape)}, not heads x width of "
                        f"{(len(self.shape.heads), self.shape.head_dim)}"
                    )
        self._take(indexes, spreads)

    def _take(self, indexes: dict[str, Any], spreads: dict[str, Spread]) -> None:
        books = {kind: residual_books(index) for kind, index in indexes.items()}
        self._indexes, self._spreads = indexes, spreads
        self._books = {kind: found for kind, found in books.items() if found is not None}

    def _new_index(self) -> Any:
        return require("faiss", extra="bank", purpose="this codec").index_factory(
            self.shape.head_dim, self.factory
        )

    def _to_code(self, vectors_nstd: Tensor, kind: str) -> Tensor:
        return self._spreads[kind].standardized(vectors_nstd)

    def _from_code(self, vectors_nstd: Tensor, kind: str) -> Tensor:
        return self._spreads[kind].restored(vectors_nstd)

    def _encode_vectors(self, vectors_qd: Tensor, kind: str) -> Tensor:
        if kind in self._books:
            return encode_residual(vectors_qd, self._books[kind])
        index = self._indexes[kind]
        parts = [
            index.sa_encode(part.numpy()) for part in vectors_qd.split(VECTORS_AT_ONCE) if len(part)
        ]
        if not parts:
            return torch.empty(0, self.vector_bytes, dtype=torch.uint8)
        return torch.from_numpy(np.concatenate(parts))

    def _decode_vectors(self, codes_qb: Tensor, kind: str) -> Tensor:
        if kind in self._books:
            return decode_residual(codes_qb, self._books[kind])
        if len(codes_qb) == 0:
            return torch.empty(0, self.shape.head_dim)
        return torch.from_numpy(self._indexes[kind].sa_decode(codes_qb.numpy()))


def faiss_factory(head_dim: int) -> str:
    """The paper's quantizer for a head width: 14 bytes a vector, whatever the width.

    For width 80 it is the paper's `OPQ20_80,Residual2x14,PQ8x10`. The rule for width d: OPQ with
    as many blocks as the divisor of d nearest d / 4, kept at d; a coarse code of two halves of 14
    bits; a fine code of 10 bits for each of m parts, m the divisor of d nearest 8 (the larger of
    two). It gives OPQ2_8, OPQ4_16, OPQ8_32, OPQ16_64, OPQ20_80, OPQ24_96, OPQ32_128, OPQ64_256,
    each with `Residual2x14,PQ8x10`. Against bf16 that is a factor 11.4 at width 80, 18.3 at 128,
    36.6 at 256: wide heads are coded more coarsely than the paper tried.

    Raises:
        BankError: an odd width has no two halves.
    """
    if head_dim % 2:
        raise BankError(
            f"codec 'faiss' needs an even head width, this model's is {head_dim}: use int8 or int4"
        )
    divisors = [m for m in range(1, head_dim + 1) if head_dim % m == 0]

    def nearest(wanted: float) -> int:
        return min(divisors, key=lambda m: (abs(m - wanted), -m))

    return f"OPQ{nearest(head_dim / 4)}_{head_dim},Residual2x14,PQ{nearest(8)}x10"
