"""Row update: all queued uses of a table become one in-place pass over the rows that were read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strata.ops.dispatch import implementation
from strata.ops.row_update import reference
from strata.ops.row_update.reference import (
    ALGORITHMS,
    Algorithm,
    Rounding,
    RowGradients,
    TableGradients,
    UpdateRule,
    new_state,
    reduce_uses,
    unknown_algorithm,
)
from strata.ops.rows import check_rows
from strata.ops.weighted_bag.queue import Use

__all__ = [
    "ALGORITHMS",
    "RowGradients",
    "TableGradients",
    "Use",
    "collect_uses",
    "new_state",
    "reduce_uses",
    "row_update",
]


def collect_uses(uses: Sequence[Use]) -> TableGradients:
    """The gradient of a table for `row_update`, in the form that costs least on its device.

    On a CPU the rows' gradients are summed only while the rows are updated, and `grad_uv` is made
    when asked for. The numbers are those of `reduce_uses`.

    Raises:
        ValueError: no uses.
    """
    if len({use.rows_np.shape[1] for use in uses}) != 1:
        return reduce_uses(uses)
    return implementation("row_update", uses[0].grad_out_nv).collect_uses(uses)


@torch.no_grad()
def row_update(
    values_rv: Tensor,
    state: dict[str, Tensor],
    gradients: TableGradients,
    *,
    algorithm: Algorithm,
    lr: float,
    scale: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-10,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> None:
    """Update the rows that were read, in place; every other row and its state stay bit-identical.

    Args:
        values_rv: the table, (r, v), fp32, bf16 or fp64; arithmetic is fp32 (fp64).
        state: from `new_state`, updated in place.
        gradients: from `collect_uses` or `reduce_uses`.
        algorithm: "adagrad" (row-wise), "adam" (lazy) or "sgd".
        lr: learning rate.
        scale: factor on the gradient, as clipping gives it.
        betas: Adam's decay rates.
        eps: added to Adagrad's and Adam's root.
        rounding: how a low-precision table rounds; "stochastic" keeps small updates in expectation
            (with "nearest", 10% of a bf16 table's entries were seen to move at lr 1e-5).
        generator: random numbers for stochastic rounding.

    Raises:
        ValueError: an unknown algorithm, or rounding that the table's dtype does not have.
        IndexError: a row is not in the table.

    Source: row-wise Adagrad as in Gupta et al. 2014 and DLRM (arXiv 1906.00091); lazy Adam as in
    torch.optim.SparseAdam, with a step count per row.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(unknown_algorithm(algorithm))
    floats = (torch.float32, torch.float64, torch.bfloat16)
    if rounding == "stochastic" and values_rv.dtype not in floats:
        raise ValueError(
            f"stochastic rounding is for bfloat16 tables, this one is {values_rv.dtype}"
        )
    rule = UpdateRule(algorithm, lr, scale, betas, eps, rounding, generator)
    check_rows(len(values_rv), gradients.rows_u)
    dense = all(tensor.is_contiguous() for tensor in (values_rv, *state.values()))
    update = implementation("row_update", values_rv).row_update if dense else reference.row_update
    update(values_rv, state, gradients, rule)
