"""The weighted bag on a CPU, through torch's own embedding-bag kernels.

Same signatures as `reference.py`. `embedding_bag` sums each bag without gathering its rows into
memory, and its gradient to the per-sample weights is exactly `bag_dots`. The value gradient is a
bag again: sort the picks by row, and each run of equal rows is a bag over grad_out. bf16 and fp16
tables take the reference: torch's kernel would round the weights and the sums to the table's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from strata.ops.precision import accumulation_dtype
from strata.ops.weighted_bag import reference

_SUM = 0  # embedding_bag's mode number
_LONG_RUN = 256  # uses of one row added up in one go


def bag_forward(values_rv: Tensor, rows_np: Tensor, weights_np: Tensor) -> Tensor:
    """See `reference.bag_forward`."""
    _check_rows(values_rv, rows_np)
    if not _supported(values_rv, rows_np):
        return reference.bag_forward(values_rv, rows_np, weights_np)
    weights_np = weights_np.to(values_rv.dtype)
    return F.embedding_bag(rows_np, values_rv, mode="sum", per_sample_weights=weights_np)


def bag_dots(values_rv: Tensor, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
    """See `reference.bag_dots`."""
    _check_rows(values_rv, rows_np)
    if not _supported(values_rv, rows_np):
        return reference.bag_dots(values_rv, rows_np, vectors_nv)
    n, p = rows_np.shape
    starts_n = torch.arange(n, device=rows_np.device) * p
    bag_of_pick_q = torch.arange(n, device=rows_np.device).repeat_interleave(p)
    dots_q = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        vectors_nv.to(values_rv.dtype).contiguous(),
        values_rv,
        rows_np.reshape(-1),
        starts_n,
        bag_of_pick_q,
        _SUM,
    )
    return dots_q.view(n, p)


def row_gradients(
    rows_np: Tensor, weights_np: Tensor, grad_out_nv: Tensor
) -> tuple[Tensor, Tensor]:
    """See `reference.row_gradients`.

    A run of many uses of one hot row is summed in parts, and the parts like a run: one running
    fp32 sum of 10,000 equal terms was seen to drift by 1e-4, and would keep one core busy alone.
    """
    if rows_np.numel() == 0:
        return reference.row_gradients(rows_np, weights_np, grad_out_nv)
    wide = accumulation_dtype(grad_out_nv)
    sorted_q, order_q = rows_np.reshape(-1).sort(stable=True)
    rows_u, counts_u = torch.unique_consecutive(sorted_q, return_counts=True)
    starts_u = counts_u.cumsum(0) - counts_u
    parts_u = (counts_u + _LONG_RUN - 1) // _LONG_RUN
    run_s = torch.arange(len(rows_u), device=rows_np.device).repeat_interleave(parts_u)
    first_u = parts_u.cumsum(0) - parts_u
    part_s = torch.arange(len(run_s), device=rows_np.device) - first_u[run_s]
    grad_sv = F.embedding_bag(
        order_q // rows_np.shape[1],
        grad_out_nv.to(wide).contiguous(),
        starts_u[run_s] + part_s * _LONG_RUN,
        mode="sum",
        per_sample_weights=weights_np.reshape(-1)[order_q].to(wide),
    )
    if len(run_s) > len(rows_u):
        _, grad_sv = row_gradients(run_s[:, None], torch.ones_like(grad_sv[:, :1]), grad_sv)
    return rows_u, grad_sv


def _check_rows(values_rv: Tensor, rows_np: Tensor) -> None:
    """torch's kernel for the dots reads whatever lies at a wrong index."""
    if rows_np.numel() == 0:
        return
    low, high = (int(bound) for bound in rows_np.aminmax())
    if low < 0 or high >= len(values_rv):
        wrong = low if low < 0 else high
        raise IndexError(f"row {wrong} is not in the table: 0..{len(values_rv) - 1} are")


def _supported(values_rv: Tensor, rows_np: Tensor) -> bool:
    wide = values_rv.dtype in (torch.float32, torch.float64)
    return wide and rows_np.numel() > 0 and values_rv.is_contiguous()
