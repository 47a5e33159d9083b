"""How keys and values are stored: memories to blobs of one size, and back.

A blob has no header; it is, little-endian:

    codes   (s, 2, t) vectors, keys before values within a head, each of `vector_bytes`
    places  (s, t) int16
    kept    uint16

and the bank's settings say which codec and shape it belongs to. Empty places are zero bytes and
decode to zeros whatever the codec.

Codecs: fp32 and bf16 (the numbers themselves), int8 and int4 (symmetric, one fp16 scale a vector),
"faiss" (the paper's vector quantizer, fitted to the head width) and any FAISS factory string that
has a standalone code. FAISS codecs are trained: one quantizer for all keys and one for all values,
over all layers and heads (the paper leaves that open; two kinds because keys and values differ
most, and per-layer codebooks would take as many times the memory and the sample).

Shapes: n references, s memory heads, t tokens, d head width, q vectors, b bytes of a vector's code.

Source: "Memory3" (arXiv 2407.01178), section 3.4 and appendix on vector quantization.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strata.errors import BankError
from strata.explicit.extras import require
from strata.explicit.memories import Memories, MemoryShape
from strata.ops.codec import (
    ResidualBooks,
    decode_int4,
    decode_int8,
    decode_residual,
    encode_residual,
)

PLAIN = ("fp32", "bf16", "int8", "int4")
KINDS = ("keys", "values")

_FACTORY = re.compile(r"[A-Za-z0-9_,()]{1,100}")
_LARGEST_NUMBER = 2**20
_MAX_STATE_BYTES = 2**30
_VECTORS_AT_ONCE = 1024  # FAISS holds a distance to every centroid for each


def make_codec(name: str, shape: MemoryShape) -> Codec:
    """A codec by name, for memories of a shape; FAISS codecs come untrained.

    Args:
        name: "fp32", "bf16", "int8", "int4", "faiss", or a FAISS factory string.
        shape: of the memories.

    Raises:
        BankError: no such codec, or not for this head width.
        ConfigError: it needs FAISS, which is not installed.
    """
    if name in ("fp32", "bf16"):
        return _Floats(name, shape)
    if name in ("int8", "int4"):
        return _Integers(name, shape)
    return FaissCodec(name, shape)


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
            if bool(empty_nst.any()):
                vectors_nstd.masked_fill_(empty_nst[..., None], 0)
            decoded.append(vectors_nstd.to(dtype))
        return Memories(decoded[0], decoded[1], torch.from_numpy(places), torch.from_numpy(kept))

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


class _Floats(Codec):
    """The numbers themselves."""

    def __init__(self, name: str, shape: MemoryShape) -> None:
        super().__init__(name, shape)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        self.vector_bytes = shape.head_dim * self._dtype.itemsize

    def _encode_vectors(self, vectors_qd: Tensor, kind: str) -> Tensor:
        return vectors_qd.to(self._dtype).contiguous().view(torch.uint8)

    def _decode_vectors(self, codes_qb: Tensor, kind: str) -> Tensor:
        return codes_qb.view(self._dtype).to(torch.float32, copy=True)


class _Integers(Codec):
    """int8 or int4, symmetric: the largest entry of a vector gets the largest code.

    The scale is an fp16 and the codes are rounded against it as stored, so its own rounding costs
    nothing but range. Vectors whose entries are all below about 4e-6 (int8) lose precision, for
    their scale is a subnormal; those above 65504 * 127 (int4: * 7) are refused.
    """

    def __init__(self, name: str, shape: MemoryShape) -> None:
        super().__init__(name, shape)
        self._largest = {"int8": 127, "int4": 7}[name]
        self.vector_bytes = 2 + (shape.head_dim if name == "int8" else (shape.head_dim + 1) // 2)

    def _encode_vectors(self, vectors_qd: Tensor, kind: str) -> Tensor:
        scales_q = (vectors_qd.abs().amax(1) / self._largest).to(torch.float16)
        if not scales_q.isfinite().all():
            peak = float(vectors_qd.abs().max())
            raise BankError(f"{kind} as large as {peak:.3g} do not fit {self.name}: use bf16")
        stored_q = scales_q.float()
        inverse_q = torch.where(stored_q > 0, 1 / stored_q, 0.0)
        scaled_qd = (vectors_qd * inverse_q[:, None]).round_()
        entries_qd = scaled_qd.clamp_(-self._largest, self._largest).to(torch.int8)
        if self.name == "int4":
            if entries_qd.shape[1] % 2:
                entries_qd = torch.nn.functional.pad(entries_qd, (0, 1))
            nibbles = entries_qd.view(torch.uint8) & 15
            packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
        else:
            packed = entries_qd.view(torch.uint8)
        return torch.cat((scales_q[:, None].contiguous().view(torch.uint8), packed), dim=1)

    def _decode_vectors(self, codes_qb: Tensor, kind: str) -> Tensor:
        decode = decode_int8 if self.name == "int8" else decode_int4
        return decode(codes_qb, self.shape.head_dim)


class FaissCodec(Codec):
    """Vectors as the standalone codes of a FAISS index.

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
                f"{shape.head_dim} that codes vectors alone ({_faiss_says(error)})"
            ) from None
        self._indexes: dict[str, Any] = {}
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
        return max([1, *(_codebook_sizes(self._new_index()))])

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
        filled_nst = (torch.arange(t) < sample.kept_n.cpu()[:, None, None]).expand(-1, s, t)
        have, need = int(filled_nst.sum()), self.vectors_needed
        if have < need:
            raise BankError(
                f"codec {self.name!r} needs at least {need:,} keys to be trained, the "
                f"{len(sample):,} memories given hold {have:,}: add more documents, or use int8"
            )
        drawn = torch.randperm(have, generator=torch.Generator().manual_seed(seed))[: 16 * need]
        indexes = {}
        for kind, part in zip(KINDS, (sample.keys_nstd, sample.values_nstd), strict=True):
            vectors_qd = part.detach().cpu()[filled_nst][drawn].float().numpy()
            indexes[kind] = index = self._new_index()
            try:
                _train_quietly(index, vectors_qd, iterations=iterations, seed=seed)
            except RuntimeError as error:
                raise BankError(
                    f"FAISS cannot train {self.factory!r} on {len(vectors_qd):,} {kind}: "
                    f"{_faiss_says(error)}: add more documents, or use int8"
                ) from None
        self._take(indexes)

    def state_dict(self) -> dict[str, Tensor]:
        """The two FAISS indexes, as their bytes."""
        faiss = require("faiss", extra="bank", purpose="this codec")
        return {
            kind: torch.from_numpy(faiss.serialize_index(index).copy())
            for kind, index in self._indexes.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """See `Codec.load_state_dict`."""
        faiss = require("faiss", extra="bank", purpose="this codec")
        if sorted(state) != sorted(KINDS):
            raise BankError(f"not a state of codec {self.name!r}: holds {sorted(state)}")
        try:
            indexes = {kind: faiss.deserialize_index(state[kind].numpy()) for kind in KINDS}
        except RuntimeError as error:
            raise BankError(f"FAISS cannot read the codec's state: {_faiss_says(error)}") from None
        for kind, index in indexes.items():
            fits = index.d == self.shape.head_dim and index.sa_code_size() == self.vector_bytes
            if not fits or not index.is_trained:
                raise BankError(
                    f"the {kind} of the codec's state are for width {index.d}, not for "
                    f"{self.factory!r} at width {self.shape.head_dim}"
                )
        self._take(indexes)

    def _take(self, indexes: dict[str, Any]) -> None:
        books = {kind: _residual_books(index) for kind, index in indexes.items()}
        self._indexes = indexes
        self._books = {kind: found for kind, found in books.items() if found is not None}

    def _new_index(self) -> Any:
        return require("faiss", extra="bank", purpose="this codec").index_factory(
            self.shape.head_dim, self.factory
        )

    def _encode_vectors(self, vectors_qd: Tensor, kind: str) -> Tensor:
        if kind in self._books:
            return encode_residual(vectors_qd, self._books[kind])
        index = self._indexes[kind]
        parts = [
            index.sa_encode(part.numpy())
            for part in vectors_qd.split(_VECTORS_AT_ONCE)
            if len(part)
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


def save_codec(codec: Codec, path: Path) -> str:
    """Write a codec's state; returns the sha256 of the file."""
    from safetensors.torch import save

    content = save(codec.state_dict())
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_codec(name: str, shape: MemoryShape, path: Path, sha256: str) -> Codec:
    """A trained codec from the file that `save_codec` wrote.

    Nothing of the file is interpreted before its checksum matched.

    Raises:
        BankError: it is missing, damaged or of another codec.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    codec = make_codec(name, shape)
    try:
        if path.stat().st_size > _MAX_STATE_BYTES:
            raise BankError(f"{path} is larger than {_MAX_STATE_BYTES // 2**20} MiB: not a codec")
        content = path.read_bytes()
    except OSError as error:
        raise BankError(f"{path} cannot be read ({error.strerror}): the bank is damaged") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BankError(f"{path} is damaged: not the codec that this bank was written with")
    try:
        codec.load_state_dict(load(content))
    except SafetensorError as error:
        raise BankError(f"{path} is not a codec's state: {error}") from None
    return codec


def _little(numbers: Tensor, dtype: str) -> Tensor:
    """Integers (n, ...) as little-endian bytes (n, bytes)."""
    array = np.ascontiguousarray(numbers.flatten(1).numpy().astype(dtype))
    return torch.from_numpy(array.view(np.uint8))


def _parts(index: Any) -> tuple[Any, Any]:
    """(linear transform or None, what follows it) of a FAISS index."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    if not isinstance(index, faiss.IndexPreTransform):
        return None, index
    if index.chain.size() != 1:
        return None, None
    return faiss.downcast_VectorTransform(index.chain.at(0)), faiss.downcast_index(index.index)


def _residual_books(index: Any) -> ResidualBooks | None:
    """The codebooks of a trained index, if it is of the form that our loops read."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    transform, inner = _parts(index)
    if not isinstance(inner, faiss.Index2Layer):
        return None
    coarse = faiss.downcast_index(inner.q1.quantizer)
    if not isinstance(coarse, faiss.MultiIndexQuantizer):
        return None
    rotation = None
    if transform is not None:
        # Written and read again, an OPQ matrix is a plain linear transform.
        linear = isinstance(transform, faiss.LinearTransform) and not transform.have_bias
        if not linear or not transform.is_orthonormal or transform.d_in != transform.d_out:
            return None
        matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
        rotation = torch.from_numpy(matrix).clone()

    def book(pq: Any) -> Tensor:
        entries = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub)
        return torch.from_numpy(entries).clone()

    books = ResidualBooks(book(coarse.pq), book(inner.pq), rotation)
    fits = books.coarse_bytes == inner.code_size_1 and books.code_bytes == inner.code_size
    return books if fits else None


def _quantizers(index: Any) -> list[Any]:
    """Product quantizers inside an index, whose codebooks k-means fits."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    _, inner = _parts(index)
    found = [inner.pq] if hasattr(inner, "pq") else []
    if isinstance(inner, faiss.Index2Layer):
        coarse = faiss.downcast_index(inner.q1.quantizer)
        found += [coarse.pq] if hasattr(coarse, "pq") else []
    return found


def _codebook_sizes(index: Any) -> list[int]:
    faiss = require("faiss", extra="bank", purpose="this codec")
    transform, inner = _parts(index)
    sizes = [int(pq.ksub) for pq in _quantizers(index)]
    if isinstance(transform, faiss.OPQMatrix):
        sizes.append(256)  # it fits a product quantizer of 8 bits meanwhile
    if hasattr(inner, "nlist"):
        sizes.append(int(inner.nlist))
    return sizes


def _train_quietly(index: Any, vectors_qd: np.ndarray, *, iterations: int, seed: int) -> None:
    """Train without FAISS' warnings about small samples, and in bounded memory."""
    faiss = require("faiss", extra="bank", purpose="this codec")
    transform, _ = _parts(index)
    quantizers = _quantizers(index)
    for_rotation = None
    if isinstance(transform, faiss.OPQMatrix):
        for_rotation = faiss.ProductQuantizer(transform.d_out, transform.M, 8)
        transform.pq, transform.niter = for_rotation, min(transform.niter, 5 * iterations)
        quantizers.append(for_rotation)
    for pq in quantizers:
        pq.cp.niter, pq.cp.seed, pq.cp.min_points_per_centroid = iterations, seed + 1, 1
    before = (
        faiss.cvar.multi_index_quantizer_search_bs,
        faiss.cvar.product_quantizer_compute_codes_bs,
    )
    # Else FAISS holds a distance to each of 2 x 16,384 centroids for 32,768 vectors: 4 GiB.
    faiss.cvar.multi_index_quantizer_search_bs = _VECTORS_AT_ONCE
    faiss.cvar.product_quantizer_compute_codes_bs = _VECTORS_AT_ONCE
    try:
        index.train(vectors_qd)
    finally:
        faiss.cvar.multi_index_quantizer_search_bs = before[0]
        faiss.cvar.product_quantizer_compute_codes_bs = before[1]
        if for_rotation is not None:
            transform.pq = None  # ours, and about to go


def _faiss_says(error: RuntimeError) -> str:
    """What FAISS means, without its source file."""
    return str(error).rpartition("Error: ")[2].rpartition(": ")[2].strip() or "unknown fault"
