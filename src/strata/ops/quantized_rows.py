"""Table rows as 8-bit codes with one scale each: writing them, and reading them by the bag.

Row r is `scales[r] * codes[r]`. The scale is folded into a bag's weights, and multiplied onto a
dot, so that no row is ever widened in memory: the loops of `weighted_bag` read the codes as they
read any table. Codes are int8 or fp8 (e4m3fn, for rows with outliers).

Shapes: n bags, p picks per bag, r rows, v width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from strata.ops.rows import check_rows
from strata.ops.weighted_bag import row_dots, weighted_bag

Codes = Literal["int8", "fp8"]

CODE_DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST: dict[str, float] = {"int8": 127.0, "fp8": 448.0}
_SMALLEST_PEAK = 1e-35


def quantize_rows(values_rv: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
    """Write rows as codes: symmetric, the largest entry of a row gets the largest code.

    Args:
        values_rv: (r, v), any float dtype. All of it is held in fp32 meanwhile: give blocks of a
            large table.
        codes: "int8" (steps of max / 127) or "fp8" (e4m3fn, 448 the largest).

    Returns:
        codes_rv: (r, v), int8 or float8_e4m3fn, rounded to nearest even.
        scales_r: (r,), fp32; 0 for a row whose entries are all below 1e-35.

    Raises:
        ValueError: an entry is not finite; it names the first such row.
    """
    largest = _LARGEST[codes]
    wide_rv = values_rv.detach().to(torch.float32)
    peaks_r = wide_rv.abs().amax(1) if wide_rv.shape[1] else wide_rv.new_zeros(len(wide_rv))
    finite_r = peaks_r.isfinite()
    if not finite_r.all():
        row = int(finite_r.logical_not().nonzero()[0])
        raise ValueError(f"row {row} holds NaN or infinity: it cannot be written as {codes}")
    # Rows of zeros, and rows so small that the inverse of their scale is no fp32, are zero.
    alive_r = peaks_r > _SMALLEST_PEAK
    scales_r = torch.where(alive_r, peaks_r / largest, 0.0)
    inverse_r = torch.where(alive_r, largest / peaks_r, 0.0)
    scaled_rv = (wide_rv * inverse_r[:, None]).clamp_(-largest, largest)
    if codes == "int8":
        scaled_rv.round_()
    return scaled_rv.to(CODE_DTYPES[codes]), scales_r


def quantized_bag(
    codes_rv: Tensor, scales_r: Tensor, rows_np: Tensor, weights_np: Tensor
) -> Tensor:
    """`weighted_bag` over coded rows: out[n] = sum_p (w * scales[rows])[n, p] * codes[rows[n, p]].

    Args:
        codes_rv: (r, v), int8 or float8_e4m3fn.
        scales_r: (r,), fp32.
        rows_np: picks, (n, p), int64 in 0..r-1.
        weights_np: (n, p), float; gradients flow to them.

    Returns:
        (n, v) in fp32.

    Raises:
        ValueError: shapes do not fit.
        IndexError: a row is not in the table.
    """
    _check_rows(codes_rv, rows_np)
    return weighted_bag(codes_rv, rows_np, weights_np * scales_r[rows_np])


def quantized_dots(
    codes_rv: Tensor, scales_r: Tensor, rows_np: Tensor, vectors_nv: Tensor
) -> Tensor:
    """`row_dots` over coded rows, (n, p) in fp32; vectors (n, v), the rest as `quantized_bag`."""
    _check_rows(codes_rv, rows_np)
    return row_dots(codes_rv, rows_np, vectors_nv) * scales_r[rows_np]


def _check_rows(codes_rv: Tensor, rows_np: Tensor) -> None:
    """Before `scales_r[rows_np]`, which takes negative rows for rows from the end."""
    if not torch.compiler.is_compiling():
        check_rows(len(codes_rv), rows_np)
