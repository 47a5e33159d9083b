"""Value tables for inference: rows as int8 or fp8 codes with a scale each, a quarter of fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from strata.errors import ModelError
from strata.layers.values import RowTable, ValueTable
from strata.ops.quantized_rows import (
    CODE_DTYPES,
    Codes,
    quantize_rows,
    quantized_bag,
    quantized_dots,
)

_BLOCK_BYTES = 16 * 2**20  # fp32 rows in flight while a table is written


class ReadOnlyTable(RowTable):
    """A table that answers and does not learn."""

    def refuse_training(self) -> None:
        """In training mode with gradients on, raise the one error that all such tables raise.

        Raises:
            ModelError: rows stored so cannot be trained.
        """
        if self.training and torch.is_grad_enabled():
            raise training_error(self.storage)


def training_error(storage: str) -> ModelError:
    """What is said when somebody trains a read-only table."""
    return ModelError(
        f"value tables stored as {storage} are for inference: train the float model and quantize "
        "it afterwards, or call eval() first"
    )


class QuantizedTable(ReadOnlyTable):
    """Rows as 8-bit codes with one fp32 scale each; row r is scales[r] * codes[r].

    Codes and scales are buffers: they are saved and moved with the model and keep their dtypes
    when the model is cast.

    Args:
        num_rows: r.
        width: v.
        storage: "int8" or "fp8" (e4m3fn).
        device: where; rows are zero until they are written.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        num_rows: int,
        width: int,
        storage: Codes,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.storage = storage
        bits = torch.zeros(num_rows, width, dtype=torch.int8, device=device)
        self.register_buffer("codes", bits.view(CODE_DTYPES[storage]))
        scales = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, table: RowTable, storage: Codes) -> QuantizedTable:
        """Quantize a float table, block by block: beside the codes one block is held in fp32.

        Raises:
            ModelError: a row holds NaN or infinity, or the rows are codes already.
        """
        device = table.weight.device if isinstance(table, ValueTable) else "cpu"
        new = cls(table.num_rows, table.width, storage, device=device)
        new.write(table.blocks(block_rows(table.width)))
        return new.train(table.training)

    def write(self, blocks_of_rows: Iterable[Tensor]) -> None:
        """Fill the table with consecutive blocks of float rows, (b, v) each, together all rows.

        Raises:
            ModelError: a row holds NaN or infinity.
        """
        start = 0
        for block_bv in blocks_of_rows:
            codes_bv, scales_b = encode_block(block_bv, self.storage, first_row=start)
            stop = start + len(block_bv)
            # Bits, for not every build of torch can copy fp8 into a slice.
            self.codes[start:stop].view(torch.int8).copy_(codes_bv.view(torch.int8))
            self.scales[start:stop] = scales_b
            start = stop
        assert start == self.num_rows, f"{start} of {self.num_rows} rows were written"

    @property
    def num_rows(self) -> int:
        """r."""
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        """v."""
        return self.codes.shape[1]

    def bag(self, rows_np: Tensor, weights_np: Tensor) -> Tensor:
        self.refuse_training()
        return quantized_bag(self.codes, self.scales, rows_np, weights_np)

    def dots(self, rows_np: Tensor, vectors_nv: Tensor) -> Tensor:
        self.refuse_training()
        return quantized_dots(self.codes, self.scales, rows_np, vectors_nv)

    def blocks(self, rows_per_block: int) -> Iterable[Tensor]:
        raise ModelError(f"the value tables are stored as {self.storage} already")

    def forward(self, rows: Tensor) -> Tensor:
        """Plain lookup of rows (...,) -> (..., v) in fp32, for inspection."""
        bits = self.codes.view(torch.int8)[rows]
        return bits.view(self.codes.dtype).float() * self.scales[rows][..., None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves to other devices, but keeps its dtypes under `.to(dtype)`, `.half()` and so on."""
        for name in ("codes", "scales"):
            held = self._buffers[name]
            assert held is not None
            moved = fn(held)
            self._buffers[name] = moved if moved.dtype == held.dtype else held.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage={self.storage}"


def block_rows(width: int) -> int:
    """Rows that are quantized at a time."""
    return max(1, _BLOCK_BYTES // (4 * max(1, width)))


def encode_block(block_bv: Tensor, storage: str, *, first_row: int) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of some rows of a larger table.

    Raises:
        ModelError: a row holds NaN or infinity; named by its number in the table.
    """
    try:
        return quantize_rows(block_bv, storage)  # type: ignore[arg-type]
    except ValueError:
        bad = int(block_bv.float().isfinite().all(1).logical_not().nonzero()[0])
        raise ModelError(
            f"row {first_row + bad} of a value table holds NaN or infinity: it cannot be "
            f"written as {storage}"
        ) from None
