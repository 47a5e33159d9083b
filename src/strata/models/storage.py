"""How the value tables of a model are stored: quantizing them, and opening them mapped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from strata.errors import ConfigError, ModelError
from strata.layers import (
    MappedTable,
    MemoryLayerConfig,
    QuantizedTable,
    RowPlace,
    RowTable,
    replace_tables,
    value_tables,
)
from strata.models.registration import STORED_TABLE, tables_from
from strata.models.tensor_file import TensorPlace, find_tensors, pieces
from strata.ops.quantized_rows import CODE_DTYPES, Codes

Values = Literal["int8", "fp8", "mapped"]
VALUES = ("int8", "fp8", "mapped")

_FLOATS = (torch.float32, torch.bfloat16, torch.float64)
_T = TypeVar("_T", bound=nn.Module)


def quantize_values(target: _T, codes: Codes) -> _T | QuantizedTable:
    """Store value tables as 8-bit codes with one fp32 scale a row, for inference.

    Tables are written a few MiB of rows at a time, one table after the other, and each float table
    is let go as soon as its codes are whole.

    Args:
        target: a table, or a model, which is changed in place.
        codes: "int8" or "fp8" (e4m3fn).

    Returns:
        The new table, or the same model.

    Raises:
        ConfigError: there is no such storage.
        ModelError: a row holds NaN or infinity, rows are codes already, or the model has no table.
    """
    if codes not in CODE_DTYPES:
        raise ConfigError(f"no value storage {codes!r}: give one of {', '.join(CODE_DTYPES)}")
    if isinstance(target, RowTable):
        return QuantizedTable.of(target, codes)
    if not value_tables(target):
        raise ModelError(f"{type(target).__name__} has no value tables to quantize")
    replace_tables(target, lambda table: QuantizedTable.of(table, codes))
    config = getattr(target, "config", None)
    if getattr(config, "memory_layers", None):
        config.memory_layers = {**config.memory_layers, "value_storage": codes}  # type: ignore[union-attr]
    return target


def open_with(
    open_model: Callable[[], PreTrainedModel],
    folder: Path,
    memory: MemoryLayerConfig,
    *,
    values: Values,
    cache_gb: float,
) -> PreTrainedModel:
    """Open a saved model with its value tables mapped, or quantized while they are read.

    Args:
        open_model: opens the folder the ordinary way.
        folder: written by save_pretrained.
        memory: the memory layers in its config.json.
        values: "mapped", "int8" or "fp8".
        cache_gb: of all mapped tables' hot rows together, GiB.

    Raises:
        ConfigError: the cache cannot hold one token's rows, or codes would be quantized again.
        ModelError: the folder's tables cannot be read.
    """
    if values != "mapped" and memory.value_storage == values:
        return open_model()
    if values != "mapped" and memory.value_storage != "float":
        raise ConfigError(
            f"the value tables of {folder} are {memory.value_storage} already: quantize the float "
            f"model to {values}"
        )
    places = table_places(folder)
    picks = memory.num_heads * memory.top_k
    least = picks * max((rows.row_bytes for rows, _ in places.values()), default=0)
    cache_bytes = least  # enough for a pass over all rows, which goes round the cache
    if values == "mapped":
        cache_bytes = int(cache_gb * 2**30) // max(1, len(places))
        if cache_bytes < least:
            raise ConfigError(
                f"a cache of {cache_gb:g} GB is too small for {len(places)} value tables: one "
                f"token reads {picks} rows of each, give {least * len(places) / 2**30:.2g} or more"
            )

    def make(number: int) -> RowTable:
        if number not in places:
            raise ModelError(f"{folder} lacks value table {number}: copy or save it again")
        rows, scales = places[number]
        scales_r = None if scales is None else _read(scales)
        return MappedTable(rows, scales_r, cache_bytes=cache_bytes, picks_per_token=picks)

    with tables_from(make):
        model = open_model()
    if values != "mapped":
        quantize_values(model, values)
    return model


def table_places(folder: Path) -> dict[int, tuple[RowPlace, TensorPlace | None]]:
    """Where the value tables of a saved model lie, by their number: rows, and scales of codes.

    Raises:
        ModelError: a file is missing, cut or damaged, or a table is not what it should be.
    """
    found: dict[int, dict[str, TensorPlace]] = {}
    for name, place in find_tensors(folder).items():
        match = re.search(STORED_TABLE, name)
        if match:
            found.setdefault(int(match[2]), {})[match[3]] = place
    return {number: _table(folder, number, parts) for number, parts in sorted(found.items())}


def _table(
    folder: Path, number: int, parts: dict[str, TensorPlace]
) -> tuple[RowPlace, TensorPlace | None]:
    wrong = ModelError(f"value table {number} of {folder} is damaged: copy or save it again")
    rows = parts.get("weight", parts.get("codes"))
    scales = parts.get("scales")
    if rows is None or len(rows.shape) != 2 or ("codes" in parts) != (scales is not None):
        raise wrong
    if rows.dtype not in (_FLOATS if scales is None else tuple(CODE_DTYPES.values())):
        raise wrong
    if scales is not None and (scales.dtype, scales.shape) != (torch.float32, rows.shape[:1]):
        raise wrong
    r, v = rows.shape
    return RowPlace(rows.path, rows.offset, r, v, rows.dtype), scales


def _read(place: TensorPlace) -> torch.Tensor:
    """A tensor of moderate size, copied into memory."""
    data = np.frombuffer(bytearray(b"".join(pieces(place))), np.uint8)
    return torch.from_numpy(data).view(place.dtype).view(place.shape)
