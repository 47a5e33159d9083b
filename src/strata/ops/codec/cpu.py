"""Codes to vectors as loops that numba compiles. Same signatures as `reference.py`.

Codebook entries are summed in the quantizer's own space, and one matrix product turns all vectors
back: turning the codebooks once instead would make each of their entries d wide, and reading ten of
them per vector costs more than the product.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from strata.ops.codec import SCALE_BYTES, ResidualBooks
from strata.ops.kernels import as_array, kernel
from strata.ops.precision import without_autocast
from strata.ops.threads import even_bounds, run_split


def decode_int8(codes_nb: Tensor, width: int) -> Tensor:
    """See the package."""
    out_nd = torch.empty(len(codes_nb), width)
    scales, codes = _scales(codes_nb), as_array(codes_nb)
    bounds = even_bounds(len(codes_nb), bytes_per_item=4 * width)
    run_split(_int8, bounds, codes, scales, as_array(out_nd))
    return out_nd


def decode_int4(codes_nb: Tensor, width: int) -> Tensor:
    """See the package."""
    out_nd = torch.empty(len(codes_nb), width)
    scales, codes = _scales(codes_nb), as_array(codes_nb)
    bounds = even_bounds(len(codes_nb), bytes_per_item=4 * width)
    run_split(_int4, bounds, codes, scales, as_array(out_nd))
    return out_nd


def decode_residual(codes_nb: Tensor, books: ResidualBooks) -> Tensor:
    """See the package."""
    sums_nd = torch.empty(len(codes_nb), books.width)
    bounds = even_bounds(len(codes_nb), bytes_per_item=8 * books.width)
    for book_mkd, first_byte in ((books.coarse_mkd, 0), (books.fine_mkd, books.coarse_bytes)):
        book = as_array(book_mkd.contiguous())
        index_bits, add = book.shape[1].bit_length() - 1, first_byte > 0
        run_split(
            _entries,
            bounds,
            as_array(codes_nb),
            first_byte,
            book,
            index_bits,
            add,
            as_array(sums_nd),
        )
    if books.rotation_dd is None:
        return sums_nd
    with without_autocast(sums_nd.device):
        return sums_nd @ books.rotation_dd


def _scales(codes_nb: Tensor) -> np.ndarray:
    scales = np.ascontiguousarray(as_array(codes_nb)[:, :SCALE_BYTES]).view(np.float16)
    return scales[:, 0].astype(np.float32)


@kernel
def _int8(codes, scales, out, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        scale = scales[i]
        for j in range(out.shape[1]):
            out[i, j] = scale * np.float32(np.int8(codes[i, 2 + j]))


@kernel
def _int4(codes, scales, out, start, stop):  # type: ignore[no-untyped-def]
    for i in range(start, stop):
        scale = scales[i]
        for j in range(out.shape[1]):
            nibble = np.int32(codes[i, 2 + j // 2]) >> np.int32(4 * (j % 2)) & np.int32(15)
            out[i, j] = scale * np.float32((nibble ^ np.int32(8)) - np.int32(8))


@kernel
def _entries(codes, first_byte, book, index_bits, add, out, start, stop):  # type: ignore[no-untyped-def]
    """Write the entries that packed indices name side by side, or add them to what is there."""
    m, k, width = book.shape
    mask, step = np.uint64(k - 1), np.uint64(index_bits)
    for i in range(start, stop):
        bits, num_bits, place = np.uint64(0), 0, first_byte
        for part in range(m):
            while num_bits < index_bits:
                bits |= np.uint64(codes[i, place]) << np.uint64(num_bits)
                num_bits += 8
                place += 1
            index = bits & mask
            bits >>= step
            num_bits -= index_bits
            if add:
                for j in range(width):
                    out[i, part * width + j] += book[part, index, j]
            else:
                for j in range(width):
                    out[i, part * width + j] = book[part, index, j]
