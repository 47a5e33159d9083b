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
from strata.ops.codec.reference import packed
from strata.ops.kernels import as_array, kernel
from strata.ops.precision import without_autocast
from strata.ops.threads import even_bounds, run_split

# A tile of entries 32 wide is 16 KiB: it stays in the first cache for all vectors of a block.
_TILE, _BLOCK, _LANES = 128, 64, 16


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


def encode_residual(vectors_nd: Tensor, books: ResidualBooks) -> Tensor:
    """See the package."""
    with without_autocast(vectors_nd.device):
        rotation_dd = books.rotation_dd
        left_nd = vectors_nd.clone() if rotation_dd is None else vectors_nd @ rotation_dd.T
    codes = []
    for book_mkd in (books.coarse_mkd, books.fine_mkd):
        m, k = book_mkd.shape[:2]
        tiles, halves = _tiles(book_mkd)
        indices_nm = torch.zeros(len(left_nd), m, dtype=torch.int32)
        bounds = even_bounds(len(left_nd), bytes_per_item=4 * m * k)
        arrays = as_array(book_mkd.contiguous()), as_array(indices_nm), as_array(left_nd)
        run_split(_nearest, bounds, tiles, halves, *arrays)
        codes.append(packed(indices_nm, k.bit_length() - 1))
    return torch.cat(codes, 1)


def _tiles(book_mkd: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Entries by columns, `_TILE` of them in one piece, and half their squared lengths.

    A codebook is filled up with entries that are infinitely far.
    """
    m, k, width = book_mkd.shape
    num_tiles = -(-k // _TILE)
    filled = torch.zeros(m, num_tiles * _TILE, width)
    filled[:, :k] = book_mkd
    halves = torch.full((m, num_tiles * _TILE), torch.inf)
    halves[:, :k] = book_mkd.square().sum(2) / 2
    tiles = filled.unflatten(1, (num_tiles, _TILE)).mT.contiguous()
    return as_array(tiles), as_array(halves.unflatten(1, (num_tiles, _TILE)).contiguous())


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


@kernel
def _nearest(tiles, halves, book, indices, left, start, stop):  # type: ignore[no-untyped-def]
    """The nearest entry of each part of each vector; what it leaves of the vector stays there.

    |x - c|^2 / 2 without the part of x alone is |c|^2 / 2 - x . c.
    """
    m, num_tiles, width, _ = tiles.shape
    far = np.empty(_TILE, np.float32)
    lows = np.empty(_LANES, np.float32)
    best = np.empty(_BLOCK, np.float32)
    for block in range(start, stop, _BLOCK):
        end = min(block + _BLOCK, stop)
        for part in range(m):
            at = part * width
            best[:] = np.inf
            for tile in range(num_tiles):
                for i in range(block, end):
                    for t in range(_TILE):
                        far[t] = halves[part, tile, t]
                    j = 0
                    while j + 4 <= width:
                        a, b, c, d = (
                            left[i, at + j],
                            left[i, at + j + 1],
                            left[i, at + j + 2],
                            left[i, at + j + 3],
                        )
                        for t in range(_TILE):
                            far[t] -= (
                                a * tiles[part, tile, j, t]
                                + b * tiles[part, tile, j + 1, t]
                                + c * tiles[part, tile, j + 2, t]
                                + d * tiles[part, tile, j + 3, t]
                            )
                        j += 4
                    while j < width:
                        a = left[i, at + j]
                        for t in range(_TILE):
                            far[t] -= a * tiles[part, tile, j, t]
                        j += 1
                    for lane in range(_LANES):
                        lows[lane] = far[lane]
                    for base in range(_LANES, _TILE, _LANES):
                        for lane in range(_LANES):
                            other = far[base + lane]
                            lows[lane] = other if other < lows[lane] else lows[lane]
                    low = lows[0]
                    for lane in range(1, _LANES):
                        low = min(low, lows[lane])
                    if low < best[i - block]:  # seldom: once for each time the record falls
                        best[i - block] = low
                        t = 0
                        while far[t] != low:
                            t += 1
                        indices[i, part] = tile * _TILE + t
            for i in range(block, end):
                for j in range(width):
                    left[i, at + j] -= book[part, indices[i, part], j]
