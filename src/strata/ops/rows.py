"""Row numbers: what every kernel must be sure of before it reads or writes at one."""

from __future__ import annotations

import torch
from torch import Tensor


def check_rows(num_rows: int, rows: Tensor) -> None:
    """Refuse rows that are not in a table: a kernel reads and writes whatever lies there.

    On a GPU the check does not make the host wait; a wrong row ends the process there.

    Args:
        num_rows: r, of the table.
        rows: int64, any shape.

    Raises:
        IndexError: a row is not in 0..r-1.
    """
    if rows.numel() == 0:
        return
    if rows.device.type == "cuda":
        torch._assert_async(((rows >= 0) & (rows < num_rows)).all())
        return
    low, high = (int(bound) for bound in rows.aminmax())
    if low < 0 or high >= num_rows:
        wrong = low if low < 0 else high
        raise IndexError(f"row {wrong} is not in the table: 0..{num_rows - 1} are")
