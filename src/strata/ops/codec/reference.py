"""Codes to vectors in plain torch: slow, short and exact. Shapes as in the package."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from strata.ops.codec import SCALE_BYTES, ResidualBooks
from strata.ops.precision import without_autocast

_VECTORS = 1024  # encoded at once: a distance to every entry is held for each
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


def encode_residual(vectors_nd: Tensor, books: ResidualBooks) -> Tensor:
    """See the package."""
    parts = []
    for vectors in vectors_nd.split(_VECTORS):
        with without_autocast(vectors.device):
            turned_nd = vectors if books.rotation_dd is None else vectors @ books.rotation_dd.T
            codes = []
            for book_mkd in (books.coarse_mkd, books.fine_mkd):
                indices_nm, near_nd = _nearest(turned_nd, book_mkd)
                turned_nd = turned_nd - near_nd
                codes.append(packed(indices_nm, book_mkd.shape[1].bit_length() - 1))
        parts.append(torch.cat(codes, 1))
    if not parts:
        return torch.empty(0, books.code_bytes, dtype=torch.uint8, device=vectors_nd.device)
    return torch.cat(parts)


def packed(indices_nm: Tensor, num_bits: int) -> Tensor:
    """Indices of so many bits each as bytes, the lowest bit first: (n, bytes) uint8."""
    places = torch.arange(num_bits, device=indices_nm.device)
    bits_nq = (indices_nm[:, :, None] >> places & 1).flatten(1)
    bits_nq = F.pad(bits_nq, (0, -bits_nq.shape[1] % 8))
    powers = 1 << torch.arange(8, device=indices_nm.device)
    return (bits_nq.unflatten(1, (-1, 8)) * powers).sum(-1).to(torch.uint8)


def _nearest(vectors_nd: Tensor, book_mkd: Tensor) -> tuple[Tensor, Tensor]:
    """Which entry of each codebook is nearest (n, m), and these side by side (n, d)."""
    m = book_mkd.shape[0]
    parts_mnd = vectors_nd.unflatten(1, (m, -1)).transpose(0, 1)
    halves_mk = book_mkd.square().sum(2) / 2  # of the distance, what depends on the entry
    indices_mn = (halves_mk[:, None] - parts_mnd @ book_mkd.mT).argmin(2)
    near_mnd = book_mkd[torch.arange(m, device=book_mkd.device)[:, None], indices_mn]
    return indices_mn.T, near_mnd.transpose(0, 1).flatten(1)


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
