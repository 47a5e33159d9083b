"""safetensors files without their tensors: where each lies, and writing one as a stream.

The format: eight bytes with the length of a JSON header, the header, then the tensors' bytes;
offsets count from the end of the header. Source: the safetensors documentation.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from strata.errors import ModelError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own bound
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorPlace:
    """One tensor of a file.

    Attributes:
        path: the file.
        offset: its first byte in the file.
        dtype: of an element.
        shape: as it was saved.
    """

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def find_tensors(folder: Path) -> dict[str, TensorPlace]:
    """Where all tensors of a saved model lie, in one file or in the shards of an index.

    Raises:
        ModelError: a file is missing, cut or damaged.
    """
    if not (folder / INDEX).is_file():
        return read_header(folder / SINGLE)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(index.values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ModelError(f"{folder / INDEX} is no index: copy or save the folder again") from None
    places: dict[str, TensorPlace] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ModelError(f"{folder / INDEX} names {shard!r}, which is no file beside it")
        places.update(read_header(folder / shard))
    return places


def read_header(path: Path) -> dict[str, TensorPlace]:
    """Where the tensors of one file lie; every size is checked against the file's.

    Raises:
        ModelError: the file is missing, cut or damaged.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, file_bytes - 8):
                raise ValueError(f"a header of {length} bytes in a file of {file_bytes}")
            tree = json.loads(file.read(length))
        places = {
            name: _place(path, entry, start=8 + length)
            for name, entry in tree.items()
            if name != "__metadata__"
        }
        end = max((place.offset + place.num_bytes for place in places.values()), default=0)
        if end > file_bytes:
            raise ValueError(f"it ends after {file_bytes:,} bytes, its tensors after {end:,}")
    except FileNotFoundError:
        raise ModelError(f"{path} is missing: copy or save the folder again") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged ({error}): copy or save the folder again") from None
    return places


def _place(path: Path, entry: Any, *, start: int) -> TensorPlace:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end)):
        raise ValueError("a size is no number")
    place = TensorPlace(path, start + begin, DTYPES[entry["dtype"]], shape)
    if place.num_bytes != end - begin:
        raise ValueError(f"a tensor of {place.num_bytes:,} bytes in {end - begin:,}")
    return place


class TensorWriter:
    """A new safetensors file whose tensors are written piece by piece, in any order.

    Args:
        path: the file; replaced where it exists.
        tensors: dtype and shape of each, by name.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        begins, end = {}, 0
        # Wide elements first, so that every tensor is aligned to its own.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda t: -t[1][0].itemsize):
            begins[name], end = end, end + math.prod(shape) * dtype.itemsize
            offsets = [begins[name], end]
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": offsets}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file: BinaryIO = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._next = {name: 8 + len(text) + begin for name, begin in begins.items()}
        self._file.truncate(8 + len(text) + end)

    def append(self, name: str, piece: Tensor) -> int:
        """Write the next elements of a tensor, contiguous, on the CPU; how many bytes they were."""
        data = piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return self.append_bytes(name, data.data)

    def append_bytes(self, name: str, data: memoryview | bytes) -> int:
        """The same for bytes as they lie in a file."""
        self._file.seek(self._next[name])
        self._file.write(data)
        self._next[name] += len(data)
        return len(data)

    def close(self) -> None:
        """Close the file when all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pieces(place: TensorPlace, *, piece_bytes: int = 16 * 2**20) -> Iterable[bytes]:
    """The bytes of a tensor, some at a time."""
    with place.path.open("rb") as file:
        file.seek(place.offset)
        left = place.num_bytes
        while left > 0:
            piece = file.read(min(left, piece_bytes))
            if not piece:
                raise ModelError(f"{place.path} was cut while it was read: copy it again")
            left -= len(piece)
            yield piece
