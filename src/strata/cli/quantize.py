"""`strata quantize`: a saved model to one with 8-bit value tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def quantize(
    model: Annotated[Path, typer.Argument(help="folder written by save_pretrained")],
    out: Annotated[Path, typer.Option(help="folder to make")],
    values: Annotated[str, typer.Option(help="int8, or fp8 for rows with outliers")] = "int8",
) -> None:
    """Write a copy of a model whose value tables are 8-bit codes, a scale a row, for inference.

    Works through the tables in pieces, so that they need not fit in memory.
    """
    from strata.data.progress import ProgressBar
    from strata.models.quantize import quantize_folder

    codes: Any = values  # checked there
    with ProgressBar(f"writing {values} rows", total=1.0, enabled=True) as bar:
        done = quantize_folder(
            model, out, codes, on_bytes=lambda read, total: bar.update(read / total)
        )
    before, after = (size / 2**20 for size in (done.bytes_before, done.bytes_after))
    print(
        f"{out}: {done.num_tables} value tables, {before:,.1f} MiB as {after:,.1f} MiB of {values}"
    )
