"""A saved model to a saved model with quantized value tables, as a stream through little memory."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from strata.errors import ConfigError, ModelError, StorageError
from strata.layers.row_file import RowFile, RowPlace
from strata.layers.stored import block_rows, encode_block
from strata.models.build import saved_memory
from strata.models.registration import STORED_TABLE
from strata.models.storage import table_places
from strata.models.tensor_file import INDEX, SINGLE, TensorPlace, TensorWriter, find_tensors, pieces
from strata.ops.quantized_rows import CODE_DTYPES, Codes

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class QuantizedFolder:
    """What was written.

    Attributes:
        num_tables: value tables.
        bytes_before: of their rows in the source.
        bytes_after: of codes and scales.
    """

    num_tables: int
    bytes_before: int
    bytes_after: int


def quantize_folder(
    folder: Path,
    out: Path,
    codes: Codes,
    *,
    on_bytes: Callable[[int, int], None] | None = None,
) -> QuantizedFolder:
    """Write a copy of a saved model whose value tables are 8-bit codes with a scale a row.

    Rows pass through memory some MiB at a time; all else is copied as it lies. The folder appears
    under its name when it is whole.

    Args:
        folder: written by save_pretrained.
        out: the folder to make; may exist if it is empty.
        codes: "int8" or "fp8".
        on_bytes: told how many bytes of how many are read.

    Raises:
        ConfigError: `out` holds something, there is no such storage, or rows are codes already.
        ModelError: the folder is no model with value tables, is damaged, or a row is not finite.
        StorageError: the disk has no room.
    """
    if codes not in CODE_DTYPES:
        raise ConfigError(f"no value storage {codes!r}: give one of {', '.join(CODE_DTYPES)}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"no model folder at {folder}: give a folder written by save_pretrained")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: give another --out")
    memory = saved_memory(folder)
    if memory.value_storage != "float":
        raise ConfigError(f"the value tables of {folder} are {memory.value_storage} already")
    tensors = find_tensors(folder)
    tables = _tables(folder, tensors)
    if not tables:
        raise ModelError(f"{folder} lacks its value tables: copy or save it again")
    shapes: _Shapes = {n: (p.dtype, p.shape) for n, p in tensors.items() if n not in tables}
    for name, rows in tables.items():
        stem = name.removesuffix("weight")
        shapes[stem + "codes"] = (CODE_DTYPES[codes], (rows.num_rows, rows.width))
        shapes[stem + "scales"] = (torch.float32, (rows.num_rows,))
    _check_room(out, shapes)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as parent:
        made = Path(parent) / "model"
        made.mkdir()
        _copy_small_files(folder, made, codes)
        with TensorWriter(made / SINGLE, shapes) as writer:
            _write(writer, tensors, tables, codes, on_bytes or (lambda done, total: None))
        if out.exists():
            out.rmdir()
        made.rename(out)
    return QuantizedFolder(
        num_tables=len(tables),
        bytes_before=sum(rows.table_bytes for rows in tables.values()),
        bytes_after=sum(rows.num_rows * (rows.width + 4) for rows in tables.values()),
    )


def _tables(folder: Path, tensors: dict[str, TensorPlace]) -> dict[str, RowPlace]:
    """The value tables by their names in the files, checked."""
    places = table_places(folder)
    matches = {name: re.search(STORED_TABLE, name) for name in tensors}
    return {name: places[int(m[2])][0] for name, m in matches.items() if m is not None}


def _write(
    writer: TensorWriter,
    tensors: dict[str, TensorPlace],
    tables: dict[str, RowPlace],
    codes: Codes,
    on_bytes: Callable[[int, int], None],
) -> None:
    total, done = sum(place.num_bytes for place in tensors.values()), 0
    for name, place in tensors.items():
        if name in tables:
            continue
        for piece in pieces(place):
            done += writer.append_bytes(name, piece)
            on_bytes(done, total)
    for name, rows in tables.items():
        stem, first_row = name.removesuffix("weight"), 0
        for block_bv in RowFile(rows).blocks(block_rows(rows.width)):
            codes_bv, scales_b = encode_block(block_bv, codes, first_row=first_row)
            writer.append(stem + "codes", codes_bv)
            writer.append(stem + "scales", scales_b)
            first_row += len(block_bv)
            done += len(block_bv) * rows.row_bytes
            on_bytes(done, total)


def _copy_small_files(folder: Path, made: Path, codes: Codes) -> None:
    """Tokenizer, generation settings and the like; the configuration says how rows are stored."""
    for path in sorted(folder.iterdir()):
        kept = path.suffix not in _WEIGHTS and path.name not in (INDEX, "config.json")
        if path.is_file() and kept:
            shutil.copyfile(path, made / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["memory_layers"]["value_storage"] = codes
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (made / "config.json").write_text(text, encoding="utf-8")


def _check_room(out: Path, shapes: _Shapes) -> None:
    needed = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes.values())
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise StorageError(
            f"{out} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free: free some space"
        )
