"""Row update: all queued uses of a table become one in-place pass over the rows that were read."""

from strata.ops.row_update.reference import (
    ALGORITHMS,
    RowGradients,
    new_state,
    reduce_uses,
    row_update,
)
from strata.ops.weighted_bag.queue import Use

__all__ = ["ALGORITHMS", "RowGradients", "Use", "new_state", "reduce_uses", "row_update"]
