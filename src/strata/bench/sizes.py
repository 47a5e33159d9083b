"""The sizes that `strata bench ops` runs at."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OpSize:
    """One case: a table, and the tokens that read it.

    Attributes:
        half_keys: m; the table has m * m rows.
        width: v, numbers a row.
        dtype: of the table.
        tokens: n.
        heads, top_k: each token reads heads * top_k rows.
    """

    half_keys: int
    width: int
    dtype: torch.dtype
    tokens: int = 2048
    heads: int = 4
    top_k: int = 32

    @property
    def rows(self) -> int:
        """r."""
        return self.half_keys**2

    @property
    def picks(self) -> int:
        """p, rows read a token."""
        return self.heads * self.top_k

    @property
    def half_key_dim(self) -> int:
        """Numbers in one half-key of a whole layer; key_dim, both halves, is half the width."""
        return self.width // 4

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    @property
    def table_bytes(self) -> int:
        """Bytes of the table."""
        return self.rows * self.row_bytes

    @property
    def name(self) -> str:
        """For tables: rows x width dtype."""
        return f"{self.rows:,} x {self.width} {str(self.dtype).removeprefix('torch.')}"


_FP32, _BF16 = torch.float32, torch.bfloat16

SIZES: dict[str, tuple[OpSize, ...]] = {
    "small": (OpSize(64, 48, _FP32, tokens=128, top_k=8), OpSize(64, 48, _BF16, tokens=128)),
    "medium": (OpSize(512, 256, _FP32), OpSize(512, 256, _BF16)),
    "large": tuple(
        OpSize(half_keys, width, dtype)
        for half_keys in (512, 1024)
        for width in (256, 1024)
        for dtype in (_FP32, _BF16)
    ),
    # Cost against rows: the same reads from tables of 2^16 to 2^22 rows.
    "rows": tuple(OpSize(half_keys, 256, _FP32) for half_keys in (256, 512, 1024, 2048)),
}
