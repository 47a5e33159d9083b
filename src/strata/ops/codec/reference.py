"""Codes to vectors in plain torch: slow, short and exact. Shapes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor

from strata.ops.codec import SCALE_BYTES, ResidualBooks
from strata.ops.precision import without_autocast

_CHUNK = 65_536  # vectors at once: bits of a code are spread out as int64


def decode_int8(codes_nb: Tensor, width: int) -> Tensor:
    """See the package."""
    scales_n = _scales(codes_nb)
    entries_nd = codes_nb[:, SCALE_BYTES : SCALE_BYTES + width].contiguous().view(torch.int8)
    return scales_n[:, None] * entries_nd.float()


def decode_int4(codes_nb: Tensor, width: int) -> Tensor:
    """See the package."""
    pairs_np = codes_nb[:, SCALE_BYTES:]
    nibbles_nd = torch.stack((pairs_np & 15, pairs_np >> 4), dim=-1).flatten(1)[:, :width]
    entries_nd = (nibbles_nd.to(torch.int8) ^ 8) - 8
    return _scales(codes_nb)[:, None] * entries_nd.float()


def decode_residual(codes_nb: Tensor, books: ResidualBooks) -> Tensor:
    """See the package."""
    parts = []
    for codes in codes_nb.split(_CHUNK):
        vectors_nd = _look_up(codes[:, : books.coarse_bytes], books.coarse_mkd)
        vectors_nd += _look_up(codes[:, books.coarse_bytes :], books.fine_mkd)
        if books.rotation_dd is not None:
            with without_autocast(codes.device):
                vectors_nd = vectors_nd @ books.rotation_dd
        parts.append(vectors_nd)
    return torch.cat(parts) if parts else books.fine_mkd.new_empty(0, books.width)


def _scales(codes_nb: Tensor) -> Tensor:
    return codes_nb[:, :SCALE_BYTES].flatten().view(torch.float16).float()


def _look_up(codes_nb: Tensor, book_mkd: Tensor) -> Tensor:
    """The entries that packed indices name, side by side: (n, d)."""
    m, k, _ = book_mkd.shape
    num_bits = k.bit_length() - 1
    places = torch.arange(8, device=codes_nb.device)
    bits_nq = (codes_nb[:, :, None] >> places & 1).flatten(1)[:, : m * num_bits].long()
    powers = 1 << torch.arange(num_bits, device=codes_nb.device)
    indices_nm = (bits_nq.reshape(-1, m, num_bits) * powers).sum(-1)
    return book_mkd[torch.arange(m, device=codes_nb.device), indices_nm].flatten(1)
