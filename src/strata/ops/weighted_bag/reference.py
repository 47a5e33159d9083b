"""The weighted bag, its adjoint and its value gradient in plain torch: slow, short and exact.

Shapes: n bags, p picks per bag, r rows of the table, v width, u unique rows.
Sums run in fp32 (fp64 for fp64 tables) whatever the table's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from strata.ops.precision import accumulation_dtype, without_autocast

_CHUNK_BYTES = 32 * 2**20  # gathered rows held at once


def bag_forward(values_rv: Tensor, rows_np: Tensor, weights_np: Tensor) -> Tensor:
    """Sum the weighted rows of each bag: out[n] = sum_p weights[n, p] * values[rows[n, p]]."""
    wide = accumulation_dtype(values_rv)
    out_nv = torch.empty(rows_np.shape[0], values_rv.shape[1], dtype=wide, device=values_rv.device)
    for part in _chunks(rows_np, values_rv):
        gathered_npv = _rows(values_rv, rows_np[part]).to(wide)
        with without_autocast(values_rv.device):
            out_nv[part] = torch.einsum("np,npv->nv", weights_np[part].to(wide), gathered_npv)
    return out_nv


def bag_dots(values_rv: Tensor, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
    """Dot each picked row with its bag's vector: out[n, p] = values[rows[n, p]] . vectors[n]."""
    wide = accumulation_dtype(values_rv)
    out_np = torch.empty(rows_np.shape, dtype=wide, device=values_rv.device)
    for part in _chunks(rows_np, values_rv):
        gathered_npv = _rows(values_rv, rows_np[part]).to(wide)
        with without_autocast(values_rv.device):
            out_np[part] = torch.einsum("npv,nv->np", gathered_npv, vectors_nv[part].to(wide))
    return out_np


def row_gradients(
    rows_np: Tensor, weights_np: Tensor, grad_out_nv: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient to the rows that were read, by reverse index; nothing of the table's size.

    A stable sort of the picks puts the uses of one row side by side; each run is then itself a
    weighted bag, over grad_out. The order of summation is fixed, so results repeat bit for bit.

    Returns:
        rows_u: rows that were read, ascending, int64.
        grad_uv: their gradients, fp32 (fp64 for fp64 grad_out).
    """
    wide = accumulation_dtype(grad_out_nv)
    sorted_q, order_q = rows_np.reshape(-1).sort(stable=True)
    rows_u, segment_q = torch.unique_consecutive(sorted_q, return_inverse=True)
    grad_uv = torch.zeros(len(rows_u), grad_out_nv.shape[1], dtype=wide, device=rows_np.device)
    weights_q = weights_np.reshape(-1)[order_q].to(wide)
    bags_q = order_q // max(rows_np.shape[1], 1)
    step = max(1, _CHUNK_BYTES // (grad_out_nv.shape[1] * grad_out_nv.element_size()))
    for start in range(0, len(order_q), step):
        part = slice(start, start + step)
        scaled_qv = weights_q[part, None] * grad_out_nv[bags_q[part]].to(wide)
        grad_uv.index_add_(0, segment_q[part], scaled_qv)
    return rows_u, grad_uv


def _chunks(rows_np: Tensor, values_rv: Tensor) -> list[slice]:
    bytes_per_bag = max(1, rows_np.shape[1] * values_rv.shape[1] * 4)
    step = max(1, _CHUNK_BYTES // bytes_per_bag)
    return [slice(start, start + step) for start in range(0, rows_np.shape[0], step)]


def _rows(values_rv: Tensor, rows: Tensor) -> Tensor:
    """values[rows]; fp8 through its bits, for not every build of torch can index it."""
    if values_rv.dtype == torch.float8_e4m3fn:
        return values_rv.view(torch.uint8)[rows].view(torch.float8_e4m3fn)
    return values_rv[rows]
