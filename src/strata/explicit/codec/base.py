"""Blobs and what they are made of; how a vector is coded is left to the kinds of codec.

Shapes: n references, s memory heads, t tokens, d head width, q vectors, b bytes of a vector's code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from strata.errors import BankError
from strata.explicit.memories import Memories, MemoryShape

KINDS = ("keys", "values")


class Codec(ABC):
    """Memories to blobs and back.

    Attributes:
        name: what `make_codec` makes it from.
        shape: of the memories.
        vector_bytes: b.
        trained: whether it can encode; a codec that needs no training always can.
    """

    vector_bytes: int
    trained = True

    def __init__(self, name: str, shape: MemoryShape) -> None:
        self.name, self.shape = name, shape

    @property
    def bytes_per_memory(self) -> int:
        """Length of every blob."""
        places = 2 * len(self.shape.heads) * self.shape.tokens
        return self.shape.vectors * self.vector_bytes + places + 2

    def encode(self, memories: Memories) -> list[bytes]:
        """One blob a memory; equal memories give equal blobs.

        Raises:
            BankError: another shape, a number that is not finite, or the codec is untrained.
        """
        self._refuse_untrained()
        s, t, d = len(self.shape.heads), self.shape.tokens, self.shape.head_dim
        n = len(memories)
        if memories.keys_nstd.shape != (n, s, t, d) or memories.values_nstd.shape != (n, s, t, d):
            raise BankError(
                f"memories of shape {tuple(memories.keys_nstd.shape[1:])} do not fit a bank of "
                f"(heads, tokens, width) = {(s, t, d)}"
            )
        kept_n = memories.kept_n.cpu()
        filled_nst = torch.arange(t) < kept_n[:, None, None]
        codes = torch.zeros(n, s, 2, t, self.vector_bytes, dtype=torch.uint8)
        for at, (kind, part) in enumerate(
            zip(KINDS, (memories.keys_nstd, memories.values_nstd), strict=True)
        ):
            vectors_nstd = part.detach().to(device="cpu", dtype=torch.float32)
            finite_n = vectors_nstd.isfinite().flatten(1).all(1)
            if not finite_n.all():
                first = int(finite_n.logical_not().nonzero()[0])
                raise BankError(f"the {kind} of memory {first} hold NaN or infinity: not stored")
            vectors_nstd = self._to_code(vectors_nstd, kind)
            # Sums of empty places must not reach a scale or a codebook.
            filled = filled_nst.expand(n, s, t)
            codes[:, :, at][filled] = self._encode_vectors(vectors_nstd[filled].contiguous(), kind)
        blob_nb = torch.cat(
            (
                codes.flatten(1),
                _little(torch.where(filled_nst, memories.places_nst.cpu(), 0), "<i2"),
                _little(kept_n[:, None], "<u2"),
            ),
            dim=1,
        ).numpy()
        return [row.tobytes() for row in blob_nb]

    def decode(self, blobs: Sequence[bytes], *, dtype: torch.dtype = torch.float32) -> Memories:
        """Memories of blobs, in order, on the CPU.

        Raises:
            BankError: a blob is of another length, or names a place or count that cannot be.
        """
        self._refuse_untrained()
        s, t, d = len(self.shape.heads), self.shape.tokens, self.shape.head_dim
        for blob in blobs:
            if len(blob) != self.bytes_per_memory:
                raise BankError(
                    f"a memory of {len(blob)} bytes, codec {self.name!r} has "
                    f"{self.bytes_per_memory}"
                )
        n = len(blobs)
        raw = np.frombuffer(bytearray().join(blobs), np.uint8).reshape(n, self.bytes_per_memory)
        num_codes = self.shape.vectors * self.vector_bytes
        tail = np.ascontiguousarray(raw[:, num_codes:])
        places = tail[:, :-2].copy().view("<i2").astype(np.int16).reshape(n, s, t)
        kept = tail[:, -2:].copy().view("<u2").astype(np.int64)[:, 0]
        if (kept > t).any() or (places < 0).any():
            raise BankError(f"a memory's places are damaged: more than {t} tokens, or negative")
        codes = torch.from_numpy(raw[:, :num_codes]).reshape(n, s, 2, t, self.vector_bytes)
        empty_nst = torch.arange(t) >= torch.from_numpy(kept)[:, None, None]
        decoded = []
        for at, kind in enumerate(KINDS):
            flat_qb = codes[:, :, at].reshape(-1, self.vector_bytes).contiguous()
            vectors_nstd = self._decode_vectors(flat_qb, kind).reshape(n, s, t, d)
            vectors_nstd = self._from_code(vectors_nstd, kind)
            if bool(empty_nst.any()):
                vectors_nstd.masked_fill_(empty_nst[..., None], 0)
            decoded.append(vectors_nstd.to(dtype))
        return Memories(decoded[0], decoded[1], torch.from_numpy(places), torch.from_numpy(kept))

    def _to_code(self, vectors_nstd: Tensor, kind: str) -> Tensor:
        """What is coded in place of the vectors, head by head: (n, s, t, d) fp32."""
        return vectors_nstd

    def _from_code(self, vectors_nstd: Tensor, kind: str) -> Tensor:
        """The inverse; may write to what it is given."""
        return vectors_nstd

    @abstractmethod
    def _encode_vectors(self, vectors_qd: Tensor, kind: str) -> Tensor:
        """(q, d) fp32 to (q, b) uint8."""

    @abstractmethod
    def _decode_vectors(self, codes_qb: Tensor, kind: str) -> Tensor:
        """(q, b) uint8, contiguous, to (q, d) fp32 of its own."""

    def train(self, sample: Memories, *, iterations: int = 10, seed: int = 0) -> None:
        """Fit to a sample of memories; see `FaissCodec.train`.

        Raises:
            BankError: there is nothing to fit.
        """
        raise BankError(f"codec {self.name!r} needs no training: leave it out")

    def state_dict(self) -> dict[str, Tensor]:
        """What training found; empty for codecs without training."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take a state from a source that is trusted: FAISS reads its indexes from it.

        Raises:
            BankError: it is not a state of this codec.
        """
        if state:
            raise BankError(f"codec {self.name!r} has no trained state, given {sorted(state)}")

    def _refuse_untrained(self) -> None:
        if not self.trained:
            raise BankError(
                f"codec {self.name!r} is not trained yet: train it on a sample of the documents"
            )


def _little(numbers: Tensor, dtype: str) -> Tensor:
    """Integers (n, ...) as little-endian bytes (n, bytes)."""
    array = np.ascontiguousarray(numbers.flatten(1).numpy().astype(dtype))
    return torch.from_numpy(array.view(np.uint8))
