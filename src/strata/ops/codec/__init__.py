"""Vectors from their codes: int8 and int4 with a scale each, and FAISS' residual product codes.

The last also the other way: vectors to codes, which FAISS does by tables of all distances.

A code is the bytes of one vector, little-endian:

    int8   fp16 scale, then d signed bytes
    int4   fp16 scale, then ceil(d / 2) bytes: two's complement nibbles, the even place low
    residual product   coarse indices packed bit by bit from the lowest, filled up to a byte;
           then fine indices, packed likewise: what FAISS' `[OPQ..,]ResidualMxN,PQMxN` writes

Every bit pattern decodes to something: an index cannot point outside its codebook.

Shapes: n vectors, d width, b bytes of a code; m sub-vectors of a codebook, k entries each.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from strata.ops.kernels import supported

__all__ = ["ResidualBooks", "decode_int4", "decode_int8", "decode_residual", "encode_residual"]

SCALE_BYTES = 2


@dataclass(frozen=True)
class ResidualBooks:
    """Codebooks of a residual product quantizer: a coarse one, a fine one for what it leaves.

    Attributes:
        coarse_mkd: (m, k, d / m), fp32, contiguous; k a power of two.
        fine_mkd: (m', k', d / m'), the same.
        rotation_dd: (d, d) fp32, orthonormal: the quantizers saw rotation @ vector. None for none.
    """

    coarse_mkd: Tensor
    fine_mkd: Tensor
    rotation_dd: Tensor | None

    def __post_init__(self) -> None:
        widths = {book.shape[0] * book.shape[2] for book in (self.coarse_mkd, self.fine_mkd)}
        if len(widths) > 1:
            raise ValueError(f"the codebooks are of different widths: {sorted(widths)}")
        for book in (self.coarse_mkd, self.fine_mkd):
            if book.dtype != torch.float32 or book.ndim != 3 or book.shape[1].bit_count() != 1:
                raise ValueError(
                    f"a codebook is fp32 (m, k, d / m) with k a power of two, given {book.dtype} "
                    f"{tuple(book.shape)}"
                )
        if self.rotation_dd is not None and self.rotation_dd.shape != (self.width, self.width):
            raise ValueError(f"the rotation is {tuple(self.rotation_dd.shape)}, not d x d")

    @property
    def width(self) -> int:
        """d."""
        return self.fine_mkd.shape[0] * self.fine_mkd.shape[2]

    @property
    def coarse_bytes(self) -> int:
        """Bytes of the coarse indices of one vector."""
        return _packed_bytes(self.coarse_mkd)

    @property
    def code_bytes(self) -> int:
        """b."""
        return self.coarse_bytes + _packed_bytes(self.fine_mkd)


def decode_int8(codes_nb: Tensor, width: int) -> Tensor:
    """Vectors of int8 codes.

    Args:
        codes_nb: (n, 2 + d) uint8, contiguous.
        width: d.

    Returns:
        (n, d) fp32: scale * code.

    Raises:
        ValueError: the codes are of another width.
    """
    _check(codes_nb, SCALE_BYTES + width)
    return _implementation(codes_nb).decode_int8(codes_nb, width)


def decode_int4(codes_nb: Tensor, width: int) -> Tensor:
    """Vectors of int4 codes, (n, 2 + ceil(d / 2)) uint8; the rest as `decode_int8`."""
    _check(codes_nb, SCALE_BYTES + (width + 1) // 2)
    return _implementation(codes_nb).decode_int4(codes_nb, width)


def decode_residual(codes_nb: Tensor, books: ResidualBooks) -> Tensor:
    """Vectors of residual product codes: rotation^T @ (coarse entry + fine entry).

    Args:
        codes_nb: (n, b) uint8, contiguous, on the books' device.
        books: the codebooks.

    Returns:
        (n, d) fp32.

    Raises:
        ValueError: the codes are of another width.

    Source: FAISS, `Index2Layer` behind `IndexPreTransform`; "Memory3" (arXiv 2407.01178), 3.4.
    """
    _check(codes_nb, books.code_bytes)
    return _implementation(codes_nb).decode_residual(codes_nb, books)


def encode_residual(vectors_nd: Tensor, books: ResidualBooks) -> Tensor:
    """Residual product codes of vectors: the nearest coarse entries, then the nearest fine ones.

    Of entries that are equally near, up to the rounding of fp32, any may be taken.

    Args:
        vectors_nd: fp32, contiguous, finite, on the books' device.
        books: the codebooks.

    Returns:
        (n, b) uint8, as `decode_residual` takes them.

    Raises:
        ValueError: the vectors are of another width or dtype.

    Source: as `decode_residual`.
    """
    if vectors_nd.dtype != torch.float32 or vectors_nd.shape[1:] != (books.width,):
        raise ValueError(
            f"vectors must be fp32 (n, {books.width}), given {vectors_nd.dtype} "
            f"{tuple(vectors_nd.shape)}"
        )
    return _implementation(vectors_nd).encode_residual(vectors_nd, books)


def _packed_bytes(book_mkd: Tensor) -> int:
    num_bits = book_mkd.shape[0] * (book_mkd.shape[1].bit_length() - 1)
    return (num_bits + 7) // 8


def _check(codes_nb: Tensor, code_bytes: int) -> None:
    if codes_nb.dtype != torch.uint8 or codes_nb.ndim != 2 or codes_nb.shape[1] != code_bytes:
        raise ValueError(
            f"codes must be uint8 (n, {code_bytes}), given {codes_nb.dtype} {tuple(codes_nb.shape)}"
        )


def _implementation(given: Tensor) -> ModuleType:
    if given.device.type == "cpu" and given.is_contiguous() and supported():
        from strata.ops.codec import cpu

        return cpu
    from strata.ops.codec import reference

    return reference
